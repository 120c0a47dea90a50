"""The loss of a run: that of its configuration, or a function of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.losses import answer_loss, reduce_losses, target_states

# (model, batch, max_targets) -> the sum of the losses, and its divisor
LossFunction = Callable[[PyTree, PyTree, int], tuple[Array, Array]]
# (logits, tokens) -> loss of each token, or (logits, tokens, targets) -> their mean
LogitsLoss = Callable[..., Array]

FORMS = "(logits, tokens), (logits, tokens, targets) or (model, batch, max_targets)"


def make_loss(config: FinetuneConfig, loss: LossFunction | LogitsLoss | None) -> LossFunction:
    """The loss function of a run.

    Args:
        loss: By default, the cross entropy of the answers. Else a function that JAX can trace, of
            one of three forms. The first two are recognized by a first parameter named `logits`;
            they get the logits at the targets only, N of them in the row that has most (rounded
            up), and weights of rows and `config.reduction` apply to what they return.

            - `(logits, tokens) -> float[B, N]`, the loss of each token, such as
              `optax.softmax_cross_entropy_with_integer_labels`. `logits`, float32[B, N, V], predict
              `tokens`, int32[B, N]. Losses of what fills a row are dropped.
            - `(logits, tokens, targets) -> float[]`, the mean over the targets, such as
              `losses.tokens.cross_entropy` or a partial of it. Called for one row at a time, with
              logits at t that predict the token at t + 1: float32[1, N + 1, V], int32[1, N + 1] and
              bool[1, N + 1].
            - `(model, batch, max_targets) -> (sum, divisor)`, float32[] each, from a `Batch` and a
              static int, the N from above. Sums and divisors of the parts of a batch
              (`config.accumulate`) are added up before they are divided.

    Raises:
        ValueError: It has other arguments, or options that do not apply to it are set.
    """
    if loss is None:
        return partial(_answer_loss, config)
    function: Callable = loss
    if not callable(function) or not (_takes(function, 2) or _takes(function, 3)):
        got = inspect.signature(function) if callable(function) else repr(function)
        raise ValueError(f"loss must be a function of {FORMS}, got {got}")
    if config.label_smoothing:
        raise ValueError(f"--label-smoothing {config.label_smoothing} does not apply to loss=")
    if _first_parameter(function) == "logits":
        reduce = _per_row if _required(function) == 3 else _per_token
        return partial(_logits_loss, partial(reduce, function), config.reduction)
    if not _takes(function, 3):
        raise ValueError(f"loss must be a function of {FORMS}, got {inspect.signature(function)}")
    if config.reduction != "tokens":
        raise ValueError(
            f"--reduction {config.reduction} does not apply to a loss of (model, batch, "
            "max_targets), which returns its own divisor"
        )
    return partial(_checked_loss, function)


def _takes(function: Callable, count: int) -> bool:
    """Whether a function can be called with this many arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def _first_parameter(function: Callable) -> str:
    return next(iter(inspect.signature(function).parameters))


def _required(function: Callable) -> int:
    """The number of positional arguments without a default."""
    values = inspect.signature(function).parameters.values()
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return sum(value.kind in positional and value.default is value.empty for value in values)


def _answer_loss(
    config: FinetuneConfig, model: PaliGemma, batch: Batch, max_targets: int
) -> tuple[Array, Array]:
    return answer_loss(
        model,
        batch.inputs,
        batch.weights,
        max_targets,
        batch.features,
        config.reduction,
        config.label_smoothing,
    )


def _logits_loss(
    losses: Callable[[Array, Array, Array], Array],
    reduction: Literal["tokens", "examples"],
    model: PaliGemma,
    batch: Batch,
    max_targets: int,
) -> tuple[Array, Array]:
    x, tokens, mask = target_states(model, batch.inputs, max_targets, batch.features)
    logits = model.decoder.logits(x, model.config.profile.capped_prefill)
    return reduce_losses(losses(logits, tokens, mask), mask, batch.weights, reduction)


def _per_token(loss: LogitsLoss, logits: Array, tokens: Array, mask: Array) -> Array:
    losses = loss(logits, tokens)
    shape = getattr(losses, "shape", type(losses).__name__)
    if shape != tokens.shape:
        raise ValueError(
            "a loss of (logits, tokens) must return the loss of each token, an array of shape "
            f"{tokens.shape}, got {shape}"
        )
    return losses.astype(jnp.float32)


def _per_row(loss: LogitsLoss, logits: Array, tokens: Array, mask: Array) -> Array:
    """The mean of each row, for each of its tokens."""

    def mean(logits: Array, tokens: Array, targets: Array) -> Array:
        # Nothing predicts the first token, and the last logits predict nothing.
        logits = jnp.pad(logits, ((0, 1), (0, 0)))
        tokens, targets = jnp.pad(tokens, (1, 0)), jnp.pad(targets, (1, 0))
        value = loss(logits[None], tokens[None], targets[None])
        shape = getattr(value, "shape", type(value).__name__)
        if shape != ():
            raise ValueError(
                "a loss of (logits, tokens, targets) must return the mean over the targets, a "
                f"scalar, got {shape}"
            )
        return value.astype(jnp.float32)

    return jnp.broadcast_to(jax.vmap(mean)(logits, tokens, mask)[:, None], mask.shape)


def _checked_loss(
    loss: LossFunction, model: PyTree, batch: PyTree, max_targets: int
) -> tuple[Array, Array]:
    result = loss(model, batch, max_targets)
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not is_pair or any(jnp.shape(x) for x in result):
        got = [jnp.shape(x) for x in result] if is_pair else type(result).__name__
        raise ValueError(
            "a loss of (model, batch, max_targets) must return (sum, divisor), two scalars such as "
            f"(losses.sum(), losses.size), got {got}"
        )
    total, divisor = result
    return jnp.asarray(total, jnp.float32), jnp.asarray(divisor, jnp.float32)
