"""The loss of whole logits against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.training.losses import token_loss


@pytest.fixture
def batch():
    """Two rows of 12 tokens, padded on the left: 5 and 3 targets at the end. logits [2, 12, 40], tokens, targets."""
    rng = np.random.default_rng(0)
    targets = np.arange(12) >= np.array([[7], [9]])
    return rng.normal(0, 3, (2, 12, 40)).astype(np.float32), rng.integers(0, 40, (2, 12)), targets


def test_it_is_that_of_transformers(batch):
    torch = pytest.importorskip("torch")
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, tokens, targets = batch
    expected = ForCausalLMLoss(torch.tensor(logits), torch.tensor(np.where(targets, tokens, -100)), vocab_size=logits.shape[-1])
    assert float(token_loss(*batch)) == pytest.approx(expected.item(), rel=1e-6)


def test_nothing_to_learn_is_zero_and_has_zero_gradient(batch):
    logits, tokens, targets = batch
    loss, gradient = jax.value_and_grad(lambda logits: token_loss(logits, tokens, np.zeros_like(targets)))(jnp.asarray(logits))
    assert float(loss) == 0 and not np.any(gradient)


def test_only_the_positions_before_targets_matter(batch):
    gradient = jax.grad(lambda logits: token_loss(logits, *batch[1:]))(jnp.asarray(batch[0]))
    touched = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(touched[:, :-1], batch[2][:, 1:])
    assert not touched[:, -1].any()


def test_half_precision_logits_are_summed_in_float32(batch):
    logits = jnp.asarray(batch[0], jnp.bfloat16)
    assert token_loss(logits, *batch[1:]).dtype == jnp.float32
    assert float(token_loss(logits, *batch[1:])) == float(token_loss(logits.astype(jnp.float32), *batch[1:]))
