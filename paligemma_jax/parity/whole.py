"""What is compared of whole models: the logits of one compiled program, greedy tokens, the gradient of every parameter."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.inference import generate
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.parity.inputs import ParityCase
from paligemma_jax.training.losses import answer_loss

TIE = 1e-3  # two float32 logits that close may change places


@dataclass(frozen=True)
class Tokens:
    """Greedy tokens int32[B, N] of both, and the gap float32[B, N] between transformers' two best logits at each."""

    ours: np.ndarray
    theirs: np.ndarray
    gaps: np.ndarray
    texts: tuple[list[str], list[str]] | None  # of both, where there is a tokenizer

    @property
    def first(self) -> list[int | None]:
        """Of each row, the first token that differs."""
        return [next(iter(np.flatnonzero(a != b).tolist()), None) for a, b in zip(self.ours, self.theirs)]

    @property
    def equal(self) -> bool:
        """But for what follows a tie."""
        return all(at is None or self.gaps[row, at] < TIE for row, at in enumerate(self.first))


def greedy(model: PaliGemma, case: ParityCase, theirs: tuple[np.ndarray, np.ndarray]) -> Tokens:
    """Ours beside theirs (tokens and gaps)."""
    wanted, gaps = theirs
    found = generate.generate(model, case.asked, wanted.shape[1]).tokens
    ends = lambda rows: [row[: next(iter(np.flatnonzero(np.isin(row, case.checkpoint.config.eos_token_ids))), len(row))].tolist() for row in rows]
    if (processor := case.processor) is None:
        return Tokens(found, wanted, gaps, None)
    ours, truth = ([processor.decode(row) for row in ends(rows)] for rows in (found, wanted))
    return Tokens(found, wanted, gaps, (ours, truth))


def gradients(model: PaliGemma, case: ParityCase) -> dict[str, np.ndarray]:
    """Of the loss, the mean over all targets, by parameter path."""
    inputs, longest = jax.tree.map(jnp.asarray, case.inputs), int(case.inputs.targets.sum(axis=1).max())

    @jax.jit
    def gradient(model: PaliGemma) -> PaliGemma:
        def loss(model: PaliGemma) -> jax.Array:
            total, count = answer_loss(model, inputs, jnp.ones(len(inputs.tokens)), longest)
            return total / count

        return jax.grad(loss)(model)

    return {path: np.asarray(value) for path, value in parameters(gradient(model)).items()}
