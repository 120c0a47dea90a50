"""The pictures of a parity report, each as PNG bytes."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from paligemma_jax.parity.run import Report

PARTS = {"attention/weights": "o", "attention/output": "s", "mlp/output": "^", "": "."}
FLOOR = 1e-9  # where an error of exactly 0 is drawn on a logarithmic axis
POINTS = 20_000


def errors(report: Report) -> bytes:
    """Relative errors by stage: what comes together above, what each stage adds below, with the limits."""
    rows = [row for row in report.rows if row.local and not row.stage.startswith(("pixels", "ids", "valid", "targets", "loss"))]
    figure, (above, below) = _figure(11, 6.2, 2, sharex=True)
    x = np.arange(len(rows))
    for axes, which, title in ((above, 0, "from the inputs on"), (below, 1, "of the stage alone, on transformers' input")):
        errors = [(row.accumulated, row.local)[which] for row in rows]
        values = np.array([max(error.relative, FLOOR) for error in errors if error])
        for part, marker in PARTS.items():
            mine = np.array([row.stage.endswith(part) if part else not row.stage.endswith(tuple(PARTS)[:3]) for row in rows])
            axes.plot(x[mine], values[mine], marker, ms=5, label=part or "stage", color=f"C{list(PARTS).index(part)}")
        if report.narrow:
            own = [row.own[which] for row in rows]
            axes.step(x, [max(error.relative, FLOOR) for error in own if error], where="mid", color="0.6", lw=1, label="transformers' own")
        else:
            axes.step(x, [row.limits[which] for row in rows], where="mid", color="0.6", lw=1, ls="--", label="limit")
        bad = np.array([(row.beyond, row.diverges)[which] for row in rows])
        axes.plot(x[bad], values[bad], "o", ms=12, mfc="none", mec="red", label="beyond" if bad.any() else None)
        axes.set(yscale="log", ylabel="relative error", title=title)
    whole = [i for i, row in enumerate(rows) if "/layers/" not in row.stage or row.stage.endswith("/attention/weights")]
    below.set_xticks(whole, [_short(rows[i].stage) for i in whole], rotation=90, fontsize=7)
    above.legend(frameon=False, fontsize=8, ncol=3)
    return _png(figure)


def logits(report: Report) -> bytes:
    """Ours over theirs, and how far apart they are."""
    found, wanted = report.pictures["logits"]
    valid = report.case.inputs.valid[0]
    found, wanted = found[valid].reshape(-1), wanted[valid].reshape(-1)
    some = np.random.default_rng(0).choice(len(found), min(POINTS, len(found)), replace=False)
    found, wanted = found[some], wanted[some]
    figure, (left, right) = _figure(11, 4, 1, 2)
    left.plot(wanted, found, ".", ms=2, alpha=0.4)
    left.axline((0, 0), slope=1, color="0.6", lw=1)
    left.set(xlabel="transformers", ylabel="this model", title=f"{len(found):,} logits")
    right.plot(wanted, found - wanted, ".", ms=2, alpha=0.4)
    right.set(xlabel="transformers", ylabel="difference", title=f"largest {np.abs(found - wanted).max():.1e}")
    return _png(figure)


def masks(report: Report) -> bytes:
    """Attention weights, mean over the heads, of a local and a global layer: transformers', ours, and where one sees what the other does not."""
    names = [name for name in report.pictures if name.endswith("weights")][:2]
    figure, axes = _figure(11, 3.9 * len(names), len(names), 3)
    inputs, config = report.case.inputs, report.case.checkpoint.config.decoder
    windows = config.windows(report.case.checkpoint.config.profile)
    edges = [int(i) + 0.5 for i in np.flatnonzero(np.diff(_kinds(report)))]
    for line, name in zip(np.atleast_2d(axes), names):
        found, wanted = report.pictures[name]
        window = windows[int(name.split("/")[2])]
        for one, weights, who in zip(line, (wanted, found), ("transformers", "this model")):
            mean = np.where(weights.max(axis=0) > 0, weights.mean(axis=0), np.nan)
            one.imshow(np.log10(np.maximum(mean, 1e-6)), cmap="viridis", vmin=-4, vmax=0)
            one.set_title(f"{who}, {_short(name)}, {f'window {window}' if window < inputs.tokens.shape[1] else 'sees all'}", fontsize=9)
        seen = (wanted > 0).any(axis=0).astype(int) - (found > 0).any(axis=0)
        line[2].imshow(np.where(inputs.valid[0][:, None], seen, 0), cmap="coolwarm", vmin=-1, vmax=1)
        line[2].set_title(f"seen by one of them alone: {np.count_nonzero(seen[inputs.valid[0]])}", fontsize=9)
        for one in line:
            for edge in edges:
                one.axhline(edge, color="red", lw=0.4)
                one.axvline(edge, color="red", lw=0.4)
            one.set(xlabel="key", ylabel="query")
    return _png(figure)


def tokens(report: Report) -> bytes:
    """Relative error of every decoder layer at every token of the first row."""
    names = [name for name in report.pictures if re.fullmatch(r"decoder/layers/\d+", name)]
    off = [np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1) for a, b in (report.pictures[name] for name in names)]
    figure, axes = _figure(11, 1.4 + 0.22 * len(names), 1)
    grid = np.log10(np.maximum(np.where(report.case.inputs.valid[0], np.array(off), np.nan), FLOOR))
    image = axes.imshow(grid, aspect="auto", cmap="magma", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(_kinds(report))):
        axes.axvline(edge + 0.5, color="cyan", lw=0.8)
    axes.set(xlabel="token: pads, image, prompt, suffix (their edges are drawn)", ylabel="decoder layer")
    figure.colorbar(image, label="log10 of the relative error", pad=0.01)
    return _png(figure)


def _kinds(report: Report) -> np.ndarray:
    """Of the first row's tokens: 0 pad, 1 image, 2 prompt, 3 suffix."""
    inputs = report.case.inputs
    image = inputs.tokens[0] == report.case.checkpoint.config.image_token_id
    return np.where(inputs.targets[0], 3, np.where(image, 1, np.where(inputs.valid[0], 2, 0)))


def _short(stage: str) -> str:
    return stage.replace("/layers/", " ").replace("/attention/weights", "").replace("/", " ")


def _figure(width: float, height: float, rows: int, columns: int = 1, **options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("to draw a report, install the extra: pip install 'paligemma-jax[parity]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for one in np.atleast_1d(axes).flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
