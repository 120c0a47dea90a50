"""Plans: what fits, what is counted, invalid requests; with the TPU compiler if it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from support.paths import ROOT

from convert.formats import convert
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.model.config import PRESETS
from paligemma_jax.model.flops import prefill_flops, vision_flops
from paligemma_jax.model.tree import parameters
from paligemma_jax.planning.chips import CHIPS, Chip, Slice

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="libtpu, the TPU compiler, is not installed (extra: plan)"
)


@pytest.fixture
def plan(command):
    """Return a function that runs `paligemma-jax plan --json`, and returns its object, its list of
    objects, or stderr."""

    def run(*arguments):
        before = os.environ.copy()  # the command changes it
        try:
            code, out, err = command("plan", "--json", *arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)
        results = [json.loads(line) for line in out.splitlines()]
        return err if code else results[0] if len(results) == 1 else results

    return run


@pytest.mark.parametrize(
    "name, chip, count",
    [
        ("v5e:4x4", "v5e", 16),
        ("v5p:2x2x2", "v5p", 8),
        ("h200x8", "h200", 8),
        ("a100-80gx3", "a100-80g", 3),
        ("h100", "h100", 1),
    ],
)
def test_names_of_slices(name, chip, count):
    assert Slice.parse(name) == Slice(name, CHIPS[chip], count)


WRONG_SLICES = ["v5e", "v5e:0x4", "v5ex8", "h200:2x4", "h200x0", "tpu", "v5e:4", "v5e:", ""]


@pytest.mark.parametrize("name", [*WRONG_SLICES, "v5e:4x4x4", "v5p:2x2"])
def test_wrong_names_of_slices(name):
    with pytest.raises(ValueError, match="--on"):
        Slice.parse(name)


def test_cloud_names_of_slices_are_explained():
    message = r"got 'v5litepod-8'.* v5e-8 or v5litepod-8 is v5e:2x4"
    with pytest.raises(ValueError, match=message):
        Slice.parse("v5litepod-8")


@pytest.mark.parametrize("workload", ["generate", "finetune"])
def test_one_chip_does_all_of_the_counted_work(plan, workload):
    """Compiled with the CPU compiler."""
    arguments = ["--model", "tiny", "--workload", workload, "--on", "h200", "--batch", "2"]
    arguments += ["--text", "32", "--new", "8"]
    result = plan(*arguments)
    assert result["fits"] and result["estimate"]
    assert 0 < result["bytes_per_chip"] < result["chip_bytes"] == 141e9
    for name in ("compile_seconds", "flops", "bytes", "rows_s"):
        assert result[name] > 0
    config, programs = PRESETS["tiny"], result["programs"]
    if workload == "generate":
        vision = vision_flops(config)
        prefill = prefill_flops(config, 96) - vision
        assert programs["encode"]["flops"] == pytest.approx(2 * vision, rel=0.02)
        assert programs["prefill"]["flops"] == pytest.approx(2 * prefill, rel=0.02)
        decoder = config.decoder
        heads = decoder.num_hidden_layers * decoder.num_key_value_heads
        numbers = 2 * 2 * 128 * heads * decoder.head_dim
        # One byte instead of two, plus scales.
        quantized = plan(*arguments, "--quantize", "cache=int8")["programs"]["decode"]
        saved = programs["decode"]["argument_bytes"] - quantized["argument_bytes"]
        assert 0.8 * numbers < saved < numbers
    else:
        assert programs["step"]["flops"] > 2 * 3 * prefill_flops(config, 96)
        assert programs["step"]["argument_bytes"] > 3 * 4 * 1.6e6


def test_a_model_that_does_not_fit(plan, monkeypatch):
    monkeypatch.setitem(CHIPS, "h200", Chip(1e6, 1.0, 1.0, 1.0, ""))
    result = plan("--model", "tiny", "--on", "h200", "--batch", "1", "--new", "4")
    assert not result["fits"] and result["bytes_per_chip"] > result["chip_bytes"] == 10**6


@pytest.mark.slow
def test_search():
    """The search covers every mesh of four chips, every remat policy, and the batches that the mesh
    divides."""
    options = "--model=tiny --workload=finetune --lora=2 --on=h200x4 --text=8 --new=4"
    search = "--search --batches 4 6"
    process = subprocess.run(
        [sys.executable, "-m", "paligemma_jax", "plan", *options.split(), *search.split()],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = process.stdout.splitlines()
    assert len(lines) == 4 * (6 + 3)
    assert last.startswith("fastest: tiny LoRA 2 on h200x4") and last[9:] in lines


def test_json_of_a_search_ends_with_the_fastest(plan, monkeypatch):
    """The last object is the fastest plan, if any fits. Batches that the mesh does not divide are
    not tried."""
    from paligemma_jax.planning import plan as module

    def fake_plan(config):
        rate = 1.0 if "tensor=4" in config.mesh else 2.0
        return module.PlanResult(config, {}, True, 10, fits=config.batch < 12, rows_s=rate)

    monkeypatch.setattr(module, "plan", fake_plan)
    *results, best = plan("--on", "h200x4", "--search", "--batches", "6", "8", "12")
    first_fast = next(result for result in results if result["rows_s"] == 2.0)
    assert best == first_fast | {"fastest": True}
    assert not any("fastest" in result for result in results)

    def batches(mesh):
        configs = [result["config"] for result in results]
        return [config["batch"] for config in configs if config["mesh"] == mesh]

    assert batches("data=1,fsdp=1,tensor=4") == [6, 8, 12]
    assert batches("data=1,fsdp=2,tensor=2") == [6, 8, 12]
    assert batches("data=4,fsdp=1,tensor=1") == [8, 12]
    too_large = plan("--on", "h200x4", "--search", "--batches", "12")
    assert all("fastest" not in result for result in too_large)


def test_a_quantized_checkpoint_is_planned_as_it_is_loaded(plan, tmp_path):
    checkpoint = tmp_path / "small"
    convert(TINY, checkpoint, "jax", quantize="nf4-32-double,embedding=int8")
    abstract = parameters(abstract_model_by_name(str(checkpoint), "bfloat16"))
    loaded = parameters(load_model(checkpoint, "bfloat16"))
    assert abstract.keys() == loaded.keys()
    for path, leaf in loaded.items():
        assert (abstract[path].shape, abstract[path].dtype) == (leaf.shape, leaf.dtype)
    error = plan("--model", checkpoint, "--workload", "finetune", "--on", "h200")
    assert "is quantized and cannot be trained; give --lora" in error


@pytest.mark.thorough
def test_a_mesh_of_four_chips():
    """Each chip stores its part and does its part of the work."""
    command = [sys.executable, "-m", "paligemma_jax", "plan", "--json", "--model", "tiny"]
    command += ["--on", "h200x4", "--estimate", "--text", "8", "--new", "4"]
    command += ["--workload", "finetune", "--batch", "4"]
    results = {}
    for mesh in ("fsdp=4", "data=4"):
        process = subprocess.run(
            [*command, "--mesh", mesh], cwd=ROOT, capture_output=True, text=True, check=True
        )
        results[mesh] = json.loads(process.stdout)
    assert results["fsdp=4"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    replicated, split = (results[mesh]["programs"]["step"] for mesh in ("data=4", "fsdp=4"))
    assert split["argument_bytes"] < 0.35 * replicated["argument_bytes"]
    assert split["flops"] == pytest.approx(replicated["flops"], rel=0.05)
    sent = replicated["sent_bytes"].get("all-gather", 0)
    assert split["sent_bytes"]["all-gather"] > 3 * sent


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--on", "v9:2x2"], "must name a chip"),
        (["--mesh", "rows=2", "--on", "h200"], "data=2,fsdp=4"),
        (["--batch", "-1"], "--batch must be at least 1, got -1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--lora", "4"], "--lora is for --workload finetune"),
        (["--workload", "finetune", "--quantize", "nf4"], "give --lora"),
        (["--on", "h200x64"], "XLA_FLAGS"),
        (["--model", "none", "--on", "h200"], "no such checkpoint"),
        (["--profile", "--on", "h200"], "give --on a TPU slice, such as v5e:2x4"),
        (["--profile", "--estimate"], "without --estimate"),
    ],
)
def test_invalid_requests(plan, arguments, message):
    assert message in plan("--model", "tiny", *arguments)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_the_tpu_compiler(plan):
    assert "pip install 'paligemma-jax[plan]'" in plan("--model", "tiny", "--on", "v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("workload", ["generate", "finetune"])
def test_a_tpu_slice(plan, workload):
    """Compiled with the TPU compiler, which reports the memory of a program that does not fit."""
    arguments = ["--model", "tiny", "--workload", workload, "--on", "v5e:2x2"]
    arguments += ["--mesh", "fsdp=2,tensor=2", "--text", "8", "--new", "4"]
    result = plan(*arguments, "--batch", "4")
    assert result["fits"] and not result["estimate"] and result["chip_bytes"] == 15.75 * 2**30
    if len(jax.devices("cpu")) >= 4:
        estimate = plan(*arguments, "--batch", "4", "--on", "h200x4")
        assert result["flops"] == pytest.approx(estimate["flops"], rel=0.1)
    large = plan(*arguments, "--batch", "40000")
    assert not large["fits"] and large["bytes_per_chip"] > large["chip_bytes"]


@needs_libtpu
def test_the_costliest_operations(plan, command):
    """Their traffic is a part of the program's; all but the compiler's own have a line."""
    arguments = ["--model", "tiny", "--on", "v5e:1x1", "--text", "8", "--new", "4", "--profile"]
    for cost in plan(*arguments)["programs"].values():
        costliest = cost["costliest"]
        assert 5 < len(costliest) <= 10
        assert costliest == sorted(costliest, key=lambda row: -row["seconds"])
        assert sum(row["bytes"] for row in costliest) <= cost["bytes"]
        assert sum(row["cycles"] for row in costliest) <= cost["cycles"]
        assert cost["seconds"] >= cost["min_seconds"]
        lines = [row["line"] for row in costliest if row["name"] != "copy"]
        assert sum(line.startswith("paligemma_jax/") for line in lines) >= len(lines) / 2
    code, out, _ = command("plan", *arguments)
    _, *profiles = out.split("\n\n")
    assert code == 0 and len(profiles) == 3
    for table in profiles:
        assert "model/" in table and max(map(len, table.splitlines())) <= 100


@needs_libtpu
def test_slices_that_exist():
    from paligemma_jax.planning.plan import _find_devices

    for name, count in (("v5e:1x1", 1), ("v6e:1x1", 1), ("v5p:2x2x1", 4)):
        assert len(_find_devices(Slice.parse(name), estimate=False)) == count
    with pytest.raises(ValueError, match="--on v5e:3x3"):
        _find_devices(Slice.parse("v5e:3x3"), estimate=False)
