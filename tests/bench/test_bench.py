"""The measuring instrument: what it counts, what it makes up, what it prints; and that decoding moves no more than it must."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.bench import generation, report
from paligemma_jax.checkpoints import synthetic
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.inference import generate
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.flops import decode_bytes, prefill_flops
from paligemma_jax.model.precision import Quantization
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization import quantize

CONFIG = synthetic.with_depth(PaliGemmaConfig.preset("tiny"), 2)
MACHINE = {"device": "cpu", "platform": "cpu", "cores": 2, "dtype": "float32", "jax": "0", "copy_bytes_s": 1e9, "matrix_flops_s": 1e10}


@pytest.fixture
def fast(monkeypatch):
    """Tiny random models, and no time spent on measuring the machine."""
    monkeypatch.setattr(synthetic, "RANDOM_CONFIGS", {"random": CONFIG})
    monkeypatch.setattr(generation, "measure_machine", lambda dtype: dict(MACHINE))
    return partial(generation.BenchConfig, model=("random",), new=4, repeats=2)


@pytest.mark.parametrize("preset", ["tiny", "3b-224", "pg1-3b-224"])
def test_bytes(preset):
    """The decoder's parameters to the last one, and a cache that grows by the row and by the token."""
    config = PaliGemmaConfig.preset(preset)
    weights = sum(leaf.size for path, leaf in parameters(abstract_model(config)).items() if path.startswith("decoder"))
    assert decode_bytes(config, 0, 1, 2) == 2 * weights
    cache = jax.eval_shape(lambda model: model.prefill(*_row(10), slots=10), abstract_model(config))[1]
    assert decode_bytes(config, 10, 3, 2) == 2 * (weights + 3 * sum(leaf.size for leaf in jax.tree.leaves((cache.k, cache.v))))


def test_flops():
    """XLA counts a little more: activations, norms, softmax."""
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, vocab_size=8000))
    inputs = synthetic.synthetic_inputs(config, 2, 200)
    model = synthetic.random_model(config)

    def prefill(model, inputs):
        return model.prefill(inputs.tokens, model.encode_images(inputs.images), inputs.valid, inputs.prefix, inputs.tokens.shape[1])

    counted = jax.jit(prefill).lower(model, inputs).cost_analysis()["flops"]
    assert 1 < counted / (2 * prefill_flops(config, inputs.tokens.shape[1])) < 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_model(dtype):
    """The published shapes, a variance of 1 / fan_in, the asked dtype, finite logits that are not all alike."""
    model = synthetic.random_model(replace(CONFIG, dtype=dtype))
    found, expected = parameters(model), parameters(abstract_model(CONFIG))
    assert {path: (a.shape, a.dtype.name) for path, a in found.items()} == {path: (a.shape, dtype) for path, a in expected.items()}
    for path, fan_in in (("attention/q", 160), ("attention/o", 4 * 32), ("mlp/down", 256)):
        assert float(found[f"decoder/layers/1/{path}/kernel"].astype(jnp.float32).std()) == pytest.approx(fan_in**-0.5, rel=0.05)
    inputs = synthetic.synthetic_inputs(model.config, 2, 5)
    logits = model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    assert jnp.isfinite(logits).all() and 0.3 < float(logits.std()) < 4


def test_a_random_model_tells_what_blocks_do_not_divide():
    """Of 160 numbers a row, blocks of 128 may run over the ends of a matrix's rows, not of a table's, which are looked up one by one."""
    with pytest.warns(UserWarning, match=r"^not quantized, since blocks do not divide them: decoder/embedder \[\d+, 160\]$"):
        model = synthetic.random_model(CONFIG, quantization=Quantization.parse("embedding=nf4-128"))
    assert not quantize.weight_formats(model)


def test_report(fast):
    """A row for every combination; twice the share of the machine is twice the speed; a table of lines that start alike."""
    report = generation.run(fast(batch=(1, 2), prompt=(3, 8), layers=("stack", "list"), cached=(20, 40)))
    assert [(row["layers"], row["batch"], row["prompt_tokens"]) for row in report["rows"]] == [
        (form, batch, 64 + text) for form in ("list", "stack") for batch in (1, 2) for text in (3, 8)
    ]
    assert [(row["layers"], row["batch"], row["cached_tokens"]) for row in report["cached"]] == [
        (form, batch, cached) for form in ("list", "stack") for batch in (1, 2) for cached in (20, 40)
    ]
    for row in report["rows"]:
        first, speed = row["first_token_s"], row["prefill_tokens_s"]
        assert speed["min"] <= speed["median"] <= speed["max"] == pytest.approx(row["batch"] * row["prompt_tokens"] / first["min"])
        assert row["matrix_share"] == pytest.approx(row["batch"] * prefill_flops(CONFIG, row["prompt_tokens"]) / first["median"] / 1e10)
        assert set(row["compile_s"]) == {"encode", "prefill", "decode"} and row["memory_bytes"] > 2e6 and "slower" not in row
    text = report.table(json.loads(json.dumps(report)))
    assert text.startswith("cpu, 2 cores, float32: copies 1 GB/s, multiplies 0.01 TFLOP/s")
    assert len([line for line in text.splitlines() if line.startswith("random")]) == 16


def test_against_transformers(fast):
    """The same weights: the same logits. Then both are timed, and the ratio is that of the neighbours."""
    torch = pytest.importorskip("torch")
    from paligemma_jax.bench.contender import transformers_model

    model = synthetic.random_model(CONFIG)
    inputs = synthetic.synthetic_inputs(CONFIG, 2, 5)
    tokens, pixels = torch.from_numpy(inputs.tokens).long(), torch.from_numpy(np.moveaxis(inputs.images, 3, 1).copy())
    with torch.no_grad():
        copy = transformers_model(model)
        logits = copy(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens), token_type_ids=torch.zeros_like(tokens)).logits
    np.testing.assert_allclose(model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix), logits, atol=1e-4)
    ours, theirs = generation.run(fast(against=("transformers",), repeats=1))["rows"]
    assert (ours["by"], theirs["by"]) == ("paligemma-jax", "transformers")
    assert theirs["slower"]["decode"] == pytest.approx(ours["decode_tokens_s"]["median"] / theirs["decode_tokens_s"]["median"])
    assert theirs["slower"]["prefill"] == pytest.approx(theirs["first_token_s"]["median"] / ours["first_token_s"]["median"])


def test_chart(fast, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    report.chart(generation.run(fast(layers=("list", "stack"))), str(tmp_path / "speed.png"))
    with Image.open(tmp_path / "speed.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(2**24) or ()) > 5


def test_command(command, fast):
    code, out, _ = command("bench", "--model", "random", "--new", 3, "--repeats", 1, "--depth", 2, "--json")
    report = json.loads(out)
    assert code == 0 and report["rows"][0]["new_tokens"] == 3 and report["rows"][0]["model"] == "random"
    for wrong, told in ((("--batch", 0), "at least 1"), (("--new", 1), "at least 2"), (("--model", "4b-224"), "no such checkpoint")):
        code, out, err = command("bench", *wrong)
        assert (code, out) == (2, "") and told in err and err.count("\n") == 1
    code, _, err = command("bench", "--model", "tiny", "--depth", 2)
    assert code == 2 and "random weights" in err


def test_machine():
    machine = generation.measure_machine("float32")
    assert 1e8 < machine["copy_bytes_s"] < 1e14 and 1e9 < machine["matrix_flops_s"] < 1e16


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what the CPU compiler made")
@pytest.mark.parametrize("rows", [1, 4])
def test_decoding_copies_neither_cache_nor_weights(rows):
    """What the loop holds beside its arguments is smaller than the cache of one layer, and no matrix is laid out anew."""
    model, slots = synthetic.random_model(CONFIG), 4000
    request, inputs = make_request(model, rows), synthetic.synthetic_inputs(CONFIG, rows, 8)
    state = jax.eval_shape(partial(generate.prefill, slots=slots, sampler=Greedy()), model, replace(inputs, images=None), None, request)
    program = generate.decode.lower(model, state, request, jnp.int32(8), size=7, sampler=Greedy()).compile()
    layer = parameters(model)["decoder/layers/0/attention/k/kernel"]
    assert program.memory_analysis().temp_size_in_bytes < 0.75 * 4 * rows * slots * layer.shape[0] * layer.shape[1]
    kernel_o = {f"[{','.join(axes)}]" for axes in permutations(("160", "4", "32"))} | {"[160,128]", "[128,160]"}
    copied = [line for line in program.as_text().splitlines() if " copy(" in line and any(s in line for s in {*kernel_o, f"{slots},2,32]"})]
    assert not copied


def _row(tokens):
    yes = jnp.ones((1, tokens), bool)
    return jnp.ones((1, tokens), jnp.int32), None, yes, yes


def test_an_unknown_dtype_is_told(command):
    code, _, error = command("bench", "--dtype", "int3")
    assert code == 2 and error == "paligemma-jax: unknown dtype 'int3'; there are float32, bfloat16, float16\n"


def test_training_steps(fast, command):
    """A step of all weights, of LoRA and of QLoRA: measured, and compiled only, which tells the same memory."""
    options = ["bench", "--model", "random", "--new", 8, "--remat", "full", "--json", "--train"]
    rows = json.loads(command(*options, "all", "lora", "qlora", "--repeats", 1)[1])["training"]
    full, low, small = rows
    assert [row["train"] for row in rows] == ["all", "lora", "qlora"] and all(row["tokens_s"]["median"] > 0 for row in rows)
    assert small["argument_bytes"] < low["argument_bytes"] < 0.5 * full["argument_bytes"]
    assert low["flops"] == small["flops"] < full["flops"] and all(0 < row["mfu"] < 1 for row in rows)
    compiled = json.loads(command(*options, "qlora", "--repeats", 0)[1])
    assert compiled["training"][0]["memory_bytes"] == small["memory_bytes"]
    text = report.table(compiled)
    assert "qlora" in text and max(map(len, text.splitlines())) < 140


def test_training_against_transformers(command):
    pytest.importorskip("peft", reason="the contender is transformers with peft: install the extra test")
    code, out, error = command("bench", "--train", "lora", "--model", "tiny", "--new", 4, "--repeats", 1, "--against", "transformers", "--json")
    assert code == 0, error
    ours, theirs = json.loads(out)["training"]
    assert theirs["by"] == "transformers" and theirs["slower"] == pytest.approx(theirs["step_s"]["median"] / ours["step_s"]["median"])
