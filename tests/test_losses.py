"""The training loss against transformers' and against big_vision's formula."""

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


def transformers_loss(logits, tokens, targets, num_items=None):
    torch = pytest.importorskip("torch")
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = torch.tensor(np.where(targets, tokens, -100))
    return ForCausalLMLoss(torch.tensor(logits), labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items).item()


def test_sharp_18_loss_reductions(batch):
    logits, tokens, targets = batch
    assert float(token_loss(*batch)) == pytest.approx(transformers_loss(*batch), rel=1e-6)
    assert float(token_loss(*batch, num_items=10)) == pytest.approx(transformers_loss(*batch, num_items=10), rel=1e-6)
    each = [transformers_loss(logits[i : i + 1], tokens[i : i + 1], targets[i : i + 1]) for i in range(2)]  # a row's mean, as in big_vision
    assert float(token_loss(*batch, reduction="examples")) == pytest.approx(np.mean(each), rel=1e-6)
    assert abs(np.mean(each) - transformers_loss(*batch)) > 1e-2  # else the two reductions could be swapped unseen


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_nothing_to_learn_is_zero_and_has_zero_gradient(batch, reduction):
    logits, tokens, targets = batch
    loss, gradient = jax.value_and_grad(lambda logits: token_loss(logits, tokens, np.zeros_like(targets), reduction))(jnp.asarray(logits))
    assert float(loss) == 0 and not np.any(gradient)


def test_parts_of_a_batch_add_up(batch):
    parts = [token_loss(*(array[i : i + 1] for array in batch), num_items=8) for i in range(2)]
    assert float(sum(parts)) == pytest.approx(float(token_loss(*batch)), rel=1e-6)


def test_only_the_positions_before_targets_matter(batch):
    gradient = jax.grad(lambda logits: token_loss(logits, *batch[1:]))(jnp.asarray(batch[0]))
    touched = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(touched[:, :-1], batch[2][:, 1:])
    assert not touched[:, -1].any()


def test_half_precision_logits_are_summed_in_float32(batch):
    logits = jnp.asarray(batch[0], jnp.bfloat16)
    assert token_loss(logits, *batch[1:]).dtype == jnp.float32
    assert float(token_loss(logits, *batch[1:])) == float(token_loss(logits.astype(jnp.float32), *batch[1:]))


def test_wrong_arguments_are_named(batch):
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        token_loss(*batch, reduction="mean")
    with pytest.raises(ValueError, match="num_items"):
        token_loss(*batch, reduction="examples", num_items=3)
