"""`cross_entropy` against transformers, and its gradient."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.losses.tokens import cross_entropy
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma


@pytest.fixture
def batch():
    """logits [2, 12, 40], tokens and targets: the last 5 and 3 of 12 tokens."""
    rng = np.random.default_rng(0)
    targets = np.arange(12) >= np.array([[7], [9]])
    logits = rng.normal(0, 3, (2, 12, 40)).astype(np.float32)
    return logits, rng.integers(0, 40, (2, 12)), targets


def test_token_loss_equals_transformers(batch):
    torch = pytest.importorskip("torch")
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, tokens, targets = batch
    labels = torch.tensor(np.where(targets, tokens, -100))
    expected = ForCausalLMLoss(torch.tensor(logits), labels, vocab_size=logits.shape[-1])
    assert float(cross_entropy(*batch)) == pytest.approx(expected.item(), rel=1e-6)


def test_without_targets_loss_and_gradient_are_zero(batch):
    logits, tokens, targets = batch

    def loss(logits):
        return cross_entropy(logits, tokens, np.zeros_like(targets))

    loss, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert float(loss) == 0 and not np.any(gradient)


def test_only_positions_before_targets_have_a_gradient(batch):
    logits, tokens, targets = batch
    gradient = jax.grad(cross_entropy)(jnp.asarray(logits), tokens, targets)
    nonzero = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(nonzero[:, :-1], targets[:, 1:])
    assert not nonzero[:, -1].any()


def test_half_precision_logits_are_summed_in_float32(batch):
    logits = jnp.asarray(batch[0], jnp.bfloat16)
    assert cross_entropy(logits, *batch[1:]).dtype == jnp.float32
    expected = cross_entropy(logits.astype(jnp.float32), *batch[1:])
    assert float(cross_entropy(logits, *batch[1:])) == float(expected)


def test_log_probabilities_do_not_copy_the_vocabulary(optimized):
    """The table is read in chunks; a copy of it would be 2 GiB for 3b."""
    config = PaliGemmaConfig.preset("tiny")
    config = replace(config, decoder=replace(config.decoder, vocab_size=2**16))
    model = nnx.eval_shape(lambda: PaliGemma(config, nnx.Rngs(0)))
    x, tokens = jax.ShapeDtypeStruct((8, 160), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)

    def scores(decoder, x, tokens):
        return decoder.log_probabilities(x, tokens, capped=True, chunk=2**12)

    memory = jax.jit(scores).lower(model.decoder, x, tokens).compile().memory_analysis()
    table = 2**16 * 160 * 4
    assert memory.temp_size_in_bytes < table / 4
