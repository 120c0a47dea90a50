"""`collect_stages` reads and replaces intermediate results, or raises; nothing is left over."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.refusals import predictor as golden_predictor
from support.toys import batch

import paligemma_jax as pg
from paligemma_jax.inference import scoring
from paligemma_jax.inference.generate import generate
from paligemma_jax.inference.sampling import Beam
from paligemma_jax.model import attention
from paligemma_jax.model.masks import token_span
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import remat, stack_layers
from paligemma_jax.model.stages import collect_stages, scope, stage
from paligemma_jax.model.tree import copy_tree

LAYER = "decoder/layers/1"
WEIGHTS = f"{LAYER}/attention/weights"


@pytest.fixture(scope="module")
def predictor():
    """Three layers in the decoder, two in the image encoder."""
    model = copy_tree(golden_predictor().model)
    model.decoder.layers = nnx.List(list(model.decoder.layers)[:3])
    model.vision.layers = nnx.List(list(model.vision.layers)[:2])
    return replace(golden_predictor(), model=model)


@pytest.fixture(scope="module")
def model(predictor):
    return predictor.model


@pytest.fixture(scope="module")
def inputs(model):
    return jax.tree.map(jnp.asarray, batch(model))


@pytest.fixture(scope="module")
def stages(model, inputs):
    """All stages without an intervention."""
    return scoring.forward_stages(model, inputs, attention=True, branches=True)


@pytest.fixture(scope="module")
def short(stages):
    """The arguments of a decoder for 8 tokens: much cheaper than a complete pass."""
    valid = jnp.ones((2, 8), bool)
    return stages["decoder/embeddings"][:, :8], token_span(valid, valid, 0)


def collected(function, *args, fed=None, **options):
    """function(*args), compiled, and its stages."""

    @jax.jit
    def run(args, fed):
        with collect_stages(fed=fed, **options) as stages:
            result = function(*args)
        return result, stages

    return run(args, fed or {})


# what is fed counts


def test_a_fed_stage_replaces_the_models_own(predictor, inputs, stages):
    """Stages before it do not change, its own value is still collected, and the next layer starts
    from zeros: only its branches are left."""
    fed = {LAYER: np.zeros(stages[LAYER].shape)}
    changed = predictor.stages(inputs, branches=True, fed=fed)
    np.testing.assert_allclose(changed[LAYER], stages[LAYER], atol=1e-4)
    branches = [changed[f"decoder/layers/2/{name}/output"] for name in ("attention", "mlp")]
    np.testing.assert_allclose(changed["decoder/layers/2"], sum(branches), atol=1e-6)
    assert np.abs(changed["logits"] - stages["logits"]).max() > 0.1


def test_fed_attention_weights_and_branches_need_no_flag(predictor, inputs, stages):
    """Weights of zero leave what the output projection makes of zeros; a branch of zero leaves
    nothing."""
    names = [f"{tower}/layers/1/attention/weights" for tower in ("vision", "decoder")]
    names += ["vision/layers/0/mlp/output", "decoder/layers/2/mlp/output"]
    fed = {name: np.zeros(stages[name].shape) for name in names}
    changed = predictor.stages(inputs, fed=fed)
    assert {name for name in changed if "attention" in name or "mlp" in name} == {*names}
    assert {*changed} - {*names} == {
        name for name in stages if not name.endswith(("weights", "attention/output", "mlp/output"))
    }
    layers = {name: changed[name] for name in changed if name[-1].isdigit()}
    expected = predictor.stages(inputs, branches=True, fed=fed)
    for tower, bias in (
        ("vision", predictor.model.vision.layers[1].attention.o.bias),
        ("decoder", 0),
    ):
        added = expected[f"{tower}/layers/1/attention/output"]
        np.testing.assert_allclose(added, np.broadcast_to(bias, added.shape), atol=1e-6)
    for name, value in layers.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4)
    before = expected["vision/embeddings"] + expected["vision/layers/0/attention/output"]
    np.testing.assert_allclose(layers["vision/layers/0"], before, atol=1e-5)
    before = expected["decoder/layers/1"] + expected["decoder/layers/2/attention/output"]
    np.testing.assert_allclose(layers["decoder/layers/2"], before, atol=1e-5)


def test_fed_attention_weights_of_long_inputs(model, stages, monkeypatch):
    """Queries of this layer run in one chunk; other layers keep their chunks."""
    monkeypatch.setattr(attention, "CHUNK", 8)
    x, valid = stages["decoder/embeddings"][:, :20], jnp.ones((2, 20), bool)
    fed = {WEIGHTS: stages[WEIGHTS][:, :, :20, :20] * 0}
    span = token_span(valid, valid, 0)
    _, changed = collected(model.decoder, x, span, fed=fed, branches=True)
    assert not changed[f"{LAYER}/attention/output"].any()
    assert [name for name in changed if name.endswith("/weights")] == [WEIGHTS]


def test_stacked_layers_have_their_own_stages(model, short):
    name = f"{LAYER}/attention/output"
    fed = {name: jnp.zeros_like(short[0])}
    stacked = copy_tree(model.decoder)
    stacked.layers = stack_layers(stacked.layers)
    _, expected = collected(model.decoder, *short, fed=fed, branches=True)
    _, actual = collected(stacked, *short, fed=fed, branches=True)
    assert actual.keys() == expected.keys() and len(expected) == 3 * 3 + 1
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, atol=1e-5, err_msg=key)
    unchanged = np.asarray(model.decoder(*short)[0])
    assert np.abs(unchanged - actual["decoder/norm"]).max() > 0.1


def test_generation_step_by_step(model, inputs, stages):
    """`encode_images`, `prefill` and `decode_step` name their stages as the complete pass does, and
    their values are the same."""
    start = model.config.vision.num_patches + 4
    prompt = [a[:1, :start] for a in (inputs.tokens, inputs.valid, inputs.prefix)]
    features, images = collected(PaliGemma.encode_images, model, inputs.images[:1])

    def prefill(model, features, tokens, valid, prefix):
        return model.prefill(tokens, features, valid, prefix, slots=start + 2)

    (_, cache), first = collected(prefill, model, features, *prompt)
    step = partial(collected, PaliGemma.decode_step, model, inputs.tokens[:1, start], cache)
    _, second = step(attention=True)
    branches = ("attention/output", "mlp/output")
    names = [name for name in stages if not name.endswith((*branches, "weights"))]
    assert [*images, *first] == names
    assert [name for name in second if not name.endswith("weights")] == [*first]
    for name, value in second.items():
        expected = stages[name][:1]
        if name.endswith("weights"):
            expected = expected[:, :, start : start + 1, : start + 1]
            assert not value[..., start + 1 :].any()
            value = value[..., : start + 1]
        else:
            expected = expected[:, start].reshape(value.shape)
        np.testing.assert_allclose(value, expected, atol=2e-4, err_msg=name)
    _, changed = step(branches=True, fed={WEIGHTS: jnp.zeros_like(second[WEIGHTS])})
    assert not changed[f"{LAYER}/attention/output"].any()


def test_gradients_pass_through_a_block(model, short):
    """Inside the differentiated function a block works, also where layers would be recomputed."""

    @jax.jit
    @jax.grad
    def gradient(fed):
        with collect_stages(fed=fed) as stages, remat("full"):
            model.decoder(*short)
        return stages["decoder/norm"].sum()

    assert gradient({LAYER: short[0]})[LAYER].any()


# what would not count is an error


def toy(x):
    """A model with the names of a decoder of three layers."""
    with scope("decoder"):
        x = stage("embeddings", x)
        for i in range(3):
            with scope(f"layers/{i}"):
                with scope("attention"):
                    x = stage("weights", x + 1, "attention")
                    x = stage("output", x, "branch")
                x = stage("", x)
    return x.sum()


ONES = jnp.ones((2, 8))


@pytest.mark.parametrize(
    "name, near",
    [
        ("decoder/layer/1", LAYER),
        ("layers/1", LAYER),
        (f"{LAYER}/attention/outputs", f"{LAYER}/attention/output"),
        (f"{LAYER}/attention/weight", WEIGHTS),
        ("decoder/layers/99", "decoder/layers/"),
        ("x", "decoder/embeddings"),
    ],
)
def test_a_misspelt_stage_is_refused(name, near):
    message = f"fed must name stages that the block computes, got '{name}'; near it: .*{near}"
    with pytest.raises(ValueError, match=message), collect_stages(fed={name: ONES}):
        toy(ONES)
    with pytest.raises(ValueError, match=message):
        collected(toy, ONES, fed={name: ONES})


@pytest.mark.parametrize("shape", [(), (2, 1, 1), (2, 265, 32)])
def test_another_shape_is_refused(predictor, inputs, stages, shape):
    expected = str(list(stages[LAYER].shape))
    with pytest.raises(ValueError) as error:
        predictor.stages(inputs, fed={LAYER: np.zeros(shape)})
    assert str(error.value) == f"the value fed for {LAYER} must be {expected}, got {list(shape)}"


def test_generation_refuses_to_run_inside_a_block(model, inputs, stages):
    """Whether or not its programs are compiled. Afterwards it gives what it gave before."""
    prompt = replace(inputs, valid=inputs.prefix, targets=inputs.targets & False)
    compiled = pg.DecodingOptions(4)
    before = generate(model, prompt, compiled)
    longer, beam = pg.DecodingOptions(40), pg.DecodingOptions(4, Beam(2))
    for options in (compiled, longer, beam):
        for features in (None, stages["projector"]):
            with (
                pytest.raises(ValueError, match=r"is a compiled program .* call model\(\.\.\.\)"),
                collect_stages(fed={LAYER: stages[LAYER] * 0}),
            ):
                generate(model, prompt, options, features=features)
    after = generate(model, prompt, compiled)
    np.testing.assert_array_equal(before.log_probabilities, after.log_probabilities)


TRANSFORMS = {
    "jit": jax.jit,
    "grad": jax.grad,
    "vmap": jax.vmap,
    "scan": lambda f: lambda x: jax.lax.map(f, x),
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_traced_inside_the_block_is_refused(transform):
    """No tracer leaks, and no altered program stays in jax's cache."""
    function = TRANSFORMS[transform](lambda x: toy(x))
    message = r"decoder/embeddings is traced by jit, scan, grad or vmap inside the block"
    for fed in ({}, {"decoder/embeddings": ONES * 0}):
        with pytest.raises(ValueError, match=message), collect_stages(fed=fed):
            function(ONES)
    result = function(ONES)
    if transform in ("jit", "checkpoint"):
        assert result == toy(ONES) == 4 * ONES.size


def test_a_program_compiled_before_the_block_is_noticed():
    compiled = jax.jit(toy)
    compiled(ONES)
    with (
        pytest.raises(ValueError, match="must call the model, got no stage"),
        collect_stages(fed={LAYER: ONES}),
    ):
        compiled(ONES)
    with (
        pytest.raises(ValueError, match=f"got '{LAYER}'; near it: vision/patches"),
        collect_stages(fed={LAYER: ONES}),
    ):
        stage("vision/patches", ONES)
        compiled(ONES)


def test_two_calls_in_one_block_are_refused():
    with pytest.raises(ValueError, match="decoder/embeddings is computed twice"), collect_stages():
        toy(toy(ONES))


def test_an_error_inside_the_block_is_the_users_own():
    with pytest.raises(KeyError, match="mine"), collect_stages(fed={"nothing": ONES}):
        raise KeyError("mine")
