"""The comparison with an engine as text and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.parity.compare import Error, error_limits

BFLOAT16_LIMIT = 0.1  # relative: two programs round differently at each step


@dataclass(frozen=True)
class EngineRow:
    """The accumulated error of one stage of one call, and its limit (relative)."""

    stage: str
    error: Error
    limit: float

    @property
    def diverges(self) -> bool:
        return not self.error.relative <= self.limit


@dataclass(frozen=True)
class EngineReport:
    """The comparison with an engine: rows in order of computation, for each call."""

    engine: str
    numerics: str
    dtype: str
    rows: list[EngineRow]
    equal_tokens: float | None  # fraction of greedy tokens, if any were generated

    @property
    def first_divergence(self) -> str | None:
        return next((row.stage for row in self.rows if row.diverges), None)


def format_engine_report(report: EngineReport) -> str:
    """The report as text."""
    lines = [
        f"against {report.engine}, {report.dtype}, with the numerics of {report.numerics}",
        "Errors are accumulated since the inputs. relative: norm of the difference / norm of the "
        "reference.",
        "",
        f"{'stage':40} {'max':>8} {'relative':>9} {'limit':>8}",
    ]
    for row in report.rows:
        mark = "  DIVERGES" if row.diverges else ""
        numbers = f"{row.error.max:8.1e} {row.error.relative:9.1e} {row.limit:8.1e}"
        lines.append(f"{row.stage:40} {numbers}{mark}")
    if report.equal_tokens is not None:
        lines += ["", f"{report.equal_tokens:.0%} of the greedy tokens are equal"]
    return "\n".join([*lines, "", engine_verdict(report)])


def engine_verdict(report: EngineReport) -> str:
    """The result in one sentence."""
    if report.first_divergence:
        return f"{report.engine}: {report.first_divergence} diverges first"
    return f"{report.engine}: every stage is within tolerance of the profile {report.numerics}"


def as_dict(report: EngineReport) -> dict:
    """Plain data, for --json."""
    return asdict(report) | {
        "first_divergence": report.first_divergence,
        "verdict": engine_verdict(report),
    }


def logits_limit(config: PaliGemmaConfig, dtype: str) -> float:
    """The limit of relative errors that have accumulated over all layers."""
    layers = config.vision.num_hidden_layers + config.decoder.num_hidden_layers
    return BFLOAT16_LIMIT if dtype == "bfloat16" else error_limits("logits", layers, False)[0]
