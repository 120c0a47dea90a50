"""GRPO: advantages and the loss against the formulas of the paper, token by token in float64."""

from __future__ import annotations

from math import exp

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.losses.grpo import group_advantages, grpo

R, N = 6, 5
LENGTHS = [5, 1, 3, 0, 4, 2]


def case(seed=0):
    """Random log-probabilities with ratios within and beyond the clipped range."""
    rng = np.random.default_rng(seed)
    old = rng.uniform(-3, -0.1, (R, N)).astype(np.float32)
    new, reference = (old + rng.normal(0, 0.4, (R, N)).astype(np.float32) for _ in range(2))
    advantages = rng.normal(0, 1, R).astype(np.float32)
    return new, old, reference, advantages, np.arange(N) < np.array(LENGTHS)[:, None]


def expected_loss(new, old, reference, advantages, clip, kl):
    """Equation 3 of arXiv:2402.03300 with the estimator of equation 4, negated."""
    new, old, reference, advantages = (
        np.asarray(x, np.float64).tolist() for x in (new, old, reference, advantages)
    )
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = exp(new[row][t] - old[row][t])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            gain = min(ratio * advantages[row], clipped * advantages[row])
            difference = reference[row][t] - new[row][t]
            total -= (gain - kl * (exp(difference) - difference - 1)) / length
    return total / R


@pytest.mark.parametrize("clip, kl", [(0.2, 0.04), (0.1, 0.5), (0.9, 0.0)])
def test_the_loss_is_that_of_the_paper(clip, kl):
    new, old, reference, advantages, mask = case()
    loss, parts = grpo(new, old, reference, advantages, mask, clip, kl)
    expected = expected_loss(new, old, reference, advantages, clip, kl)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(parts["policy"] + kl * parts["kl"]) == pytest.approx(expected, abs=1e-6)
    assert float(parts["kl"]) > 0


def test_the_gradient_is_that_of_the_formula():
    """Central differences in float64; no ratio is near the edge of the clipped range."""
    new, old, reference, advantages, mask = case()
    ratios = np.exp(new - old)[mask]
    assert min(np.abs(ratios - 0.8).min(), np.abs(ratios - 1.2).min()) > 1e-3
    gradient = jax.grad(lambda x: grpo(x, old, reference, advantages, mask, 0.2, 0.5)[0])(new)
    expected = np.zeros((R, N))
    for place in zip(*np.nonzero(mask), strict=True):
        step = np.zeros((R, N))
        step[place] = 1e-5
        above, below = (
            expected_loss(new.astype(np.float64) + x, old, reference, advantages, 0.2, 0.5)
            for x in (step, -step)
        )
        expected[place] = (above - below) / 2e-5
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_follows_the_advantages_inside_the_clipped_range_only():
    old = jnp.zeros((4, 1))
    new = jnp.log(jnp.array([[1.0], [1.3], [0.7], [1.3]]))
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0])
    mask = jnp.ones((4, 1), bool)
    gradient = jax.grad(lambda x: grpo(x, old, None, advantages, mask, 0.2)[0])(new)
    np.testing.assert_allclose(gradient[:, 0] * 4, [-1, 0, 0, 1.3], rtol=1e-6)


def test_the_kl_pulls_towards_the_reference():
    new, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
    ones = jnp.ones((1, 2), bool)
    gradient = jax.grad(lambda x: grpo(x, x, reference, jnp.zeros(1), ones, kl=1.0)[0])(new)
    assert gradient[0, 0] > 0 > gradient[0, 1]  # descent lowers the first and raises the second


def test_values_beyond_an_answer_do_not_count():
    new, old, reference, advantages, mask = case()
    loss, gradient = jax.value_and_grad(lambda x: grpo(x, old, reference, advantages, mask)[0])(new)
    spoiled = [np.where(mask, x, 1e3) for x in (old, reference)]
    other = jax.grad(lambda x: grpo(x, spoiled[0], spoiled[1], advantages, mask)[0])(new)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(gradient, other)
    assert (np.asarray(gradient)[~mask] == 0).all()


def test_advantages_compare_with_the_own_group():
    rewards = np.array([[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    for std in (True, False):
        advantages = group_advantages(rewards, std)
        np.testing.assert_allclose(advantages.mean(axis=1), 0, atol=1e-6)
        assert (advantages[1] == 0).all()
    np.testing.assert_allclose(group_advantages(rewards, False)[0], [-0.5, 0.5, 0.5, -0.5])
    spread = np.std([0, 1, 1, 0], ddof=1)
    np.testing.assert_allclose(
        group_advantages(rewards)[0], np.array([-0.5, 0.5, 0.5, -0.5]) / spread, rtol=1e-3
    )
