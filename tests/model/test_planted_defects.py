"""Each planted defect breaks the parity of tests/model/test_parity.py, most by thousands of times
its tolerance."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_models import hf_logits, random_inputs

from paligemma_jax.model import decoder, layers, masks, vision
from paligemma_jax.model.config import DecoderConfig


def _mask(change):
    return mock.patch.object(
        masks.Mask, "__call__", lambda self: change(self.queries, self.keys, self.window)
    )


def _anded(queries, keys, window):
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    return masks.prefix_lm_mask(queries, keys, 2**30) & (s > t - window)


def _transposed(images, size):
    return PATCHES(jnp.swapaxes(images, 1, 2), size)


PATCHES, NORM = vision.patches, layers.RMSNorm.__call__


def _erf_gelu(x, approximate):
    return x * 0.5 * (1 + jax.scipy.special.erf(x * 0.5**0.5))


def _norm_without_one(self, x):
    return NORM(self, x) / (1 + self.scale[...]) * self.scale[...]


def _change(span, positions=0, valid=False):
    return masks.TokenSpan(span.positions + positions, span.prefix, span.valid | valid)


RULE = masks.prefix_lm_mask
DEFECTS = {
    "erf gelu": mock.patch("jax.nn.gelu", _erf_gelu),
    "window off by one": _mask(lambda q, k, w: RULE(q, k, w + 1)),
    "no window": _mask(lambda q, k, w: RULE(q, k, 2**30)),
    "window narrows the prefix": _mask(_anded),
    "wrong layers are local": mock.patch.object(
        DecoderConfig, "windows", lambda self, numerics, decoding: (2**30, 8, 2**30, 8, 2**30)
    ),
    "norm scales by w instead of 1 + w": mock.patch.object(
        layers.RMSNorm, "__call__", _norm_without_one
    ),
    "image height and width swapped": mock.patch.object(vision, "patches", _transposed),
    "pads are attended to": _mask(lambda q, k, w: RULE(q, _change(k, valid=True), w)),
    "no rope": mock.patch.object(decoder, "rope", lambda x, **_: x),
    "key positions off by three": _mask(lambda q, k, w: RULE(q, _change(k, positions=3), w)),
    "suffix attends both ways": _mask(lambda q, k, w: RULE(q, k, w) | k.valid[:, None, :]),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_detected(random_checkpoint, name):
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ((1, 5, 12), (2, 3, 4)), 0, order="mixed")
    expected = hf_logits(reference, inputs)
    arrays = map(jnp.asarray, (inputs.tokens, inputs.images, inputs.valid, inputs.prefix))
    with DEFECTS[name]:
        logits = np.asarray(model(*arrays))
    error = np.abs(logits - expected)[inputs.valid].max()
    assert error > 5e-4, error  # the tolerance is 2e-4
