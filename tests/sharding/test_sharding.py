"""A mesh changes only the placement of arrays: eight devices compute the same numbers as one."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from support.on_devices import call, make_batch
from support.paths import DIGITS

from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import trainer_shapes

TRAIN = [("all", None), ("lora", None), ("lora", "nf4"), ("lora", "int8")]
MESHES = ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "data=4,tensor=2", "fsdp=2,tensor=4"]
MESHES += ["data=2,fsdp=2,tensor=2"]


def check(cases):
    """Compare cases of (kind, layers, train, quantize, mesh) with one device."""
    for case, result in zip(cases, call(8, "compare", cases), strict=True):
        print(case, result)
        kind, _, train, _, mesh = case
        assert result["logits"] < 1e-5 and result["loss"] < 1e-5 and result["gradients"] < 1e-5
        assert result["same_tokens"] and result["distinct_tokens"] > 4 and result["largest"] > 1e-3
        assert not result["moved"]  # a step keeps the sharding of every array
        if "fsdp" in mesh and "tensor" not in mesh:
            # Parameters and the optimizer's state are split; one of the two LoRA factors has D.
            ways = int(mesh[-1])
            assert result["share"] < (1.3 / ways if train == "all" else 0.5 + 1 / ways)
        key_heads = {"pg1": 1, "pg2": 4}[kind]
        ways = int(mesh.partition("tensor=")[2] or 1)
        replicated = [text for text in result["warnings"] if text.startswith("axis K of")]
        assert len(replicated) == (key_heads % ways > 0)


def test_eight_devices_compute_what_one_does():
    quantize = "nf4-32-double,embedding=int8,vision=int8,cache=int8"
    check(
        [
            ("pg2", "stack", "all", None, "data=2,fsdp=2,tensor=2"),
            ("pg1", "list", "lora", quantize, "fsdp=2,tensor=4"),
        ]
    )


def test_predict_pads_batches_on_six_devices(command, tmp_path):
    """Three devices split the rows. The answers are those of one device, which can resume."""
    prompts = ("ocr", "detect 3", "count", "caption en", "ocr")
    rows = [{"image": str(DIGITS), "prefix": prompt} for prompt in prompts]
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--max-new-tokens=6", "--batch-size=4"]
    sizes = call(
        6, "predict_batch_sizes", [*options, "--output", str(tmp_path / "six"), "--mesh=auto"]
    )
    assert sizes == [6, 3]
    assert command("predict", *options, "--output", tmp_path / "one")[0] == 0

    def answers(name):
        return (tmp_path / name / "answers.jsonl").read_text()

    assert answers("six") == answers("one") and answers("one").count('"answer"') == 5
    assert command("predict", *options, "--output", tmp_path / "six", "--resume")[0] == 0
    assert answers("six") == answers("one")


def test_batches_that_the_mesh_does_not_divide(tmp_path):
    """Training rejects them, since every device would compute all rows; inference pads them."""
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps({"image": str(DIGITS), "prefix": "ocr", "suffix": "3"}) + "\n")
    run = tmp_path / "run"
    finetune = ["finetune", "--data", str(data), "--output", str(run), "--mesh=data=3"]
    plan = ["plan", "--json", "--model=tiny", "--on=h200x3", "--mesh=data=3", "--layers=stack"]
    plan += ["--text=8", "--new=4"]
    commands = [
        finetune,
        [*finetune, "--accumulate=2"],
        [*plan, "--batch=8", "--workload=finetune"],
        [*plan, "--batch=4"],
    ]
    *errors, planned = call(3, "run_commands", commands)
    for error, flag, multiple, factors in zip(
        errors,
        ("--batch-size", "--batch-size", "--batch"),
        (3, 6, 3),
        ("", "--accumulate 2 x ", ""),
        strict=True,
    ):
        assert (
            f"{flag} must be a multiple of {multiple} ({factors}data x fsdp = 3), "
            "got 8; or choose another --mesh"
        ) in error
    assert json.loads(planned)["config"]["batch"] == 6 and not run.exists()


def test_auto_meshes():
    """For inference, `tensor` divides the 4 key heads of PaliGemma 2, else every device would store
    the complete cache; the cache of a single key head is small. For training, `fsdp` divides the
    batch."""
    cases = [("pg2", False, 0), ("pg1", False, 0), ("pg2", True, 16), ("pg2", True, 6)]
    pg2, pg1, training, small_batch = call(8, "auto_meshes", cases)
    assert pg2 == {"data": 2, "fsdp": 1, "tensor": 4}
    assert pg1 == {"data": 1, "fsdp": 1, "tensor": 8}
    assert training["fsdp"] == 8 and small_batch == {"data": 1, "fsdp": 2, "tensor": 4}


def test_collectives_of_a_training_step():
    """16 rows of 32 tokens over fsdp=4,tensor=2; D = 64, F = 96, N*H = 64; a table of [65536, 64],
    half of which the loss takes at a time."""
    collectives = call(8, "collectives", "fsdp=4,tensor=2", 16)

    def shapes_of(opcode):
        return [shape for kind, shapes, _, _ in collectives for shape in shapes if kind == opcode]

    gathered = shapes_of("all-gather")
    reduced = shapes_of("all-reduce") + shapes_of("reduce-scatter")
    # FSDP gathers each kernel when it is used, over D only; heads and F stay split.
    kernels = ([48, 64], [64, 48], [4, 8, 64], [64, 4, 8], [2, 8, 64])
    assert all(kernel in gathered for kernel in kernels)
    # In the loss all devices split the vocabulary, and no part of the table is gathered.
    assert [16384, 64] not in gathered
    assert not any(kernel in gathered for kernel in ([96, 64], [64, 96], [64, 64]))

    # It never gathers the kernels of several layers, nor the logits of all positions.
    def is_stack(shape):
        return len(shape) > 2 and shape[0] == 3 and shape[-1] == 64 and shape[-2] in rows

    rows = (48, 96, 64, 32, 16)
    assert not any(is_stack(shape) for shape in gathered)
    assert not any(max(shape, default=0) > 16384 for shape in gathered)
    assert not any(shape[-1] > 4096 for shape in gathered + reduced if shape)
    # Tensor parallelism gathers the tokens of a device's 4 rows before the products of a block, and
    # sums them after.
    assert [4, 32, 64] in gathered and [4, 32, 64] in reduced
    # Each device looks up all rows in its slice of the vocabulary, then rows and D change places.
    assert [16, 32, 16] in reduced and [1, 4, 32, 16] in shapes_of("all-to-all")
    # The gradients of a layer's kernels are summed over the rows of all devices.
    assert all(kernel in reduced for kernel in ([48, 64], [64, 48], [4, 8, 64], [64, 32]))


@pytest.mark.thorough
def test_qlora_gathers_codes_and_not_dequantized_kernels():
    """D = 64 over fsdp=8: two codes per byte, one scale for 32."""
    gathered = [
        (dtype, shape)
        for kind, shapes, _, dtypes in call(
            8, "collectives", "fsdp=8", 16, train="lora", quantize="nf4-32"
        )
        for dtype, shape in zip(dtypes, shapes, strict=True)
        if kind == "all-gather"
    ]
    wide = [shape for dtype, shape in gathered if dtype != "u8"]
    codes = ([96, 32], [64, 48], [8, 8, 32], [4, 8, 32])
    assert all(("u8", shape) in gathered for shape in codes), gathered
    kernels = ([96, 64], [64, 96], [96, 32], [64, 48], [64, 64])
    assert not any(kernel in wide for kernel in kernels), wide


@pytest.mark.slow
def test_weak_scaling():
    """With the same rows per device, each of 1, 2, 4 and 8 devices does the same work on any mesh
    (less, even, for the optimizer)."""
    meshes = ["data=1", "data=2", "fsdp=4", "data=2,fsdp=2,tensor=2"]
    first, *others = call(8, "step_flops", [(mesh, 8 * 2**i) for i, mesh in enumerate(meshes)])
    assert first > 1e6
    assert all(abs(flops / first - 1) < 0.05 for flops in others), (first, others)


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("data=2,data=4", "(axes data, fsdp, tensor), got 'data=4'"),
        ("model=2", "got 'model=2'"),
        ("fsdp", "got 'fsdp'"),
        ("data=0", "got 'data=0'"),
        ("data=64", "needs 64 devices, got 1"),
    ],
)
def test_invalid_meshes_are_rejected(command, mesh, message):
    code, _, error = command(
        "generate", "--image", DIGITS, "--prompt", "caption en", "--mesh", mesh
    )
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_28b_step_compiles_as_fast_as_3b():
    """A layer in a loop of 46 iterations compiles in the same time as in a loop of 26."""
    seconds = {}
    for name in ("3b-224", "28b-224"):
        config = FinetuneConfig("", "", train="lora", remat="full", batch_size=2)
        model = abstract_model_by_name(name, "float32")
        trainer, state, frozen = trainer_shapes(model, config)
        batch = make_batch(PaliGemmaConfig.preset(name), 2)
        start = time.perf_counter()
        trainer.step.lower(state, frozen, batch, max_targets=8).compile()
        seconds[name] = time.perf_counter() - start
    print(seconds)
    assert seconds["28b-224"] < 1.5 * seconds["3b-224"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_model_and_training_on_every_mesh(mesh):
    combinations = itertools.product(("pg1", "pg2"), ("list", "stack"), TRAIN)
    check([(kind, layers, *train, mesh) for kind, layers, train in combinations])
