"""Identify which program, release and call computed given logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.inference.scoring import forward
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.decoder import Embedder
from paligemma_jax.model.numerics import NUMERICS, Numerics
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.parity.engines.releases import (
    CALLS,
    MEANINGS,
    RELEASES,
    Call,
    changes,
    describe,
    visible_prefix,
)
from paligemma_jax.parity.engines.sample import Sample, read_sample
from paligemma_jax.processing.processor import Inputs

# Relative distance above which nothing has been identified: rounding moves logits by 1e-6 in
# float32, and by up to 0.05 in bfloat16.
LIMITS = {"float32": 1e-4, "bfloat16": 0.1}
# Candidates cannot be told apart if both are within rounding, or nearly as near as each other.
ROUNDING, NEARLY = {"float32": 1e-5, "bfloat16": 0.0}, 1.02


@dataclass(frozen=True)
class Candidate:
    """Profiles and calls that compute the same logits here, and their distance from the sample:
    the norm of the difference over the norm of the sample, at valid tokens."""

    profiles: tuple[str, ...]
    calls: tuple[Call, ...]
    distance: float


@dataclass(frozen=True)
class Identified:
    """Candidates, nearest first."""

    dtype: str
    candidates: tuple[Candidate, ...]

    @property
    def found(self) -> bool:
        return self.candidates[0].distance <= LIMITS[self.dtype]

    @property
    def nearest(self) -> tuple[Candidate, ...]:
        """The candidates that cannot be told from the nearest."""
        limit = max(NEARLY * self.candidates[0].distance, ROUNDING[self.dtype])
        return tuple(candidate for candidate in self.candidates if candidate.distance <= limit)

    @property
    def profiles(self) -> list[str]:
        """The profiles of the nearest candidates."""
        return [name for name in NUMERICS if any(name in c.profiles for c in self.nearest)]


def identify(model: str, file: str) -> Identified:
    """Compare the logits of a file with those of every profile and call.

    Args:
        model: The checkpoint that the logits were computed from.
        file: A .npz with logits [B, T, V], tokens [B, T] (or input_ids), images [M, S, S, 3] (or
            pixel_values [M, 3, S, S]), and optionally valid (or attention_mask) and targets (or
            token_type_ids) [B, T], by default all and none.

    Raises:
        ValueError: The file is damaged, or does not fit the checkpoint.
    """
    source = resolve(model)
    sample = read_sample(Path(file), source.config)
    logits = dict(_compute_all(source, sample))
    scale = np.linalg.norm(_at_valid(sample, sample.logits))
    distances = {
        key: float(np.linalg.norm(_at_valid(sample, value - sample.logits)) / scale)
        for key, value in logits.items()
    }
    groups: list[list[tuple[str, Call]]] = []
    for key in sorted(distances, key=lambda key: distances[key]):
        same = (g for g in groups if np.array_equal(logits[g[0]], logits[key]))
        group = next(same, None)
        if group is None:
            groups.append([key])
        else:
            group.append(key)
    candidates = tuple(
        Candidate(
            tuple(name for name in NUMERICS if name in dict(group)),
            tuple(call for call in CALLS if call in {call for _, call in group}),
            distances[group[0]],
        )
        for group in groups
    )
    return Identified(sample.dtype, candidates)


def format_identified(identified: Identified, count: int = 4) -> str:
    """The verdict, the ranking, and what the runner-up would change."""
    rows = [
        f"{place}. {describe(candidate.profiles)}, {_calls(candidate)}: {candidate.distance:.1e}"
        for place, candidate in enumerate(identified.candidates[:count], 1)
    ]
    heading = "Relative distances from the logits, nearest first:"
    return "\n".join([verdict(identified), "", heading, *rows, *_runner_up(identified)])


def verdict(identified: Identified) -> str:
    """Name the program in one sentence."""
    best, program = identified.candidates[0], describe(identified.profiles)
    if not identified.found:
        return (
            f"no profile computes these logits in {identified.dtype}: the nearest, {program}, is "
            f"{best.distance:.1e} away; check that checkpoint and inputs are the same"
        )
    cap = MEANINGS["capped_prefill", NUMERICS[best.profiles[0]].capped_prefill]
    return f"these logits come from {program} in {identified.dtype}, {_calls(best)}: {cap}"


def as_dict(identified: Identified) -> dict:
    """Plain data, for --json."""
    return {
        "dtype": identified.dtype,
        "verdict": verdict(identified),
        "found": identified.found,
        "candidates": [vars(candidate) for candidate in identified.candidates],
    }


def _calls(candidate: Candidate) -> str:
    if not set(candidate.profiles) & set(RELEASES):
        return "prefix-LM"
    return " or ".join(CALLS[call] for call in candidate.calls)


def _runner_up(identified: Identified) -> list[str]:
    best, others = identified.candidates[0], identified.candidates[len(identified.nearest) :]
    if not others:
        return []
    second, place = others[0], len(identified.nearest) + 1
    if set(best.profiles) & set(second.profiles):
        return [f"Number {place} is the same program, called {_calls(second)}."]
    different = changes(best.profiles[-1], second.profiles[-1])
    return [f"Number {place} differs by: {', '.join(different) or 'the mask of this call'}."]


def _compute_all(
    source: CheckpointSource, sample: Sample
) -> Iterator[tuple[tuple[str, Call], np.ndarray]]:
    """The logits of all profiles and calls. Those that must be equal are computed once."""
    computed: dict[tuple, np.ndarray] = {}
    inputs = sample.inputs
    with jax.default_matmul_precision("highest"):
        for name, numerics in NUMERICS.items():
            if numerics.float32_activations and sample.dtype != "float32":
                continue
            relevant = _relevant(numerics, source.config, inputs)
            model = None
            for call in CALLS:
                prefix = visible_prefix(numerics, call, inputs.targets)
                key = (relevant, prefix.tobytes())
                if key not in computed:
                    model = model or _load(source, sample.dtype, name)
                    logits = np.asarray(forward(model, replace(inputs, prefix=prefix)))
                    computed[key] = logits[..., : sample.logits.shape[-1]]
                yield (name, call), computed[key]


def _load(source: CheckpointSource, dtype: str, numerics: str) -> PaliGemma:
    """The model of a profile. For bfloat16 it computes in float32 with what a program in bfloat16
    starts from: weights and sqrt(D), rounded. So the rounding of activations, which no other
    program repeats, is in the sample only, and small differences show."""
    model = load_model(source, "float32", numerics)
    if dtype == "float32":
        return model
    model = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model)
    decoder, projector = model.decoder, model.projector
    decoder.embedder = RoundedEmbedder(decoder.embedder)
    if model.config.profile.scaled_features:
        for parameter in (projector.kernel, projector.bias):
            parameter[...] *= decoder.embedder.scale / decoder.config.hidden_size**0.5
    return model


class RoundedEmbedder(Embedder):
    """An embedder whose sqrt(D) is rounded to bfloat16."""

    def __init__(self, embedder: Embedder):
        self.shape, self.table = embedder.shape, embedder.table

    @property
    def scale(self) -> float:
        return float(np.asarray(self.shape[1] ** 0.5, jnp.bfloat16))

    def encode(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        return self.rows(tokens, dtype) * self.scale


def _relevant(numerics: Numerics, config: PaliGemmaConfig, inputs: Inputs) -> Numerics:
    """A profile without what changes nothing here, so that equal ones compare equal."""
    decoder = config.decoder
    if decoder.sliding_window is None or inputs.tokens.shape[1] <= decoder.sliding_window:
        numerics = replace(numerics, window="none")
    if decoder.final_logit_softcapping is None:
        numerics = replace(numerics, capped_prefill=False)
    if decoder.head_dim == decoder.query_pre_attn_scalar:
        numerics = replace(numerics, head_dim_scale=False)
    if inputs.images is None:
        numerics = replace(numerics, scaled_features=False)
    unused = {"prefix_without_labels": False, "bidirectional_without_types": False}
    return replace(numerics, window_decode=False, capped_decode=False, **unused)


def _at_valid(sample: Sample, logits: np.ndarray) -> np.ndarray:
    return logits[sample.inputs.valid].astype(np.float64)
