"""Planted defects: the parity that tests/model/test_parity.py asks for is broken by each of them, most by thousands of times its tolerance."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_models import hf_logits, random_inputs

from paligemma_jax.model import attention, decoder, layers, masks, vision
from paligemma_jax.model.config import DecoderConfig


def _mask(change):
    return mock.patch.object(attention, "prefix_lm_mask", change)


def _anded(queries, keys, window):
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    return masks.prefix_lm_mask(queries, keys, 2**30) & (s > t - window)


def _transposed(images, size):
    return PATCHES(jnp.swapaxes(images, 1, 2), size)


PATCHES, NORM = vision.patches, layers.RMSNorm.__call__

DEFECTS = {
    "erf gelu": lambda: mock.patch("jax.nn.gelu", lambda x, approximate: x * 0.5 * (1 + jax.scipy.special.erf(x * 0.5**0.5))),
    "window off by one": lambda: _mask(lambda q, k, w: masks.prefix_lm_mask(q, k, w + 1)),
    "no window": lambda: _mask(lambda q, k, w: masks.prefix_lm_mask(q, k, 2**30)),
    "window narrows the prefix": lambda: _mask(_anded),
    "wrong layers are local": lambda: mock.patch.object(DecoderConfig, "windows", lambda self, numerics: (2**30, 8, 2**30, 8, 2**30)),
    "w for 1 + w": lambda: mock.patch.object(
        layers.RMSNorm, "__call__", lambda self, x: NORM(self, x) / (1 + self.scale[...]) * self.scale[...]
    ),
    "image height and width swapped": lambda: mock.patch.object(vision, "patches", _transposed),
    "pads are seen": lambda: _mask(lambda q, k, w: masks.prefix_lm_mask(q, masks.TokenSpan(k.positions, k.prefix, k.valid | True), w)),
    "no rope": lambda: mock.patch.object(decoder, "rope", lambda x, *_: x),
    "first position off by three for keys": lambda: _mask(
        lambda q, k, w: masks.prefix_lm_mask(q, masks.TokenSpan(k.positions + 3, k.prefix, k.valid), w)
    ),
    "suffix sees itself both ways": lambda: _mask(lambda q, k, w: masks.prefix_lm_mask(q, k, w) | k.valid[:, None, :]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_seen(random_checkpoint, name):
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ((1, 5, 12), (2, 3, 4)), 0, order="mixed")
    expected = hf_logits(reference, inputs)
    run = lambda: np.abs(np.asarray(model(*map(jnp.asarray, (inputs.tokens, inputs.images, inputs.valid, inputs.prefix)))) - expected)[
        inputs.valid
    ].max()
    with DEFECTS[name]():
        broken = run()
    assert broken > 5e-4, broken  # the tolerance is 2e-4
