"""Continuous batching with LoRA adapters: the answers are those of each adapter loaded alone."""

from __future__ import annotations

import random
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from support.engines import alone, assert_same, run
from support.photos import crops
from support.tiny_adapters import random_factors, save_adapters

import paligemma_jax as pg
from convert import peft
from paligemma_jax.inference import decoding, generate, slots
from paligemma_jax.inference.adapters import Adapters, open_adapters
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.row_adapters import RowLoRALinear, add_adapters
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.tree import modules
from paligemma_jax.quantization.modules import QuantizedLinear

TASKS = ["ocr", "detect 3", "caption en"]
SAMPLERS = [pg.Greedy(), pg.Sample(), pg.BestOf(2)]
NAMES = [None, "qv", "mlp", "vision"]
SIZE = dict(rows=4, slots=160)  # of all engines, so that they share programs


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def directories(tiny, tmp_path_factory):
    return save_adapters(tiny.model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def photos():
    return crops(3)


def make_requests(processor, photos, count, samplers, names):
    """(prompt, options, seed, adapter): the adapters in any order, with few images."""
    rng = np.random.default_rng(0)
    images = [[photos[i % 3]] for i in range(count)]
    prompts = processor.encode(images, [TASKS[i // 3 % 3] for i in range(count)])
    options = [
        DecodingOptions(int(rng.integers(1, 20)), samplers[i % len(samplers)]) for i in range(count)
    ]
    chosen = [names[i % len(names)] for i in rng.permutation(count)]
    return list(zip(prompts, options, range(count), chosen, strict=True))


def in_groups(requests):
    """The requests in groups of random sizes."""
    sizes, groups = random.Random(1), []
    while requests:
        size = sizes.randrange(5)
        groups.append(requests[:size])
        requests = requests[size:]
    return groups


def has_images(batch):
    caches = batch._admission.images.values()
    return any(images.encoded or images.opened for images in caches)


@pytest.mark.parametrize(
    ("layers", "quantize", "count", "samplers", "names"),
    [("list", None, 32, SAMPLERS, NAMES), ("stack", "int8", 6, SAMPLERS[:1], [None, "vision"])],
    ids=["list", "stack of int8"],
)
@pytest.mark.thorough
def test_answers_are_those_of_each_adapter_alone(
    directories, photos, layers, quantize, count, samplers, names
):
    predictors = {name: pg.load(directories[name], quantize=quantize) for name in names[1:]}
    base = predictors[None] = pg.load("tiny", layers=layers, quantize=quantize)
    requests = make_requests(base.processor, photos, count, samplers, names)
    with Engine(base.model, base.processor, **SIZE, adapters=directories) as batch:
        answers = run(batch, in_groups(requests))
    changed = set()
    for (prompt, options, seed, name), answer in zip(requests, answers, strict=True):
        assert_same(answer, alone(predictors[name], prompt, options, seed))
        if answer.text != alone(base, prompt, options, seed).text:
            changed.add(name)
    assert changed == {*names[1:]}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_rows_of_the_base_are_those_of_the_base_to_the_bit(directories, quantize):
    model = pg.load("tiny", quantize=quantize).model
    adapters = open_adapters(directories, model.config)
    adapted = modules(add_adapters(model, adapters), RowLoRALinear)
    plain = modules(model, (Linear, QuantizedLinear))
    rng, rows = np.random.default_rng(0), np.array([0, 1, 0, 2, 3])
    layers = {"attention/q": 1, "mlp/down": 2, "attention/o": 3}
    numbers = {f"decoder/layers/2/{path}": number for path, number in layers.items()}
    for path, number in (numbers | {"projector": 3}).items():
        base, is_adapted = plain[path], rows == number
        x = jnp.asarray(rng.normal(size=(5, 3, *base.shape[-base.contracted :])), jnp.float32)
        ours, theirs = np.asarray(adapted[path].for_rows(jnp.array(rows))(x)), np.asarray(base(x))
        np.testing.assert_array_equal(ours[~is_adapted], theirs[~is_adapted])
        assert np.abs(ours - theirs)[is_adapted].max() > 0.1
        np.testing.assert_array_equal(adapted[path](x), theirs)


def test_images_are_encoded_once_unless_an_adapter_changes_their_features(
    tiny, directories, photos, monkeypatch
):
    def count(names):
        encoded, encode = [], generate.encode_images

        def recording(model, pixels, edits):
            encoded.append(len(pixels))
            return encode(model, pixels, edits)

        monkeypatch.setattr("paligemma_jax.inference.batching.encode_images", recording)
        (prompt,) = tiny.processor.encode([[photos[0]]], ["ocr"])
        requests = [(prompt, DecodingOptions(2), 0, name) for name in names]
        with Engine(tiny.model, tiny.processor, **SIZE, adapters=directories) as batch:
            run(batch, [requests])
            assert not any(
                images.encoded or images.opened for images in batch._admission.images.values()
            )
        return sum(encoded)

    assert count([None, "qv", "mlp", "qv"]) == 1
    assert count([None, "qv", "vision", "vision"]) == 2


def test_another_adapter_compiles_nothing(tiny, directories, photos):
    programs = [slots.insert, slots.advance, decoding.prefill, generate.encode_images]
    requests = make_requests(tiny.processor, photos, 8, SAMPLERS[:2], [None])
    with Engine(tiny.model, tiny.processor, **SIZE, adapters=directories) as batch:
        run(batch, [[request] for request in requests])
        before = [program._cache_size() for program in programs]
        run(batch, [[(*request[:3], name)] for request in requests for name in NAMES[1:]])
        assert [program._cache_size() for program in programs] == before


def save(tmp_path, tiny, **parts):
    factors = parts.pop("factors", random_factors(tiny.model, "qv"))
    peft.save_adapter(tmp_path / "other", factors, tiny.config, "tiny", **parts)
    return tmp_path / "other"


def with_magnitudes(factors):
    return {p: replace(f, magnitude=np.ones(f.b.shape[:-1], "f")) for p, f in factors.items()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t, f: save(t, f, factors={}, soft_prompt=np.ones((2, 160), "f")), "a soft prompt"),
        (
            lambda t, f: save(t, f, factors={}, prefix=np.ones((2, 4, 2, 2, 32), "f")),
            "LoRA alone, but 'x' has a prefix: load it as a model of its own",
        ),
        (
            lambda t, f: save(t, f, parameters={"decoder/norm/scale": np.ones(160, "f")}),
            r"trained parameters \(decoder/norm/scale\)",
        ),
        (
            lambda t, f: save(t, f, factors=with_magnitudes(random_factors(f.model, "qv"))),
            r"magnitudes \(DoRA\)",
        ),
        (lambda t, f: "tiny", r"must be a directory with adapter_config.json, got tiny"),
        (lambda t, f: t / "nothing", "no such checkpoint: .*nothing"),
    ],
    ids=["soft prompt", "prefix", "parameters", "dora", "model", "missing"],
)
def test_what_rows_cannot_have_is_refused(tiny, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        open_adapters({"x": make(tmp_path, tiny)}, tiny.config)


def test_an_adapter_of_another_base_is_refused_with_its_shapes(tiny, directories):
    decoder = replace(tiny.config.decoder, hidden_size=96)
    with pytest.raises(ValueError, match=r"F32 \[2, 160\], which does not fit decoder.*\[128, 96"):
        open_adapters(directories, replace(tiny.config, decoder=decoder))
    factors = random_factors(tiny.model, "qv")
    path, f = next(iter(factors.items()))
    wrong = [
        ({path: replace(f, a=f.a[:, :96])}, rf"\[160\] to .* for {path}, got \[96\] to"),
        ({"decoder/layers/4/attention/q": f}, "no linear layer there: give the base"),
        ({path: replace(f, b=f.b * np.inf)}, f"finite factors in float32 for {path}"),
    ]
    for adapter, message in wrong:
        with pytest.raises(ValueError, match=f"the adapter 'x' .*{message}"):
            Engine(tiny.model, tiny.processor, 2, 64, adapters={"x": adapter})


def test_an_unknown_adapter_is_refused_with_the_names(tiny, directories):
    (prompt,) = tiny.processor.encode([None], ["ocr"])
    with Engine(tiny.model, tiny.processor, **SIZE, adapters=directories) as batch:
        with pytest.raises(ValueError, match="or one of 'qv', 'mlp', 'vision', got 'ocr'"):
            batch.submit(prompt, DecodingOptions(max_new_tokens=2), adapter="ocr")
        assert not batch.waiting
    with pytest.raises(ValueError, match="got 'qv': this engine was made without adapters"):
        Adapters(tiny.model, {}).number("qv")


def test_a_cancelled_request_frees_the_images_of_its_adapter(tiny, directories, photos):
    prompts = tiny.processor.encode([[photos[0]]] * 6, ["ocr"] * 6)
    options = DecodingOptions(max_new_tokens=20, min_new_tokens=20)
    with Engine(tiny.model, tiny.processor, **SIZE, adapters=directories) as batch:
        numbers = [batch.submit(prompt, options, adapter="vision") for prompt in prompts]
        answers = batch.step()
        batch.cancel(numbers[5])
        for new in batch.answers():
            answers |= new
        assert sorted(answers) == numbers[:5]
        assert not any(
            images.encoded or images.opened for images in batch._admission.images.values()
        )
