"""A parity report as text for the terminal and as plain numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any

from paligemma_jax.model.numerics import NUMERICS, Numerics
from paligemma_jax.parity import float64_report
from paligemma_jax.parity.compare import StageError
from paligemma_jax.parity.run import Report

# Changes that make transformers compute the other profile, by field of `Numerics`.
ADAPTATIONS = {
    "window": "every layer of transformers uses full attention",
    "window_decode": "every layer of transformers uses full attention",
    "capped_prefill": "the final softcap is removed from transformers' config",
    "capped_decode": "not compared: the softcap does not change greedy tokens",
    "first_position": "transformers gets positions from 0 (its generate counts from 1; equal in "
    "exact arithmetic)",
    "scale_query": "unchanged in transformers; equal in exact arithmetic",
    "float32_activations": "transformers runs in float32 on the same weights",
}
FLOAT32_NOTE = """\
Errors against transformers, accumulated since the inputs. Local: the error of one stage alone,
computed from transformers' output of the previous stage.
relative: norm of the difference / norm of the reference."""
RATIO_NOTE = """\
Relative errors against transformers in float32 on the same weights, accumulated since the inputs.
Local: the error of one stage alone, computed from transformers' bfloat16 output of the previous
stage. The limits apply to the ratio of our error to transformers' own error in bfloat16."""
FLOAT32_COLUMNS = ("max", "mean", "relative", "1-cosine", "limit", "local", "limit")
RATIO_COLUMNS = ("relative", "transformers", "ratio", "limit") + (
    "local",
    "transformers",
    "ratio",
    "limit",
)


def as_dict(report: Report) -> dict:
    """Return plain numbers, for --json; None for those that are not finite."""
    tokens = report.tokens
    content = {
        "config": asdict(report.config)
        | {
            name: getattr(report.case.checkpoint.config, name) for name in ("numerics", "attention")
        },
        "reference": reference(report),
        "first_divergence": report.first_divergence,
        "stages": [row.as_dict() for row in report.rows],
        "tokens": tokens
        and {
            "ours": tokens.ours.tolist(),
            "transformers": tokens.transformers.tolist(),
            "gaps": tokens.gaps.tolist(),
            "texts": tokens.texts,
            "first_differences": tokens.first_differences,
        },
        "float64_verdict": float64_report.verdict(report.rows),
        "adaptations": adaptations(report),
        "transformers": version("transformers"),
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
    }
    return _finite(content)


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def adaptations(report: Report) -> dict[str, str]:
    """The changes that made transformers compute the other profile, by field of `Numerics`."""
    profile, default = report.case.checkpoint.config.profile, NUMERICS["transformers"]
    if profile == default:
        return {}
    names = [field.name for field in fields(Numerics)]
    return {
        name: ADAPTATIONS[name]
        for name in names
        if getattr(profile, name) != getattr(default, name) or name == "capped_decode"
    }


def format_report(report: Report) -> str:
    """The complete report. Its table is at most 112 columns wide."""
    adapted = [f"  {name}: {text}" for name, text in adaptations(report).items()]
    parts = ["\n".join([summary(report), reference(report), cost(report), *adapted])]
    parts.append(_align(_table(report)))
    parts.append(f"{note(report)}\nA layer's local error is that of its worst part.")
    if details(report):
        parts.append("\n".join(details(report)))
    if report.tokens:
        parts.append("\n".join(_greedy_lines(report)))
    return "\n\n".join([*parts, verdict(report), *float64_lines(report)])


def summary(report: Report) -> str:
    """Describe the comparison in one line."""
    config, inputs, settings = report.config, report.case.inputs, report.case.checkpoint.config
    rows, tokens = inputs.tokens.shape
    return (
        f"{config.model}, {config.dtype}, {settings.numerics} numerics, "
        f"{settings.attention} attention, "
        f"against transformers {version('transformers')}: {rows} rows of {tokens} tokens, "
        f"{report.case.image_count} images, {inputs.targets.sum()} targets"
    )


def cost(report: Report) -> str:
    """Describe the time and memory of the comparison."""
    return f"{report.seconds:.0f} s, peak memory {report.peak_bytes / 2**30:.2f} GiB"


def reference(report: Report) -> str:
    """State who read the weights of transformers' model."""
    source, examples = report.case.source, report.case.examples
    if examples is None:
        return "only the computation is compared: both models have the same random weights"
    if source is None:
        return (
            "only the computation is compared: transformers has the weights that this project read "
            "(it reads a Hugging Face directory itself: --against DIR)"
        )
    peft = f" and peft {version('peft')}" if source.adapter else ""
    text = f"{source.reference} is read by transformers {version('transformers')}{peft}"
    if examples.theirs.released:
        text += "; it has no preprocessor_config.json, so images are processed as in the releases"
    return text


def details(report: Report) -> list[str]:
    """A line for each difference that numbers alone do not tell."""
    return [f"{row.stage}: {detail}" for row in report.rows for detail in row.details]


def note(report: Report) -> str:
    """Explain the columns."""
    text = RATIO_NOTE if report.by_ratio else FLOAT32_NOTE
    return f"{text}\n{float64_report.NOTE}" if report.config.float64 else text


def float64_lines(report: Report) -> list[str]:
    """The closing line, if float64 was computed."""
    line = float64_report.verdict(report.rows)
    return [line] if line else []


def verdict(report: Report) -> str:
    """State that all is within tolerance, or the first stage that is not."""
    first = report.first_divergence
    if first is None:
        tokens = f", {_compare_tokens(report)}" if report.tokens else ""
        text = f"within tolerance: {len(report.rows)} stages{tokens}"
        return text if report.case.source else f"{text}\n{reference(report)}"
    if first in ("tokens", "text"):
        return f"first divergence: {first} (every stage is within tolerance)"
    row = next(row for row in report.rows if row.stage == first)
    is_local = row.diverges and row.local is not None
    text = (
        f"first divergence: {first}, {'local' if is_local else 'accumulated'} "
        f"{row.checked[is_local]:.1e}, limit {row.limits[is_local]:.1e}"
    )
    if row.details:
        text = f"first divergence: {first}: {row.details[0]}"
    others = [other.stage for other in report.rows if other.diverges and other is not row]
    if others:
        text += f"\nalso diverging: {', '.join(others[:4])}"
    if len(others) > 4:
        text += f" and {len(others) - 4} more"
    return text


def format_number(value: float | None) -> str:
    """Format a number for the tables; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.2f}" if 0.05 < value < 100 else f"{value:.1e}"


def _table(report: Report) -> list[tuple[str, ...]]:
    """A line for each layer, with its worst local error, and for each part that diverges."""
    columns = RATIO_COLUMNS if report.by_ratio else FLOAT32_COLUMNS
    lines: list[tuple[str, ...]] = [("stage", *columns, "worst part")]
    if report.config.float64:
        columns = float64_report.make_room(columns, report.by_ratio)
        owners, below = zip(*(title.split(" ", 1) for title in float64_report.COLUMNS), strict=True)
        lines = [("", *("" for _ in columns), *owners, "")]
        lines.append(("stage", *columns, *below, "worst part"))
    parts: list[StageError] = []
    for row in report.rows:
        if re.search(r"^\w+/layers/\d+/.*(weights|output)$", row.stage):
            parts.append(row)
            if row.diverges:
                lines.append(_line(row, row, report))
        else:
            worst = max([*parts, row], key=_local_over_limit)
            lines.append(_line(row, worst, report))
            parts = []
    return lines


def _local_over_limit(row: StageError) -> float:
    return row.checked[1] / row.limits[1] if row.limits[1] else 0


def _line(row: StageError, worst: StageError, report: Report) -> tuple[str, ...]:
    error, local = row.accumulated, worst.local
    last = "" if worst is row else worst.stage.removeprefix(row.stage).strip("/")
    if row.diverges or row.over_limit:
        last = "<- diverges" if row.diverges else "<- over limit"
    if report.by_ratio:
        numbers = [*ratio_numbers(row, 0), *ratio_numbers(worst, 1)]
    else:
        numbers = [error.max, error.mean, error.relative, error.cosine, row.limits[0]]
        numbers += [local.relative, worst.limits[1]] if local else [None, None]
    if report.config.float64:
        numbers = float64_report.make_room(numbers, report.by_ratio) + float64_report.numbers(row)
    return (row.stage, *map(format_number, numbers), last)


def ratio_numbers(row: StageError, index: int) -> list[float | None]:
    """Relative error, transformers' own, their ratio and its limit: accumulated (index 0) or local
    (1)."""
    error, baseline = (row.accumulated, row.local)[index], row.baseline[index]
    if baseline is None:
        return [error.relative if error else None, None, None, None]
    assert error is not None
    return [error.relative, baseline.relative, row.checked[index], row.limits[index]]


def _compare_tokens(report: Report) -> str:
    assert report.tokens is not None
    differences = report.tokens.first_differences
    count = sum(at is not None for at in differences)
    if not count:
        return "greedy tokens equal"
    reason = "not judged in bfloat16" if report.by_ratio else "at ties"
    return f"greedy tokens differ in {count} of {len(differences)} rows ({reason})"


def _greedy_lines(report: Report) -> Iterator[str]:
    """Yield the answer of each row, once if both models agree."""
    tokens = report.tokens
    assert tokens is not None
    for row, at in enumerate(tokens.first_differences):
        ours, theirs = (array[row].tolist() for array in (tokens.ours, tokens.transformers))
        if tokens.texts:
            ours, theirs = (texts[row] for texts in tokens.texts)
        if at is None and ours == theirs:
            yield f"greedy tokens of row {row}: equal, {ours!r}"
        elif at is None:
            yield (
                f"greedy tokens of row {row}: equal, but their texts differ\n"
                f"  ours          {ours!r}\n  transformers  {theirs!r}"
            )
        else:
            yield (
                f"greedy tokens of row {row}: they differ from token {at} on, where transformers' "
                f"two largest logits are {tokens.gaps[row, at]:.1e} apart\n"
                f"  ours          {ours!r}\n  transformers  {theirs!r}"
            )


def _align(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
