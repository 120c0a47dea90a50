"""Run both models on the same inputs and compare them stage by stage."""

from __future__ import annotations

import gc
import re
import resource
import time
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from paligemma_jax.model.tree import with_parameters
from paligemma_jax.parity import end_to_end, jax_model
from paligemma_jax.parity.case import ParityCase, load_parity_case
from paligemma_jax.parity.compare import StageError
from paligemma_jax.parity.end_to_end import GreedyTokens
from paligemma_jax.parity.float64 import float64_gradients, float64_stages
from paligemma_jax.parity.input_errors import input_errors
from paligemma_jax.parity.reference import (
    WEIGHTS_FACTOR,
    Stages,
    available_memory,
    compute_reference,
    weight_bytes,
)
from paligemma_jax.parity.stage_errors import compiled_logits_error, gradient_errors, stage_errors
from paligemma_jax.sharding.devices import choose_attention

ADAPTED = "transformers", "big_vision"  # profiles that the installed transformers can compute


@dataclass(frozen=True)
class ParityConfig:
    """What to compare; the fields are the flags of `paligemma-jax parity`."""

    model: str = "tiny"
    dtype: str = "float32"
    numerics: str | None = None
    images: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    new: int = 16  # greedy tokens
    gradients: bool = False
    depth: int | None = None
    against: str | None = None  # what transformers loads, if not `model`
    attention: str | None = None  # form of attention, by default the fastest
    float64: bool = False  # also run this model in float64, and measure both models against it

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.numerics not in (None, *ADAPTED):
            raise ValueError(
                f"numerics must be {' or '.join(ADAPTED)}, got {self.numerics!r}: compare with "
                "another release by --against transformers==VERSION"
            )
        if self.gradients and self.dtype != "float32":
            raise ValueError(f"--gradients needs --dtype float32, got {self.dtype}")
        if self.new < 0:
            raise ValueError(f"--new must be at least 0, got {self.new}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"--depth must be at least 1, got {self.depth}")


@dataclass(frozen=True)
class Report:
    """The errors of all stages, in order of computation, and the data of the figures."""

    config: ParityConfig
    case: ParityCase
    rows: list[StageError]
    tokens: GreedyTokens | None
    seconds: float
    peak_bytes: int
    # For the figures, stages of the first row by name: ours and transformers'.
    first_row: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def by_ratio(self) -> bool:
        """Whether errors are compared with transformers' own, in bfloat16."""
        return any(row.baseline[0] for row in self.rows)

    @property
    def first_divergence(self) -> str | None:
        """The first stage that adds an error of its own; if there is none, the first with too
        large an accumulated error; then "tokens" and "text"."""
        stages = [row.stage for row in self.rows if row.diverges]
        stages += [row.stage for row in self.rows if row.over_limit]
        if self.tokens and not self.by_ratio and not self.tokens.equal:
            stages.append("tokens")
        if self.tokens and not self.tokens.texts_equal:
            stages.append("text")
        return stages[0] if stages else None


def run(config: ParityConfig) -> Report:
    """Run the comparison that `config` describes.

    Raises:
        ValueError: The comparison is not possible.
    """
    case = load_parity_case(
        config.model,
        config.numerics,
        config.images,
        config.prompts,
        config.suffixes,
        config.depth,
        config.against,
    )
    form = choose_attention(config.attention)
    settings = replace(case.checkpoint.config, attention=form)
    case = replace(case, checkpoint=replace(case.checkpoint, config=settings))
    return compare(config, case)


def compare(config: ParityConfig, case: ParityCase) -> Report:
    """Run transformers, then this model. A large model is in memory layer by layer only."""
    start = time.perf_counter()
    bfloat16 = config.dtype == "bfloat16"
    if bfloat16:
        case = replace(case, checkpoint=case.checkpoint.with_dtype("bfloat16"))
    _check_memory(config, case)
    by_ratio = bfloat16 and not case.checkpoint.config.profile.float32_activations
    with jax.default_matmul_precision("highest"):
        reference = compute_reference(case, config.new, config.gradients, by_ratio, config.dtype)
        gc.collect()  # frees transformers' model
        model, read = jax_model.build_model(case.checkpoint, config.dtype)

        # Attention weights exist in the plain form only, the only one in float64.
        weights = reference.attention and case.checkpoint.config.attention == "plain"

        def compute(fed: Stages | None = None) -> Stages:
            return jax_model.compute_stages(model, read, case.inputs, weights, fed)

        stages = compute()
        fed = {
            name: value
            for name, value in reference.fed.items()
            if weights or not name.endswith("attention/weights")
        }
        rows = list(input_errors(case))
        float64 = float64_stages(case, reference.attention) if config.float64 else None
        rows += stage_errors(case, stages, compute(fed), reference, by_ratio, float64)
        tokens = None
        if config.new or config.gradients:
            model = with_parameters(model, read)
            rows.append(compiled_logits_error(case, model, reference, by_ratio, float64))
        if reference.gradients is not None:
            gradients = end_to_end.compute_gradients(model, case)
            exact = float64_gradients(case) if config.float64 else None
            rows += gradient_errors(gradients, reference.gradients, exact)
        if reference.greedy is not None:
            tokens = end_to_end.compare_greedy(model, case, reference.greedy)
    drawn = r"decoder/layers/\d+(/attention/weights)?|logits"
    first_row = {
        name: (stages[name][0], reference.stages[name][0])
        for name in stages
        if re.fullmatch(drawn, name) and stages[name].shape == reference.stages[name].shape
    }
    seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Report(config, case, rows, tokens, seconds, peak_bytes, first_row)


def _check_memory(config: ParityConfig, case: ParityCase) -> None:
    """Raise ValueError if the complete model is needed (four of them for gradients, eight more in
    float64) and does not fit in memory."""
    copies = 4 + 8 * config.float64 if config.gradients else 1 if config.new else 0
    needed = copies * WEIGHTS_FACTOR * weight_bytes(case, config.dtype)
    available = available_memory()
    if needed > available:
        remedy = "leave out --gradients"
        if not config.gradients:
            remedy = "give --new 0 to load one layer at a time"
        raise ValueError(
            f"{config.model} needs {needed / 2**30:.0f} GiB of memory, "
            f"but only {available / 2**30:.0f} GiB are available: {remedy}"
        )
