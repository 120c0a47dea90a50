"""Runs both models on the same inputs and compares them stage by stage."""

from __future__ import annotations

import gc
import math
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.inference import scoring
from paligemma_jax.model.config import NUMERICS
from paligemma_jax.model.tree import with_parameters
from paligemma_jax.parity import ours, torch_model, whole
from paligemma_jax.parity.compare import (
    GRADIENT,
    GROWTH,
    LOSS,
    NARROW,
    StageError,
    error,
    limits,
    seen,
)
from paligemma_jax.parity.inputs import ParityCase, load_parity_case
from paligemma_jax.training.losses import token_loss

SLACK = 1.5  # times its weights that a model takes as a whole: what is computed, and a tensor that is in two places while it is read
ATTENTION = 2**29  # bytes of attention weights up to which they are compared

Stages = dict[str, np.ndarray]


@dataclass(frozen=True)
class ParityConfig:
    """What to compare, and in which dtype."""

    model: str = "tiny"
    dtype: str = "float32"
    numerics: str | None = None
    images: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    new: int = 16  # greedy tokens
    gradients: bool = False
    depth: int | None = None

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; parity is compared in float32 or bfloat16")
        if self.numerics not in (None, *NUMERICS):
            raise ValueError(f"unknown numerics {self.numerics!r}; there are {', '.join(NUMERICS)}")
        if self.gradients and self.dtype != "float32":
            raise ValueError("--gradients are compared in float32")
        if self.new < 0 or (self.depth or 1) < 1:
            raise ValueError(f"--new is {self.new} and --depth {self.depth}: they count from 0 and from 1")


@dataclass(frozen=True)
class Report:
    """All rows in the order of computation, and what the pictures show."""

    plan: ParityConfig
    case: ParityCase
    rows: list[StageError]
    tokens: whole.Tokens | None
    about: dict[str, Any]
    pictures: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # of the first row: ours, theirs

    @property
    def narrow(self) -> bool:
        """Is it judged by ratios?"""
        return any(row.own[0] for row in self.rows)

    @property
    def first(self) -> str | None:
        """Where it first goes wrong: the first stage that adds an error of its own, else the first at which too much has come together."""
        found = [row.stage for row in self.rows if row.diverges] or [row.stage for row in self.rows if row.beyond]
        if self.tokens and not self.narrow and not self.tokens.equal:
            found.append("tokens")
        return found[0] if found else None


def run(plan: ParityConfig) -> Report:
    """ValueError if it cannot be compared."""
    return compare(plan, load_parity_case(plan.model, plan.numerics, plan.images, plan.prompts, plan.suffixes, plan.depth))


def compare(plan: ParityConfig, case: ParityCase) -> Report:
    """One model after the other, each only with the weights in memory that it is using, if there are many."""
    start = time.perf_counter()
    narrow = plan.dtype == "bfloat16"
    case = replace(case, checkpoint=case.checkpoint.with_dtype("bfloat16")) if narrow else case
    _check_room(plan, case)
    narrow = narrow and not case.checkpoint.config.profile.float32_activations
    with jax.default_matmul_precision("highest"):
        reference = reference_of(case, plan, narrow)
        gc.collect()  # of transformers' model nothing is needed any more
        model, read = ours.build(case.checkpoint, plan.dtype)
        run = lambda fed: ours.stages(model, read, case.inputs, reference.attention, fed)
        found = (run(None), run(reference.fed))
        rows = [*_given(case), *stage_rows(case, found, reference, narrow)]
        tokens = None
        if plan.new or plan.gradients:
            model = with_parameters(model, read)
            rows.append(_compiled(case, model, reference, narrow))
            rows += _gradients(whole.gradients(model, case), reference.gradients) if plan.gradients else []
            tokens = whole.greedy(model, case, reference.answers) if reference.answers else None
    shown = (name for name in found[0] if re.fullmatch(r"decoder/layers/\d+(/attention/weights)?|logits", name))
    pictures = {name: (found[0][name][0], reference.run[name][0]) for name in shown}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {"transformers": torch_model.version(), "seconds": time.perf_counter() - start, "peak_bytes": peak}
    return Report(plan, case, rows, tokens, about, pictures)


@dataclass(frozen=True)
class Reference:
    """What transformers computed: in the dtype of the comparison, and in float32 from the inputs on and from stage to stage of that run."""

    run: Stages
    exact: Stages
    exact_local: Stages
    answers: tuple[np.ndarray, np.ndarray] | None
    gradients: Stages
    attention: bool

    @property
    def fed(self) -> Stages:
        """Attention weights are no stage that one can go on from."""
        return {name: value for name, value in self.run.items() if not name.endswith("/weights")}


def reference_of(case: ParityCase, plan: ParityConfig, narrow: bool = False) -> Reference:
    """Runs transformers; `narrow`: in bfloat16, and in float32 on the same weights."""
    config, profile = case.checkpoint.config, case.checkpoint.config.profile
    rows, tokens = case.inputs.tokens.shape
    per_layer = [(len(case.inputs.images), config.vision, config.vision.num_patches), (rows, config.decoder, tokens)]
    attention = sum(4 * n * t.num_hidden_layers * t.num_attention_heads * length**2 for n, t, length in per_layer) <= ATTENTION
    keep = SLACK * nbytes(case, "float32") < memory_left()

    def build(dtype: str) -> tuple[Any, Callable[..., Stages]]:
        model = torch_model.adapted(torch_model.build(case.checkpoint, case.directory, dtype, keep), profile)
        return model, lambda fed=None: torch_model.stages(model, case.inputs, profile, attention, fed)

    model, run = build("bfloat16" if narrow else "float32")
    found = run()
    answers = torch_model.greedy(model, case.asked, profile, plan.new) if plan.new else None
    if not narrow:
        return Reference(found, found, found, answers, torch_model.gradients(model, case) if plan.gradients else {}, attention)
    del model, run
    _, wide = build("float32")
    reference = Reference(found, wide(), {}, answers, {}, attention)
    return replace(reference, exact_local=wide(reference.fed))


def nbytes(case: ParityCase, dtype: str) -> int:
    return jnp.dtype(dtype).itemsize * sum(math.prod(tensor.shape) for tensor in case.checkpoint.tensors.values())


def memory_left() -> int:
    """Bytes that can be had without swapping; where the system does not tell, half of what it has."""
    told = Path("/proc/meminfo")
    if told.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", told.read_text())):
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _check_room(plan: ParityConfig, case: ParityCase) -> None:
    """ValueError where this model would have to be whole in memory and cannot be; with its gradients, and transformers with its own."""
    need = (4 if plan.gradients else 1 if plan.new else 0) * SLACK * nbytes(case, plan.dtype)
    if need > (left := memory_left()):
        way = "leave out --gradients" if plan.gradients else "give --new 0, for which one layer at a time is"
        raise ValueError(f"{plan.model} takes {need / 2**30:.0f} GiB of memory, of which {left / 2**30:.0f} are left: {way}")


def _given(case: ParityCase) -> Iterator[StageError]:
    """Ids and pixels, which have to be the same to the bit."""
    if case.processor is None:
        return
    for name, found, wanted in torch_model.processed(case):
        off = error(found, wanted)
        yield StageError(name, off, off, (0.0, 0.0))


def stage_rows(case: ParityCase, found: tuple[Stages, Stages], reference: Reference, narrow: bool = False) -> Iterator[StageError]:
    """Of what was found from the inputs on, and on transformers' stages."""
    layers = {name: i for i, name in enumerate(name for name in found[0] if re.search(r"layers/\d+$", name))}
    gone = 0
    for name in found[0]:
        gone = layers.get(name, gone)
        all_ours, local, run, exact, exact_local = (
            seen(name, stages[name], case.inputs) for stages in (*found, reference.run, reference.exact, reference.exact_local)
        )
        own = (error(run, exact), error(run, exact_local)) if narrow else (None, None)
        yield StageError(name, error(all_ours, exact), error(local, exact_local), limits(name, gone, narrow), own)
    if case.inputs.targets.any():
        yield _loss(case, found[0]["logits"], reference, narrow)


def _loss(case: ParityCase, logits: np.ndarray, reference: Reference, narrow: bool) -> StageError:
    """Accumulated of our logits, local of theirs.

    A loss is the mean over n targets of a difference of numbers as large as the logits: of a small one, float32 has lost the digits, in
    transformers as here (tiny is so sure of its captions that 1e-3 of their loss of 1e-4 is rounding).
    """
    inputs = case.inputs
    mine = lambda logits: np.asarray(token_loss(jnp.asarray(logits), jnp.asarray(inputs.tokens), jnp.asarray(inputs.targets)))[None]
    run, exact = (torch_model.loss(stages["logits"], inputs) for stages in (reference.run, reference.exact))
    if narrow:  # of a single number no ratio is worth having: no further from float32 than transformers, or than what is lost in a step of bfloat16
        return StageError("loss", error(mine(logits), exact), error(mine(reference.run["logits"]), run), (2**-8, LOSS))
    lost = float(np.finfo(np.float32).eps * np.abs(reference.run["logits"]).max() / inputs.targets.sum() ** 0.5 / np.abs(run[0]))
    return StageError("loss", error(mine(logits), exact), error(mine(reference.run["logits"]), run), (max(GROWTH, lost), max(LOSS, lost)))


def _compiled(case: ParityCase, model: Any, reference: Reference, narrow: bool) -> StageError:
    """The logits of the whole model in one program, as it is used; layer by layer they are those of one program a layer."""
    logits = np.asarray(scoring.forward(model, case.inputs), np.float32)
    found, run, exact = (seen("logits", value, case.inputs) for value in (logits, reference.run["logits"], reference.exact["logits"]))
    own = error(run, exact) if narrow else None
    depth = case.checkpoint.config.vision.num_hidden_layers + case.checkpoint.config.decoder.num_hidden_layers
    return StageError("logits, one program", error(found, exact), None, (NARROW if narrow else GROWTH * (1 + depth) ** 0.5, 0.0), (own, None))


def _gradients(found: Stages, wanted: Stages) -> Iterator[StageError]:
    """Of each layer, and of what is in none, the parameter whose gradient is furthest off; backwards, as they are computed."""
    order: dict[str, list[StageError]] = {}
    for path in found:
        if not path.endswith("attention/k/bias"):  # zero but for rounding: softmax does not see what all keys share
            off = error(found[path], wanted[path])
            group = re.match(r"(\w+/layers/\d+|[^/]+)", path)
            order.setdefault(group[0] if group else path, []).append(StageError(f"gradient, {path}", off, None, (GRADIENT, 0.0)))
    for rows in reversed(order.values()):
        yield max(rows, key=lambda row: row.accumulated.relative)
