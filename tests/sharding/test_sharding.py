"""A mesh changes where arrays lie and nothing else: on eight devices the numbers of one."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from support.on_devices import batch, call

from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import trainer_shapes

TRAIN = [("all", None), ("lora", None), ("lora", "nf4"), ("lora", "int8")]
MIXTURES = ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "data=4,tensor=2", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2"]


def check(cases):
    for case, found in zip(cases, call(8, "compare", cases)):
        print(case, found)
        assert found["logits"] < 1e-5 and found["loss"] < 1e-5 and found["gradients"] < 1e-5, case
        assert found["same_tokens"] and found["different"] > 4 and found["largest"] > 1e-3
        assert not found["strays"]  # a step leaves every array where it was
        if "fsdp" in case[4] and "tensor" not in case[4]:  # parameters and what the optimizer keeps of them; of LoRA's factors one of two has D
            ways = int(case[4][-1])
            assert found["part"] < (1.3 / ways if case[2] == "all" else 0.5 + 1 / ways)
        key_heads = {"pg1": 1, "pg2": 4}[case[0]]
        ways = int(case[4].partition("tensor=")[2] or 1)
        assert sum("K of" in told for told in found["told"]) == (key_heads % ways > 0)


def test_eight_devices_compute_what_one_does():
    all_of_it = "nf4-32-double,embedding=int8,vision=int8,cache=int8"
    check([("pg2", "stack", "all", None, "data=2,fsdp=2,tensor=2"), ("pg1", "list", "lora", all_of_it, "fsdp=2,tensor=4")])


def test_predict_on_six_devices(command, tmp_path):
    """Three of them share out the rows, of batches that are filled for it; the answers are those of one device, which can go on from there."""
    rows = [{"image": str(TINY.parent / "digits.jpg"), "prefix": prefix} for prefix in ("ocr", "detect 3", "count", "caption en", "ocr")]
    (data := tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--max-new-tokens=6", "--batch-size=4"]
    assert call(6, "predicted", [*options, "--output", str(tmp_path / "six"), "--mesh=auto"]) == [6, 3]
    assert command("predict", *options, "--output", tmp_path / "one")[0] == 0
    answers = lambda name: (tmp_path / name / "answers.jsonl").read_text()
    assert answers("six") == answers("one") and answers("one").count('"answer"') == 5
    assert command("predict", *options, "--output", tmp_path / "six", "--resume")[0] == 0 and answers("six") == answers("one")


def test_rows_that_the_mesh_does_not_divide(tmp_path):
    """Would be computed by every device alike: refused to train; to answer, a batch is filled up."""
    row = {"image": str(TINY.parent / "digits.jpg"), "prefix": "ocr", "suffix": "3"}
    (data := tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    learn = ["finetune", "--data", str(data), "--output", str(tmp_path / "run"), "--mesh=data=3"]
    plan = ["plan", "--json", "--model=tiny", "--on=h200x3", "--mesh=data=3", "--layers=stack", "--text=8", "--new=4"]
    *wrong, planned = call(3, "said", [learn, [*learn, "--accumulate=2"], [*plan, "--batch=8", "--workload=finetune"], [*plan, "--batch=4"]])
    for told, reason in zip(wrong, ("--batch-size 8", "--batch-size 8 in 2 parts", "--batch 8")):
        assert f"{reason} does not divide over data x fsdp = 3: give a multiple of {6 if 'parts' in reason else 3}, or another --mesh" in told
    assert json.loads(planned)["work"]["batch"] == 6 and not (tmp_path / "run").exists()


def test_auto():
    """To answer: no more tensor than the 4 key heads of Gemma 2 divide over, else the cache is whole on every device; one key head is small.

    To train: no more fsdp than the rows divide over.
    """
    two, one, training, few = call(8, "auto", [("pg2", False, 0), ("pg1", False, 0), ("pg2", True, 16), ("pg2", True, 6)])
    assert two == {"data": 2, "fsdp": 1, "tensor": 4} and one == {"data": 1, "fsdp": 1, "tensor": 8}
    assert training["fsdp"] == 8 and few == {"data": 1, "fsdp": 2, "tensor": 4}


def test_what_travels():
    """Of 16 rows of 32 tokens over fsdp=4, tensor=2; D = 64, F = 96, N*H = 64; a table of [65536, 64], of which the loss takes half at a time."""
    found = call(8, "collectives", "fsdp=4,tensor=2", 16)
    of = lambda name: [shape for kind, shapes, _, _ in found for shape in shapes if kind == name]
    gathered, reduced = of("all-gather"), of("all-reduce") + of("reduce-scatter")
    # FSDP: each kernel, when it is its turn, over D only, while heads, F and vocabulary stay split
    assert all(kernel in gathered for kernel in ([48, 64], [64, 48], [32, 64], [64, 32], [16, 64], [16384, 64]))
    assert not any(whole in gathered for whole in ([96, 64], [64, 96], [64, 64]))
    # never those of several layers, nor logits of all positions
    assert not any(len(shape) > 2 and shape[-1] == 64 and shape[-2] in (48, 96, 64, 32, 16) and shape[0] == 3 for shape in gathered)
    assert not any(max(shape, default=0) > 16384 for shape in gathered) and not any(shape[-1] > 4096 for shape in gathered + reduced if shape)
    # tensor parallelism: the tokens of a device's 4 rows are gathered before a block's products and summed after them
    assert [4, 32, 64] in gathered and [4, 32, 64] in reduced
    # the lookup: each device asks its slice of the vocabulary for the rows of all, then rows and D change places
    assert [16, 32, 16] in reduced and [1, 4, 32, 16] in of("all-to-all")
    # gradients of a layer's kernels are summed over the rows of all devices
    assert all(kernel in reduced for kernel in ([48, 64], [64, 48], [32, 64], [64, 32]))


def test_codes_travel_and_not_what_they_stand_for():
    """QLoRA, D = 64 over fsdp=8: two codes to the byte, one scale for 32."""
    found = call(8, "collectives", "fsdp=8", 16, train="lora", quantize="nf4-32")
    gathered = [(dtype, shape) for kind, shapes, _, dtypes in found for dtype, shape in zip(dtypes, shapes) if kind == "all-gather"]
    wide = [shape for dtype, shape in gathered if dtype != "u8"]
    assert all(("u8", codes) in gathered for codes in ([96, 32], [64, 48], [8, 8, 32], [4, 8, 32])), gathered
    assert not any(kernel in wide for kernel in ([96, 64], [64, 96], [96, 32], [64, 48], [64, 64])), wide


def test_weak_scaling():
    """As many rows a device on 1, 2, 4 and 8 devices: as much work for each, however they are used (of the optimizer's part even less)."""
    meshes = ["data=1", "data=2", "fsdp=4", "data=2,fsdp=2,tensor=2"]
    one, *others = call(8, "flops", [(mesh, 8 * 2**i) for i, mesh in enumerate(meshes)])
    assert one > 1e6 and all(abs(more / one - 1) < 0.05 for more in others), (one, others)


@pytest.mark.parametrize(
    "mesh,expected",
    [("data=2,data=4", "'data=4' is none of data=N, fsdp=N, tensor=N"), ("model=2", "'model=2'"), ("fsdp", "'fsdp'"), ("data=0", "'data=0'"),
     ("data=64", "needs 64 devices; there are 1")],
)  # fmt: skip
def test_what_is_no_mesh(command, mesh, expected):
    code, _, error = command("generate", "--image", "paligemma_jax/assets/digits.jpg", "--prompt", "caption en", "--mesh", mesh)
    assert code == 2 and expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_28b_step_compiles_as_fast_as_that_of_3b():
    """One block, looped over: 46 layers of it for 26 are no more to compile (pytest -m slow -s -k 28b tests/sharding/test_sharding.py)."""
    seconds = {}
    for name in ("3b-224", "28b-224"):
        trainer, state, frozen = trainer_shapes(abstract_model_by_name(name, "float32"), FinetuneConfig("", "", train="lora", remat="full", batch_size=2))
        data = batch(PaliGemmaConfig.preset(name), 2)
        begin = time.perf_counter()
        trainer.step.lower(state, frozen, data, max_targets=8).compile()
        seconds[name] = time.perf_counter() - begin
    print(seconds)
    assert seconds["28b-224"] < 1.5 * seconds["3b-224"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MIXTURES)
def test_every_mixture(mesh):
    check([(kind, form, *train, mesh) for kind, form, train in itertools.product(("pg1", "pg2"), ("list", "stack"), TRAIN)])
