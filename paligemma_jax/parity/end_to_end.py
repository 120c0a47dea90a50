"""Results of the complete model: logits of one compiled program, greedy tokens, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.inference import generate
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.training.losses import answer_loss

TIE = 1e-3  # logits closer than this may swap places in float32


@dataclass(frozen=True)
class GreedyTokens:
    """Greedy tokens int32[B, N] of both models, and for each the gap float32[B, N] between
    transformers' two largest logits."""

    ours: np.ndarray
    transformers: np.ndarray
    gaps: np.ndarray
    texts: tuple[list[str], list[str]] | None  # ours and transformers', if there is a tokenizer

    @property
    def first_differences(self) -> list[int | None]:
        """The index of the first token that differs, for each row."""
        return [_first(a != b) for a, b in zip(self.ours, self.transformers, strict=True)]

    @property
    def equal(self) -> bool:
        """Whether all tokens are equal, except after a tie."""
        differences = enumerate(self.first_differences)
        return all(at is None or self.gaps[row, at] < TIE for row, at in differences)

    @property
    def texts_equal(self) -> bool:
        """Whether both sides decode equal tokens to equal texts."""
        pairs = zip(*self.texts, self.first_differences, strict=True) if self.texts else ()
        return all(ours == theirs or at is not None for ours, theirs, at in pairs)


def compare_greedy(
    model: PaliGemma, case: ParityCase, reference: tuple[np.ndarray, np.ndarray]
) -> GreedyTokens:
    """Generate as many tokens as `reference` (tokens and gaps) has."""
    theirs, gaps = reference
    ours = generate.generate(model, case.own_prompts, DecodingOptions(theirs.shape[1])).tokens
    if case.examples is None:
        return GreedyTokens(ours, theirs, gaps, None)
    eos = case.checkpoint.config.eos_token_ids

    def decode(rows: np.ndarray, decode_row: Callable[[list[int]], str]) -> list[str]:
        return [decode_row(row[: _first(np.isin(row, eos))].tolist()) for row in rows]

    texts = decode(ours, case.examples.ours.decode), decode(theirs, case.examples.theirs.decode)
    return GreedyTokens(ours, theirs, gaps, texts)


def compute_gradients(model: PaliGemma, case: ParityCase) -> dict[str, np.ndarray]:
    """Gradients of the mean loss over all targets, by parameter path."""
    inputs = jax.tree.map(jnp.asarray, case.inputs)
    max_targets = int(case.inputs.targets.sum(axis=1).max())

    def loss(model: PaliGemma) -> Array:
        total, count = answer_loss(model, inputs, jnp.ones(len(inputs.tokens)), max_targets)
        return total / count

    gradients = parameters(jax.jit(jax.grad(loss))(model))
    return {path: np.asarray(value) for path, value in gradients.items()}


def _first(flags: np.ndarray) -> int | None:
    """The index of the first true element."""
    return int(flags.argmax()) if flags.any() else None
