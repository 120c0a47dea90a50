"""`load`, and what it returns: processor, model and generation in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from paligemma_jax import checkpoint
from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.sampling import Greedy, Sampler
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Images, Inputs, Processor
from paligemma_jax.processing.tokenizer import Tokenizer

BUCKET = 32  # lengths are rounded up to a multiple of this, so that a new prompt length rarely compiles anything

Texts = str | Sequence[str]


@dataclass(frozen=True)
class Predictor:
    """A loaded PaliGemma. `images`, `prompts` and `suffixes` are those of `Processor`."""

    model: PaliGemma
    processor: Processor

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    def generate(
        self, images: Images, prompts: Texts, max_new_tokens: int = 128, sampler: Sampler = Greedy(), seeds: Sequence[int] | None = None
    ) -> list[str]:
        """The answer to every prompt, as text without special tokens.

        seeds: one integer a prompt, on which `Sample` depends beside the prompt itself; by default 0, 1, 2, ...
        ValueError if the inputs do not fit together, or prompt and answer the context.
        """
        inputs = self.processor(images, prompts)
        tokens, limit = inputs.tokens.shape[1], self.processor.context
        if max_new_tokens < 1 or tokens + max_new_tokens > limit:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: with a prompt of {tokens} tokens it can be 1 to {limit - tokens}")
        length = _round_up(tokens)
        inputs = self.processor(images, prompts, length=min(length, limit)) if length != tokens else inputs
        slots = inputs.tokens.shape[1] + _round_up(max_new_tokens)
        ids = generate.generate(
            self.model, inputs, max_new_tokens, sampler=sampler, seeds=_seeds(seeds, len(inputs.tokens)), allowed=self._sayable, slots=slots
        )
        return [self.processor.decode(row.tolist()) for row in ids.tokens]

    def score(self, images: Images, prompts: Texts, suffixes: Texts) -> np.ndarray:
        """float32[B]: the log-probability of every suffix and its eos, given image and prompt."""
        if suffixes is None:
            raise ValueError("no suffixes: pass the text to score, one for each prompt")
        return scoring.score(self.model, self.processor(images, prompts, suffixes))

    def logits(self, images: Images | Inputs, prompts: Texts | None = None, suffixes: Texts | None = None) -> tuple[np.ndarray, Inputs]:
        """Teacher-forced logits float32[B, T, V] (those at t are for the token at t + 1) and the `Inputs` they belong to. Also `logits(inputs)`."""
        inputs = self._inputs(images, prompts, suffixes)
        return np.asarray(scoring.forward(self.model, inputs)), inputs

    def stages(
        self, images: Images | Inputs, prompts: Texts | None = None, suffixes: Texts | None = None, attention: bool = False
    ) -> dict[str, np.ndarray]:
        """Every stage's output by name, in the order of computation, as one teacher-forced pass goes by:

        vision/patches, vision/embeddings, vision/layers/0, ..., vision/output, projector, decoder/embeddings, decoder/layers/0, ...,
        decoder/norm, logits; with `attention` also vision/layers/0/attention/weights [M, N, P, P], ... and decoder/layers/0/attention/weights
        [B, N, T, T], ... (much memory at 896 pixels: no query chunks then).
        """
        found = scoring.stages(self.model, self._inputs(images, prompts, suffixes), attention)
        return {name: np.asarray(value) for name, value in found.items()}

    def _inputs(self, images: Any, prompts: Texts | None, suffixes: Texts | None) -> Inputs:
        if isinstance(images, Inputs):
            _check(images, self.config)
            return images
        if prompts is None:
            raise ValueError("no prompts: pass images and prompts, or Inputs")
        return self.processor(images, prompts, suffixes)

    @property
    def _sayable(self) -> np.ndarray:
        """bool[V]: every id that stands for text; not `<image>` and the padding rows of the embedding table."""
        ids = np.arange(self.config.decoder.vocab_size)
        return (ids < self.processor.tokenizer.vocab_size) & (ids != self.config.image_token_id)


def load(source: str | Path = "tiny", *, dtype: str | None = None, numerics: str | None = None, mesh: Mesh | None = None) -> Predictor:
    """A `Predictor` from "tiny" (the embedded default), a Hugging Face directory, a converted checkpoint, or a hub id.

    dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint, and float32 on a CPU.
    numerics: "transformers" (release 5.23) or "big_vision", where the two differ (`paligemma_jax.model.config.Numerics`); by default
    the one that the checkpoint was converted from, or means.
    mesh: a `jax.sharding.Mesh` over whose devices the parameters are spread (`paligemma_jax.scaling.sharding.make_mesh`): each device
    gets its slices only, and only they are read.
    ValueError says in one line what is wrong with the source.
    """
    directory = checkpoint.resolve(source)
    config = checkpoint.load_config(directory)
    tokenizer = Tokenizer(checkpoint.files(directory) / "tokenizer.model", config.image_token_id)  # before the weights: what is wrong is told at once
    words = tokenizer.vocab_size - (tokenizer.image_id == tokenizer.vocab_size - 1)  # the id of <image>, if it is the last, needs no row
    if words > config.decoder.vocab_size:
        raise ValueError(f"{directory}: tokenizer.model has {words} ids, config.json {config.decoder.vocab_size}; take both from one checkpoint")
    processor = Processor(tokenizer, config.vision.image_size, config.vision.num_patches, config.max_context)
    return Predictor(checkpoint.load_model(directory, dtype, numerics, mesh), processor)


def _check(inputs: Inputs, config: PaliGemmaConfig) -> None:
    """ValueError for what a compiled program would clip to something that fits."""
    tokens, rows = np.asarray(inputs.tokens), config.decoder.vocab_size
    image = tokens == config.image_token_id
    if (strange := tokens[~image & ((tokens < 0) | (tokens >= rows))]).size:
        raise ValueError(f"token {strange[0]} is outside the vocabulary of {rows}")
    if len(inputs.images) and image.sum() != len(inputs.images) * config.vision.num_patches:
        raise ValueError(f"{image.sum()} image tokens for {len(inputs.images)} images of {config.vision.num_patches} each")


def _seeds(seeds: Sequence[int] | None, rows: int) -> np.ndarray:
    if seeds is None:
        return np.arange(rows)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts: pass one for each")
    if not all(isinstance(seed, int | np.integer) and -(2**31) <= seed < 2**31 for seed in seeds):
        raise ValueError(f"seeds are {list(seeds)}: pass whole numbers of 32 bits")
    return np.asarray(seeds)


def _round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET
