"""A `Report` as a table for the terminal and as plain numbers."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import Any

from paligemma_jax.model.config import NUMERICS, Numerics
from paligemma_jax.parity.compare import StageError
from paligemma_jax.parity.run import Report

# What of a profile transformers can be made to compute too, where it differs from its own.
ADAPTED = {
    "sliding_window": "every layer of transformers is set to full attention",
    "capped_prefill": "the final softcap is taken out of transformers' config",
    "capped_decode": "not compared: greedy tokens are the same with and without the softcap",
    "first_position": "transformers is given positions from 0 (its generate counts from 1; equal in exact arithmetic)",
    "scale_query": "left as it is in transformers; equal in exact arithmetic",
    "float32_activations": "transformers runs in float32 on the same weights",
}
NOTE = {
    False: "Errors against transformers: from the inputs on; and local, of the stage alone, on transformers' own output of the stage before it.\n"
    "relative: norm of the difference / norm of the reference.",
    True: "Relative errors against transformers in float32 on the same weights: from the inputs on; and local, of the stage alone, on the output\n"
    "that transformers has in bfloat16 of the stage before it. What counts is how many times larger they are than transformers' own.",
}


def as_dict(report: Report) -> dict[str, Any]:
    """Plain numbers, for --json."""
    tokens = report.tokens and {
        "ours": report.tokens.ours.tolist(),
        "theirs": report.tokens.theirs.tolist(),
        "gaps": report.tokens.gaps.tolist(),
        "texts": report.tokens.texts,
        "first_difference": report.tokens.first,
    }
    plan = asdict(report.plan) | {"numerics": report.case.checkpoint.config.numerics}
    rows = [row.as_dict() for row in report.rows]
    return {"plan": plan, "first_divergence": report.first, "stages": rows, "tokens": tokens, "adapted": adapted(report), **report.about}


def adapted(report: Report) -> dict[str, str]:
    """Where the profile is not transformers' own: what was done about it, by field of `Numerics`."""
    mine, own = report.case.checkpoint.config.profile, NUMERICS["transformers"]
    return {
        f.name: ADAPTED[f.name]
        for f in fields(Numerics)
        if mine != own and (getattr(mine, f.name) != getattr(own, f.name) or f.name == "capped_decode")
    }


def table(report: Report) -> str:
    """The whole report, 112 columns at most."""
    note = f"{NOTE[report.narrow]}\nA layer's line is its output, and of its parts the one nearest to its limit."
    parts = [head(report), _align(_lines(report)), note]
    parts += [_tokens(report)] if report.tokens else []
    return "\n\n".join([*parts, verdict(report)])


def verdict(report: Report) -> str:
    if report.first is None:
        return f"within tolerance: {len(report.rows)} stages" + (f", {_equal(report)}" if report.tokens else "")
    if report.first == "tokens":
        return "first divergence: tokens (every stage is within tolerance)"
    row = next(row for row in report.rows if row.stage == report.first)
    which = row.diverges and row.local is not None
    others = [other.stage for other in report.rows if other.diverges and other is not row]
    where = f"first divergence: {row.stage}, {'local' if which else 'accumulated'} {row.judged[which]:.1e}, limit {row.limits[which]:.1e}"
    if not others:
        return where
    return f"{where}\nand, on transformers' input, in {', '.join(others[:4])}" + (f" and {len(others) - 4} more" if len(others) > 4 else "")


def head(report: Report) -> str:
    """What was compared; what it took; how transformers was adapted."""
    inputs, about, plan = report.case.inputs, report.about, report.plan
    rows, tokens = inputs.tokens.shape
    head = f"{plan.model}, {plan.dtype}, numerics {report.case.checkpoint.config.numerics}, against transformers {about['transformers']}: "
    head += f"{rows} rows of {tokens} tokens, {len(inputs.images)} images, {inputs.targets.sum()} targets"
    head += f"\n{about['seconds']:.0f} s, {about['peak_bytes'] / 2**30:.2f} GiB at most"
    return "\n".join([head, *(f"  {name}: {text}" for name, text in adapted(report).items())])


def _lines(report: Report) -> list[tuple[str, ...]]:
    """A layer is one line, with the worst of its parts; parts that diverge have lines of their own."""
    lines: list[tuple[str, ...]]
    if report.narrow:
        lines = [("stage", "relative", "theirs", "x", "limit", "local", "theirs", "x", "limit", "of")]
    else:
        lines = [("stage", "max", "mean", "relative", "1-cosine", "limit", "local", "limit", "of")]
    parts: list[StageError] = []
    for row in report.rows:
        if re.search(r"layers/\d+/.*(weights|output)$", row.stage) and "gradient" not in row.stage:
            parts.append(row)
            if not row.diverges:
                continue
            lines.append(_line(row, row, report.narrow))
        else:
            lines.append(_line(row, max([*parts, row], key=lambda part: part.judged[1] / part.limits[1] if part.limits[1] else 0), report.narrow))
            parts = []
    return lines


def _line(row: StageError, worst: StageError, narrow: bool) -> tuple[str, ...]:
    off, local = row.accumulated, worst.local
    mark = "<- diverges" if row.diverges else "<- beyond" if row.beyond else ""
    of = worst.stage.removeprefix(row.stage).strip("/") if worst is not row else ""
    if narrow:
        pairs = [(row.accumulated, *row.own[:1], row.judged[0], row.limits[0]), (local, worst.own[1], worst.judged[1], worst.limits[1])]
        texts = [cells(error and error.relative, own and own.relative, own and ratio, own and limit) for error, own, ratio, limit in pairs]
        return row.stage, *texts[0], *texts[1], mark or of
    texts = cells(off.max, off.mean, off.relative, off.cosine, row.limits[0], local and local.relative, local and worst.limits[1])
    return row.stage, *texts, mark or of


def cells(*values: float | None) -> list[str]:
    """Numbers as they stand in a table; nothing for None."""
    return ["" if value is None else "0" if value == 0 else f"{value:.2f}" if 0.05 < value < 100 else f"{value:.1e}" for value in values]


def _equal(report: Report) -> str:
    assert report.tokens is not None
    others = sum(at is not None for at in report.tokens.first)
    why = "not judged in bfloat16" if report.narrow else "at ties"
    return f"greedy tokens differ in {others} of {len(report.tokens.first)} rows ({why})" if others else "greedy tokens equal"


def _tokens(report: Report) -> str:
    """Each row's answer, once if both are the same."""
    tokens = report.tokens
    assert tokens is not None
    lines = []
    for row, at in enumerate(tokens.first):
        ours, theirs = (texts[row] for texts in tokens.texts) if tokens.texts else (str(a[row].tolist()) for a in (tokens.ours, tokens.theirs))
        gap = f"they differ from token {at} on, where transformers' best two logits are {tokens.gaps[row, at]:.1e} apart" if at is not None else ""
        lines.append(f"greedy tokens of row {row}: " + (f"equal, {ours!r}" if at is None else f"{gap}\n  ours   {ours!r}\n  theirs {theirs!r}"))
    return "\n".join(lines)


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
