"""The logit lens: what each layer would predict (nostalgebraist 2020, "interpreting GPT")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int32

from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import collect_stages
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit


@dataclass(frozen=True)
class LogitLens:
    """The k most likely next tokens after the embeddings (layer 0) and after each of L layers."""

    tokens: Int32[np.ndarray, "L1 B T k"]
    log_probabilities: Float32[np.ndarray, "L1 B T k"]
    inputs: Inputs

    def texts(self, tokenizer: Tokenizer, row: int = 0) -> list[list[str]]:
        """The most likely token of each layer for each target of a row, as text [L + 1, N]."""
        places = np.flatnonzero(np.asarray(self.inputs.targets)[row]) - 1
        best = self.tokens[:, row, places, 0]
        return [[tokenizer.decode([token]) for token in layer] for layer in best.tolist()]


def logit_lens(model: PaliGemma, inputs: Inputs, k: int = 5, edits: Edits = NO_EDITS) -> LogitLens:
    """Apply the final norm and the output head, with its softcap, to the residual stream after
    each layer. The last one gives the model's own predictions."""
    stages = _residual_stream(model, inputs, edits)
    best = [[to_host(array) for array in _best(model, x, k)] for x in stages.values()]
    tokens, log_probabilities = (np.stack(arrays) for arrays in zip(*best, strict=True))
    return LogitLens(tokens, log_probabilities, inputs)


@mesh_jit
def _residual_stream(model: PaliGemma, inputs: Inputs, edits: Edits) -> dict[str, Array]:
    names = ["decoder/embeddings", r"decoder/layers/\d+"]
    with collect_stages(only=names, edits=edits) as stages:
        model.hidden(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    return stages


@partial(mesh_jit, static_argnames="k")
def _best(model: PaliGemma, x: Float[Array, "B T D"], k: int) -> tuple[Array, Array]:
    decoder = model.decoder
    logits = decoder.logits(decoder.norm(x), model.config.profile.capped_prefill)
    log_probabilities, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return tokens, log_probabilities
