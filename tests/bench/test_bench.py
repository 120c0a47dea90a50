"""The benchmark: what it counts and prints; random models; decoding copies nothing large."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.bench import generation, report, roofs
from paligemma_jax.bench.config import BenchConfig
from paligemma_jax.checkpoints import synthetic
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.inference import generate
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.inference.scoring import forward
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.flops import decode_bytes, prefill_flops
from paligemma_jax.model.precision import Quantization
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization import quantize

CONFIG = synthetic.with_depth(PaliGemmaConfig.preset("tiny"), 2)


@pytest.fixture
def random_preset(monkeypatch):
    """Let "random" name a tiny model."""
    monkeypatch.setattr(synthetic, "RANDOM_CONFIGS", {"random": CONFIG})


@pytest.fixture
def quick_config(random_preset, monkeypatch):
    """Configs for the tiny random model; the roofs are not measured."""
    monkeypatch.setattr(roofs, "matrix_rate", lambda dtype: 1e10)
    monkeypatch.setattr(roofs, "read_rate", lambda nbytes: 1e9)
    return partial(BenchConfig, model=("random",), new=4, repeats=2)


def token_row(tokens):
    mask = jnp.ones((1, tokens), bool)
    return jnp.ones((1, tokens), jnp.int32), None, mask, mask


@pytest.mark.parametrize("preset", ["tiny", "3b-224", "pg1-3b-224"])
def test_decode_bytes(preset):
    """The bytes are all of the decoder's parameters, plus a cache that grows with rows and
    tokens."""
    config = PaliGemmaConfig.preset(preset)
    model = abstract_model(config)
    weights = sum(a.size for path, a in parameters(model).items() if path.startswith("decoder"))
    assert decode_bytes(config, 0, 1, 2) == 2 * weights
    cache = jax.eval_shape(lambda model: model.prefill(*token_row(10), slots=10), model)[1]
    numbers = sum(leaf.size for leaf in jax.tree.leaves((cache.k, cache.v)))
    assert decode_bytes(config, 10, 3, 2) == 2 * (weights + 3 * numbers)


def test_prefill_flops():
    """XLA counts a little more: activations, norms, softmax."""
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, vocab_size=8000))
    inputs = synthetic.synthetic_inputs(config, 2, 200)
    model = synthetic.random_model(config)
    tokens = inputs.tokens.shape[1]

    def prefill(model, inputs):
        features = model.encode_images(inputs.images)
        return model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, tokens)

    counted = jax.jit(prefill).lower(model, inputs).cost_analysis()["flops"]
    assert 1 < counted / (2 * prefill_flops(config, tokens)) < 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_model(dtype):
    """Random models have the published shapes, a variance of 1 / fan_in, the given dtype, and
    finite logits that differ."""
    model = synthetic.random_model(replace(CONFIG, dtype=dtype))
    values, expected = parameters(model), parameters(abstract_model(CONFIG))
    assert {path: (a.shape, a.dtype.name) for path, a in values.items()} == {
        path: (a.shape, dtype) for path, a in expected.items()
    }
    for path, fan_in in (("attention/q", 160), ("attention/o", 4 * 32), ("mlp/down", 256)):
        kernel = values[f"decoder/layers/1/{path}/kernel"].astype(jnp.float32)
        assert float(kernel.std()) == pytest.approx(fan_in**-0.5, rel=0.05)
    inputs = synthetic.synthetic_inputs(model.config, 2, 5)
    logits = forward(model, inputs)
    assert jnp.isfinite(logits).all() and 0.3 < float(logits.std()) < 4


def test_random_model_warns_of_matrices_that_blocks_do_not_divide():
    """Rows have 160 numbers. Blocks of 128 may span the rows of a matrix, but not those of a table,
    which are looked up one by one."""
    reason = "not quantized, because they cannot be divided into blocks"
    message = rf"^{reason}: decoder/embedder \[\d+, 160\]$"
    with pytest.warns(UserWarning, match=message):
        model = synthetic.random_model(CONFIG, quantization=Quantization.parse("embedding=nf4-128"))
    assert not quantize.weight_formats(model)


def test_report(quick_config):
    """The report has a row for every combination, with consistent rates, and a table."""
    measured = generation.run(
        quick_config(batch=(1, 2), prompt=(3, 8), layers=("stack", "list"), cached=(20, 40))
    )
    rows, cached = measured["rows"], measured["cached"]
    assert [(row["layers"], row["batch"], row["prompt_tokens"]) for row in rows] == [
        (layers, batch, 64 + text)
        for layers in ("list", "stack")
        for batch in (1, 2)
        for text in (3, 8)
    ]
    assert [(row["layers"], row["batch"], row["cached_tokens"]) for row in cached] == [
        (layers, batch, tokens)
        for layers in ("list", "stack")
        for batch in (1, 2)
        for tokens in (20, 40)
    ]
    for row in rows:
        batch, tokens = row["batch"], row["prompt_tokens"]
        first, speed = row["first_token_s"], row["prefill_tokens_s"]
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert speed["max"] == pytest.approx(batch * tokens / first["min"])
        share = batch * prefill_flops(CONFIG, tokens) / first["median"] / 1e10
        assert row["matrix_share"] == pytest.approx(share)
        assert row["bandwidth_share"] == pytest.approx(row["bytes_s"] / 1e9)
        assert set(row["compile_s"]) == {"encode", "prefill", "decode"}
        assert row["memory_bytes"] > 2e6 and "slower" not in row
    text = report.table(json.loads(json.dumps(measured)))
    assert text.startswith(f"cpu, {os.cpu_count()} cores, float32; jax {jax.__version__}\n")
    assert len([line for line in text.splitlines() if line.startswith("random")]) == 16


def test_against_transformers(quick_config):
    """The same weights give the same logits, and ratios are those of the times."""
    torch = pytest.importorskip("torch")
    from paligemma_jax.bench.contender import transformers_model

    model = synthetic.random_model(CONFIG)
    inputs = synthetic.synthetic_inputs(CONFIG, 2, 5)
    tokens = torch.from_numpy(inputs.tokens).long()
    with torch.no_grad():
        logits = transformers_model(model)(
            input_ids=tokens,
            pixel_values=torch.from_numpy(np.moveaxis(inputs.images, 3, 1).copy()),
            attention_mask=torch.ones_like(tokens),
            token_type_ids=torch.zeros_like(tokens),
        ).logits
    np.testing.assert_allclose(forward(model, inputs), logits, atol=1e-4)
    ours, theirs = generation.run(quick_config(against=("transformers",), repeats=1))["rows"]
    assert (ours["by"], theirs["by"]) == ("paligemma-jax", "transformers")

    def ratio(name, a, b):
        return a[name]["median"] / b[name]["median"]

    slower = theirs["slower"]
    assert slower["decode"] == pytest.approx(ratio("decode_tokens_s", ours, theirs))
    assert slower["prefill"] == pytest.approx(ratio("first_token_s", theirs, ours))


@pytest.mark.slow  # compiles for a minute
def test_compiled_transformers_gives_the_tokens_of_eager(monkeypatch):
    """Images and texts differ, so that the rows and their tokens do."""
    torch = pytest.importorskip("torch")
    from paligemma_jax.bench import contender

    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # compiling sets it
    model = synthetic.model_by_name("tiny", "float32")
    inputs = synthetic.synthetic_inputs(model.config, 3, 5)
    theirs = contender.transformers_model(model)
    with torch.no_grad():
        expected = theirs.generate(
            **contender.torch_batch(theirs, inputs), min_new_tokens=12, max_new_tokens=12
        )[:, inputs.tokens.shape[1] :]
    decode = contender.compiled_decoding(theirs, inputs, 12)
    for _ in range(2):  # the second time, the cache is not new
        np.testing.assert_array_equal(torch.cat(list(decode()), dim=1), expected)
    assert len(np.unique(expected)) > 1


def test_chart(quick_config, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    measured = generation.run(quick_config(layers=("list", "stack")))
    report.chart(measured, str(tmp_path / "speed.png"))
    with Image.open(tmp_path / "speed.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(2**24) or ()) > 5


def test_command(command, quick_config):
    options = ["--model", "random", "--new", 3, "--repeats", 1, "--depth", 2, "--json"]
    code, out, _ = command("bench", *options)
    row = json.loads(out)["rows"][0]
    assert code == 0 and row["new_tokens"] == 3 and row["model"] == "random"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--batch", 0), "--batch must be at least 1, got 0"),
        (("--new", 1), "--new must be at least 2, got 1"),
        (("--model", "4b-224"), "no such checkpoint"),
        (("--attention", "plain", "fused"), "attention must be plain on a CPU, got fused"),
    ],
)
def test_invalid_arguments(command, quick_config, arguments, message):
    code, out, err = command("bench", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_depth_requires_random_weights(command, quick_config):
    code, _, err = command("bench", "--model", "tiny", "--depth", 2)
    assert code == 2 and "random weights" in err


def test_unknown_dtype(command):
    code, _, error = command("bench", "--dtype", "int3")
    message = "dtype must be one of float32, bfloat16, float16, got 'int3'"
    assert code == 2 and error == f"paligemma-jax: {message}\n"


def test_no_share_is_above_the_roof(random_preset):
    """A model that fits into a cache is held against the cache."""
    config = BenchConfig(model=("random",), new=16, repeats=2, cached=(100,))
    measured = generation.run(config)
    (row,), (cached,) = measured["rows"], measured["cached"]
    assert 1e9 < row["matrix_flops_s"] < 1e16 and 0 < row["matrix_share"] < 1
    for each in (row, cached):
        assert 1e8 < each["read_bytes_s"] < 1e14 and 0 < each["bandwidth_share"] < 1


def test_a_disturbance_lowers_no_roof():
    """Reading a smaller array is at least as fast as reading a larger one."""
    sizes, rates = (4, 2, 8), (10.0, 9.0, 7.0)
    rows = [
        {"step_bytes": size, "bytes_s": 5.0, "read_bytes_s": rate}
        for size, rate in zip(sizes, rates, strict=True)
    ]
    rows.append({"flops_s": 1.0, "matrix_flops_s": 2.0, "matrix_dtype": "float32"})
    roofs.add_shares(rows)
    assert [row.get("read_bytes_s") for row in rows] == [10.0, 10.0, 7.0, None]
    assert rows[2]["bandwidth_share"] == 5 / 7 and rows[3]["matrix_share"] == 0.5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads programs of the CPU compiler")
@pytest.mark.parametrize("rows", [1, 4])
def test_decoding_copies_neither_cache_nor_weights(rows):
    """The temporaries of the loop are smaller than the cache of a layer, and no matrix is copied to
    another layout."""
    model, slots = synthetic.random_model(CONFIG), 4000
    request = make_request(model, rows)
    inputs = replace(synthetic.synthetic_inputs(CONFIG, rows, 8), images=None)
    prefill = partial(generate.prefill, slots=slots, sampler=Greedy())
    state = jax.eval_shape(prefill, model, inputs, None, request)
    options = dict(size=7, sampler=Greedy())
    program = generate.decode.lower(model, state, request, jnp.int32(8), **options).compile()
    heads, head_dim, _ = parameters(model)["decoder/layers/0/attention/k/kernel"].shape
    cache_bytes = 4 * rows * slots * heads * head_dim
    assert program.memory_analysis().temp_size_in_bytes < 0.75 * cache_bytes
    shapes = {f"[{','.join(axes)}]" for axes in permutations(("160", "4", "32"))}
    shapes |= {"[160,128]", "[128,160]", f"{slots},2,32]"}
    copies = [line for line in program.as_text().splitlines() if " copy(" in line]
    assert not [line for line in copies if any(shape in line for shape in shapes)]


@pytest.mark.slow
def test_training_steps(random_preset, command):
    """Steps of all weights, LoRA and QLoRA. Compiling alone reports the same memory."""
    options = ["bench", "--model", "random", "--new", 8, "--remat", "full", "--json", "--train"]
    _, out, _ = command(*options, "all", "lora", "qlora", "--repeats", 1)
    rows = json.loads(out)["training"]
    full, lora, qlora = rows
    assert [row["train"] for row in rows] == ["all", "lora", "qlora"]
    assert all(row["tokens_s"]["median"] > 0 and 0 < row["matrix_share"] < 1 for row in rows)
    assert qlora["argument_bytes"] < lora["argument_bytes"] < 0.5 * full["argument_bytes"]
    assert lora["flops"] == qlora["flops"] < full["flops"]
    compiled = json.loads(command(*options, "qlora", "--repeats", 0)[1])
    assert compiled["training"][0]["memory_bytes"] == qlora["memory_bytes"]
    text = report.table(compiled)
    assert "qlora" in text and max(map(len, text.splitlines())) < 140


@pytest.mark.slow
def test_training_against_transformers(command):
    pytest.importorskip("peft", reason="transformers needs peft for LoRA: install the extra test")
    options = ["--train", "lora", "--model", "tiny", "--new", 4, "--repeats", 1, "--json"]
    code, out, error = command("bench", *options, "--against", "transformers")
    assert code == 0, error
    ours, theirs = json.loads(out)["training"]
    ratio = theirs["step_s"]["median"] / ours["step_s"]["median"]
    assert theirs["by"] == "transformers" and theirs["slower"] == pytest.approx(ratio)
