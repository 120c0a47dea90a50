"""The figures of a parity report, each as PNG bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from paligemma_jax.parity.run import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Marker and color of a stage by the end of its name. Red is for failures alone.
PARTS = {
    "attention/weights": ("o", "#0072b2"),
    "attention/output": ("s", "#56b4e9"),
    "mlp/output": ("^", "#009e73"),
    "": (".", "0.25"),
}
FAILURE, EDGE = "#d62728", "0.55"
FLOOR = 1e-9  # where an error of exactly 0 is drawn on a logarithmic axis
POINTS = 20_000


def draw_errors(report: Report) -> bytes:
    """Draw relative errors by stage with their limits: accumulated above, local below."""
    unplotted = ("pixels", "ids", "valid", "targets", "loss")
    rows = [row for row in report.rows if row.local and not row.stage.startswith(unplotted)]
    x = np.arange(len(rows))
    endings = [next(end for end in PARTS if row.stage.endswith(end)) for row in rows]
    figure, ((above,), (below,)) = make_figure(11, 6.2, 2, sharex=True)
    for index, axes in enumerate((above, below)):
        values = _relative([(row.accumulated, row.local)[index] for row in rows])
        for ending, (marker, colour) in PARTS.items():
            chosen = np.array([end == ending for end in endings])
            label = ending or "stage"
            axes.plot(x[chosen], values[chosen], marker, ms=5, label=label, color=colour)
        grey = dict(where="mid", color="0.6", lw=1)
        if report.by_ratio:
            baseline = _relative([row.baseline[index] for row in rows])
            axes.step(x, baseline, label="transformers' own", **grey)
        else:
            limits = [row.limits[index] for row in rows]
            axes.step(x, limits, ls="--", label="limit", **grey)
        failed = np.array([(row.over_limit, row.diverges)[index] for row in rows])
        if failed.any():
            ring = dict(ms=12, mfc="none", mec=FAILURE, label="over the limit")
            axes.plot(x[failed], values[failed], "o", **ring)
        axes.set(yscale="log", ylabel="relative error")
    above.set_title("accumulated since the inputs")
    below.set_title("of the stage alone, on transformers' input")
    named = [i for i in x if "/layers/" not in rows[i].stage or endings[i] == "attention/weights"]
    below.set_xticks(named, [_short(rows[i].stage) for i in named], rotation=90, fontsize=7)
    above.legend(frameon=False, fontsize=8, ncol=3)
    return to_png(figure)


def draw_logits(report: Report) -> bytes:
    """Draw our logits, and their differences, over transformers'."""
    valid = report.case.inputs.valid[0]
    ours, theirs = (logits[valid].reshape(-1) for logits in report.first_row["logits"])
    rng = np.random.default_rng(0)
    sample = rng.choice(len(ours), min(POINTS, len(ours)), replace=False)
    ours, theirs = ours[sample], theirs[sample]
    difference = ours - theirs
    largest = np.abs(difference).max()
    figure, ((left, right),) = make_figure(11, 4, 1, 2)
    left.plot(theirs, ours, ".", ms=2, alpha=0.4)
    left.axline((0, 0), slope=1, color="0.6", lw=1)
    left.set(xlabel="transformers", ylabel="this model", title=f"{len(ours):,} logits")
    right.plot(theirs, difference, ".", ms=2, alpha=0.4)
    right.set(xlabel="transformers", ylabel="difference", title=f"largest {largest:.1e}")
    return to_png(figure)


def has_attention(report: Report) -> bool:
    """Whether attention weights were compared."""
    return any(name.endswith("weights") for name in report.first_row)


def can_draw(draw: Callable[[Report], bytes], report: Report) -> bool:
    """Whether the data of a figure was compared."""
    if draw is draw_masks:
        return has_attention(report)
    return draw is not draw_logits or "logits" in report.first_row


def draw_masks(report: Report) -> bytes:
    """Draw attention weights averaged over heads, of a local and a global layer: transformers',
    ours, and the pairs of tokens that are masked in one model only."""
    names = [name for name in report.first_row if name.endswith("weights")][:2]
    inputs, config = report.case.inputs, report.case.checkpoint.config
    windows = config.decoder.windows(config.profile)
    figure, grid = make_figure(11, 3.9 * len(names), len(names), 3)
    for line, name in zip(grid, names, strict=True):
        ours, theirs = report.first_row[name]
        window = windows[int(name.split("/")[2])]
        kind = f"window {window}" if window < inputs.tokens.shape[1] else "no window"
        for axes, weights, model in (
            (line[0], theirs, "transformers"),
            (line[1], ours, "this model"),
        ):
            mean = np.where(weights.max(axis=0) > 0, weights.mean(axis=0), np.nan)
            axes.imshow(np.log10(np.maximum(mean, 1e-6)), cmap="viridis", vmin=-4, vmax=0)
            axes.set_title(f"{model}, {_short(name)}, {kind}", fontsize=9)
        difference = (theirs > 0).any(axis=0).astype(int) - (ours > 0).any(axis=0)
        difference = np.where(inputs.valid[0][:, None], difference, 0)
        line[2].imshow(difference, cmap="coolwarm", vmin=-1, vmax=1)
        line[2].set_title(f"masked in one model only: {np.count_nonzero(difference)}", fontsize=9)
        for axes in line:
            for edge in _token_edges(report):
                axes.axhline(edge, color=EDGE, lw=0.6)
                axes.axvline(edge, color=EDGE, lw=0.6)
            axes.set(xlabel="key", ylabel="query")
    return to_png(figure)


def draw_tokens(report: Report) -> bytes:
    """Draw the relative error of every decoder layer at every token of the first row."""
    layers = [
        np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
        for name, (ours, theirs) in report.first_row.items()
        if re.fullmatch(r"decoder/layers/\d+", name)
    ]
    errors = np.where(report.case.inputs.valid[0], np.array(layers), np.nan)
    figure, ((axes,),) = make_figure(11, 1.4 + 0.22 * len(layers), 1)
    image = axes.imshow(
        np.log10(np.maximum(errors, FLOOR)), aspect="auto", cmap="viridis", interpolation="nearest"
    )
    for edge in _token_edges(report):
        axes.axvline(edge, color="white", lw=1)
    axes.set(xlabel="token (lines separate pads, image, prompt and suffix)")
    axes.set(ylabel="decoder layer")
    figure.colorbar(image, label="log10 of the relative error", pad=0.01)
    return to_png(figure)


def _token_edges(report: Report) -> np.ndarray:
    """The boundaries between pads, image, prompt and suffix in the first row."""
    inputs, image_id = report.case.inputs, report.case.checkpoint.config.image_token_id
    kinds = [inputs.targets[0], inputs.tokens[0] == image_id, inputs.valid[0]]
    return np.flatnonzero(np.diff(np.select(kinds, [3, 1, 2], 0))) + 0.5


def _relative(errors: list) -> np.ndarray:
    return np.array([max(error.relative, FLOOR) for error in errors])


def _short(stage: str) -> str:
    return stage.replace("/layers/", " ").replace("/attention/weights", "").replace("/", " ")


def make_figure(
    width: float, height: float, rows: int, columns: int = 1, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "figures require the parity extra: pip install 'paligemma-jax[parity]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
