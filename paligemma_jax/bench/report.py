"""Print what `bench` measured as a table, and draw it as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paligemma_jax.bench.clock import Record
from paligemma_jax.bench.training import MEMORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = (
    *("model", "layers", "batch", "prompt", "implementation", "load s", "compile s"),
    *("first token ms", "prefill tokens/s", "TFLOP/s", "decode tokens/s", "GB/s"),
    "GiB",
)
CACHED_HEADER = (
    *("model", "layers", "batch", "cached", "step ms", "step MB", "GB/s"),
    *("time", "bytes"),
)
TRAINING_HEADER = (
    *(
        "model",
        "train",
        "remat",
        "batch",
        "tokens",
        "implementation",
        "compile s",
        "step s",
        "tokens/s",
        "TFLOP/s",
    ),
    *("arguments", "temporaries", "GiB"),
)
NOTE = """\
prompt: image and text tokens. prefill: includes the image encoder. tokens/s: of all rows together;
median (min - max) of the repeats. TFLOP/s, GB/s: counted FLOPs and bytes relative to what a large
matrix product, and reading an array of as many bytes, reach in the same run. x: speedup of
paligemma-jax over this implementation, per repeat. GiB: memory of the largest program."""
TRAINING_NOTE = """\
tokens: image, prompt and answer tokens per row. TFLOP/s: counted FLOPs relative to what a large
matrix product reaches in the same run (MFU); rematerialization does not count. Memory in GiB, by
the compiler's analysis; arguments: weights, optimizer state and batch. x: speedup of paligemma-jax
over this implementation, per repeat."""


def table(report: Record) -> str:
    """Return the report as text for a terminal."""
    machine = report["machine"]
    parts = ["{device}, {cores} cores, {dtype}; jax {jax}".format_map(machine)]
    if "training" in report:
        rows = map(_training_cells, report["training"])
        return "\n\n".join([*parts, _align([TRAINING_HEADER, *rows]), TRAINING_NOTE])
    parts.append(_align([HEADER, *map(_cells, report["rows"])]))
    cached = report["cached"]
    if cached:
        parts.append(_align([CACHED_HEADER, *(_cached_cells(row, cached) for row in cached)]))
    return "\n\n".join([*parts, NOTE])


def _cells(row: Record) -> tuple[str, ...]:
    compiled = "compile_s" in row
    speedup = {phase: f" x{ratio:.2f}" for phase, ratio in row.get("slower", {}).items()}
    return (
        _name(row),
        row["layers"],
        str(row["batch"]),
        str(row["prompt_tokens"]),
        row["by"],
        f"{row['load_s']:.1f}" if compiled else "",
        f"{sum(row['compile_s'].values()):.1f}" if compiled else "",
        _spread(row["first_token_s"], 1e3),
        _spread(row["prefill_tokens_s"]) + speedup.get("prefill", ""),
        _share(row, "matrix_share", "matrix_flops_s", 1e12),
        _spread(row["decode_tokens_s"]) + speedup.get("decode", ""),
        _share(row, "bandwidth_share", "read_bytes_s", 1e9),
        f"{row['memory_bytes'] / 2**30:.2f}" if compiled else "",
    )


def _cached_cells(row: Record, rows: list[Record]) -> tuple[str, ...]:
    """Return the cells of a row, with time and bytes relative to the first row of the same model,
    layers and batch."""
    case = ("model", "quantize", "attention", "layers", "batch")
    first = next(other for other in rows if all(other[key] == row[key] for key in case))
    time = row["step_s"]["median"] / first["step_s"]["median"]
    return (
        _name(row),
        *(str(row[key]) for key in ("layers", "batch", "cached_tokens")),
        _spread(row["step_s"], 1e3),
        f"{row['step_bytes'] / 1e6:.0f}",
        _share(row, "bandwidth_share", "read_bytes_s", 1e9),
        f"x{time:.2f}",
        f"x{row['step_bytes'] / first['step_bytes']:.2f}",
    )


def _training_cells(row: Record) -> tuple[str, ...]:
    timed = ("", "", "")
    if "step_s" in row:
        speedup = f" x{row['slower']:.2f}" if "slower" in row else ""
        seconds, tokens = (
            f"{values['median']:.3g} ({values['min']:.3g} - {values['max']:.3g})"
            for values in (row["step_s"], row["tokens_s"])
        )
        share = _share(row, "matrix_share", "matrix_flops_s", 1e12)
        timed = (seconds, tokens + speedup, share)
    return (
        _name(row),
        *(str(row[key]) for key in ("train", "remat", "batch", "tokens", "by")),
        f"{row['compile_s']:.1f}" if "compile_s" in row else "",
        *timed,
        *(f"{row[name] / 2**30:.2f}" if name in row else "" for name in MEMORY),
    )


def _name(row: Record) -> str:
    """Return the model with what is not the default everywhere: `3b-224 int8 fused`."""
    parts = (row["model"], row.get("quantize", "none"), row["attention"])
    return " ".join(part for part in parts if part not in ("none", "plain"))


def _share(row: Record, share: str, roof: str, unit: float) -> str:
    return f"{row[share]:.0%} of {row[roof] / unit:.3g}"


def _spread(values: dict[str, float], unit: float = 1.0) -> str:
    digits = 0 if values["median"] * unit >= 100 else 2
    median, low, high = (f"{values[name] * unit:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} - {high})"


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def chart(report: Record, path: str) -> None:
    """Draw prefill and decode tokens/s as bars with their spread, and save them.

    One group of bars per case, one color per implementation.

    Args:
        path: A .png, .svg or .pdf file.
    """
    from matplotlib.figure import Figure

    machine = report["machine"]
    groups: dict[str, dict[str, Record]] = {}  # case -> implementation -> row
    for row in report["rows"]:
        batch = f"{row['layers']}, batch {row['batch']}"
        case = f"{_name(row)}\n{batch}\n{row['prompt_tokens']} tokens"
        groups.setdefault(case, {})[row["by"]] = row
    figure = Figure(figsize=(3 + 2.4 * len(groups), 4.2), layout="constrained")
    figure.suptitle(f"{machine['device']}, {machine['dtype']}")
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        _draw_bars(axes, phase, groups)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Axes, phase: str, groups: dict[str, dict[str, Record]]) -> None:
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = {
            place: rows[name][f"{phase}_tokens_s"]
            for place, rows in enumerate(groups.values())
            if name in rows
        }
        medians = [value["median"] for value in values.values()]
        below = [value["median"] - value["min"] for value in values.values()]
        above = [value["max"] - value["median"] for value in values.values()]
        places = [place + (i - (len(names) - 1) / 2) * width for place in values]
        bars = axes.bar(
            places,
            medians,
            0.75 / len(names),
            yerr=[below, above],
            label=name,
            capsize=3,
            color=f"C{i}",
        )
        labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in medians]
        axes.bar_label(bars, labels, padding=2, fontsize=8)
    axes.set(title=phase, ylabel="tokens/s", xticks=range(len(groups)), xticklabels=groups)
    axes.spines[["top", "right"]].set_visible(False)
