"""Fused attention, in Pallas' interpreter, computes what the plain form computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.on_devices import call
from support.toys import batch

from paligemma_jax.checkpoints.synthetic import random_model
from paligemma_jax.model.attention import attend
from paligemma_jax.model.config import NO_WINDOW, PRESETS, PaliGemmaConfig
from paligemma_jax.model.masks import Mask, token_span
from paligemma_jax.sharding.devices import choose_attention


@dataclass(frozen=True)
class Case:
    """A batch of two rows: the first is full, the second has pads on one side."""

    tokens: int
    heads: tuple[int, int]  # of queries, of keys
    size: int  # of a head
    softcap: float | None = 50.0
    window: int = NO_WINDOW
    masked: bool = True
    pads: str = "left"


CASES = {
    "one token": Case(1, (2, 1), 16),
    "a block with padding": Case(37, (4, 2), 32),
    "window": Case(300, (4, 2), 16, window=100, pads="right"),
    "PaliGemma 1": Case(130, (4, 1), 16, softcap=None),
    "SigLIP": Case(256, (2, 2), 72, softcap=None, masked=False),
    "SigLIP with padding": Case(64, (2, 2), 72, softcap=None, masked=False),
}
SLOW = {
    "three blocks": Case(1500, (4, 2), 64, window=700),
    "head size 256": Case(1120, (2, 1), 256),
    "head size 128": Case(1120, (2, 1), 128, pads="right"),
    "SigLIP at 448 pixels": Case(1024, (2, 2), 72, softcap=None, masked=False),
    "896 pixels": Case(4200, (2, 1), 64, window=4096),
}


def both_forms(case: Case, dtype=jnp.float32) -> list[dict[str, np.ndarray]]:
    """Results and gradients of the plain and the fused form. Those of pads are arbitrary, and 0
    here."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    N, K = case.heads
    shapes = {"q": N, "k": K, "v": K, "g": N}
    arrays = {
        name: jax.random.normal(next(keys), (2, case.tokens, heads, case.size)).astype(dtype)
        for name, heads in shapes.items()
    }
    slots, pads = jnp.arange(case.tokens), jnp.array([[0], [case.tokens // 3]])
    valid = slots >= pads if case.pads == "left" else slots < case.tokens - pads
    span = token_span(valid, valid & (slots < case.tokens // 2), 1)
    mask = Mask(span, span, case.window) if case.masked else None
    kept = valid[..., None, None] if case.masked else True

    def run(form, q, k, v, g):
        options = dict(scale=3 * case.size**-0.5, softcap=case.softcap, mask=mask, form=form)
        out, backward = jax.vjp(lambda *qkv: attend(*qkv, **options), q, k, v)
        gradients = dict(zip(("dq", "dk", "dv"), backward(jnp.where(kept, g, 0)), strict=True))
        return {"out": jnp.where(kept, out, 0), **gradients}

    with jax.default_matmul_precision("highest"):
        forms = [jax.jit(run, static_argnums=0)(form, **arrays) for form in ("plain", "fused")]
    return [{name: np.asarray(x, np.float32) for name, x in form.items()} for form in forms]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in CASES.items()]
    + [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()],
)
def test_it_computes_attention_and_its_gradients(case):
    plain, fused = both_forms(case)
    np.testing.assert_allclose(fused["out"], plain["out"], atol=1e-5)
    for name in ("dq", "dk", "dv"):
        limit = 1e-4 * max(np.abs(plain[name]).max(), 1e-2)  # one token: the gradient is 0
        np.testing.assert_allclose(fused[name], plain[name], atol=limit, err_msg=name)


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="no GPU or TPU is present")
@pytest.mark.parametrize("case", [*CASES.values(), *SLOW.values()], ids=[*CASES, *SLOW])
def test_on_this_device(case):
    """The compiled kernels, in float32 and in bfloat16."""
    test_it_computes_attention_and_its_gradients(case)
    if case.tokens > 1:  # else the plain form is exact
        test_in_bfloat16_it_errs_as_the_plain_form_does(case)


@pytest.mark.parametrize("case", [CASES["window"]], ids=["window"])
def test_in_bfloat16_it_errs_as_the_plain_form_does(case):
    """A little more in the gradients of queries and keys, where the backward pass starts from the
    rounded result, as in FlashAttention."""
    (exact, _), (plain, fused) = both_forms(case), both_forms(case, jnp.bfloat16)
    for name, value in exact.items():
        errors = [np.abs(form[name] - value).mean() for form in (plain, fused)]
        assert errors[1] <= (1.4 if name in ("dq", "dk") else 1.1) * errors[0], (name, errors)


@pytest.fixture(scope="module")
def models():
    config = replace(PRESETS["tiny"], dtype="float32")
    shallow = replace(
        config,
        vision=replace(config.vision, num_hidden_layers=1),
        decoder=replace(config.decoder, num_hidden_layers=2),
    )
    return [random_model(replace(shallow, attention=form)) for form in ("plain", "fused")]


def test_a_model_computes_the_same_logits(models):
    inputs = batch(models[0], padding=3)
    arrays = (inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    with jax.default_matmul_precision("highest"):
        plain, fused = (np.asarray(jax.jit(model)(*arrays))[inputs.valid] for model in models)
    np.testing.assert_allclose(fused, plain, atol=2e-5 * np.abs(plain).max())


def test_each_device_computes_its_rows_and_heads():
    """On data=2,fsdp=2,tensor=2. A single key head, as in PaliGemma 1, cannot be split."""
    errors = call(8, "fused_attention_errors", [2, 1])
    assert max(errors["1"] + errors["2"]) < 1e-5, errors


def test_a_cpu_has_no_fused_form():
    assert choose_attention() == "plain"
    with pytest.raises(ValueError, match="attention must be plain on a CPU, got fused"):
        choose_attention("fused")
    with pytest.raises(ValueError, match="attention must be one of plain, fused, got 'flash'"):
        choose_attention("flash")


def test_the_default_config_runs_everywhere():
    assert PaliGemmaConfig().attention == "plain"
