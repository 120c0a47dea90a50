"""Losses of pairs of answers, one of which is preferred. Log-probabilities of answers come from
`answer_log_probabilities` of `training/losses.py`, or from `Predictor.score`."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

Answers = Float32[Array, " B"]


def dpo(
    chosen: Answers,
    rejected: Answers,
    reference_chosen: Answers,
    reference_rejected: Answers,
    beta: float = 0.1,
    smoothing: float = 0.0,
    form: Literal["sigmoid", "ipo"] = "sigmoid",
    lengths: tuple[Answers, Answers] | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Direct preference optimization (arXiv:2305.18290, equation 7), the mean over pairs.

    Args:
        chosen: Log-probabilities of the preferred answers under the model.
        rejected: Those of the others.
        reference_chosen: Log-probabilities under the reference, without gradient.
        reference_rejected: Those of the others.
        beta: How much the model must stay close to the reference.
        smoothing: Probability that a preference is wrong (cDPO). Only for "sigmoid".
        form: "sigmoid" is the paper's; "ipo" is the square of arXiv:2310.12036, equation 17.
        lengths: Numbers of tokens of the chosen and rejected answers, which "ipo" needs: it
            averages over tokens, as trl does.

    Returns:
        The loss, and "margin" (the mean reward of chosen minus rejected) and "accuracy".
    """
    gains = chosen - reference_chosen, rejected - reference_rejected
    margin = gains[0] - gains[1]
    if form == "ipo":
        if lengths is None:
            raise ValueError("lengths must be given with form='ipo', got None")
        means = [gain / jnp.maximum(n, 1) for gain, n in zip(gains, lengths, strict=True)]
        losses = (means[0] - means[1] - 1 / (2 * beta)) ** 2
    elif form == "sigmoid":
        right, wrong = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
        losses = -(1 - smoothing) * right - smoothing * wrong
    else:
        raise ValueError(f"form must be 'sigmoid' or 'ipo', got {form!r}")
    return losses.mean(), {"margin": beta * margin.mean(), "accuracy": jnp.mean(margin > 0)}


def orpo(
    chosen: Answers, rejected: Answers, chosen_loss: Float32[Array, ""], beta: float = 0.1
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Odds ratio preference optimization (arXiv:2403.07691, equations 6 and 7), which needs no
    reference.

    Args:
        chosen: Mean log-probability of a token of the preferred answers, below 0.
        rejected: That of the others.
        chosen_loss: Cross entropy of the preferred answers.
        beta: Weight of the odds ratio.

    Returns:
        The loss, and "odds" (the mean log of the ratio of odds) and "accuracy".
    """
    odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    loss = chosen_loss - beta * jax.nn.log_sigmoid(odds).mean()
    return loss, {"odds": odds.mean(), "accuracy": jnp.mean(odds > 0)}


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012)."""
    split = x > -jnp.log(2.0)  # each form gets a safe input where the other is chosen
    near, far = jnp.where(split, x, -1.0), jnp.where(split, -1.0, x)
    return jnp.where(split, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(far)))
