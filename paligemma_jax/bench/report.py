"""What `bench.run` measured, as a table to read and a chart to look at."""

from __future__ import annotations

from typing import Any

from paligemma_jax.bench import training

HEADER = (
    "model",
    "layers",
    "batch",
    "prompt",
    "by",
    "load s",
    "compile s",
    "first token ms",
    "prefill tokens/s",
    "matrix",
    "decode tokens/s",
    "copy",
    "GiB",
)
CACHED = ("model", "layers", "batch", "cached", "ms a step", "MB a step", "copy", "time", "bytes")
NOTE = """prompt: tokens of image and text. prefill: image encoder included. tokens/s: of all rows together, median (least - most) of the repeats.
matrix, copy: share of the machine's own matrix rate and copy bandwidth that the counted FLOPs and bytes come to; reading alone can beat copying.
x: times the speed of the line's contender that paligemma-jax has, each repeat against its neighbour. GiB: the device's peak, or what XLA reserves."""


def table(report: dict[str, Any]) -> str:
    """The whole report, for a terminal."""
    machine = report["machine"]
    head = f"{machine['device']}, {machine['cores']} cores, {machine['dtype']}: copies {machine['copy_bytes_s'] / 1e9:.3g} GB/s,"
    parts = [f"{head} multiplies {machine['matrix_flops_s'] / 1e12:.3g} TFLOP/s; jax {machine['jax']}"]
    if "training" in report:
        return "\n\n".join([*parts, _align([training.HEADER, *map(training.cells, report["training"])]), training.NOTE])
    parts.append(_align([HEADER, *map(_row, report["rows"])]))
    if cached := report["cached"]:
        parts.append(_align([CACHED, *(_cached(row, cached) for row in cached)]))
    return "\n\n".join([*parts, NOTE])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    ours = "compile_s" in row
    ratio = {name: f" x{factor:.2f}" for name, factor in row.get("slower", {}).items()}
    return (
        *(row["model"], row["layers"], str(row["batch"]), str(row["prompt_tokens"]), row["by"]),
        *((f"{row['load_s']:.1f}", f"{sum(row['compile_s'].values()):.1f}") if ours else ("", "")),
        spread_text(row["first_token_s"], 1e3),
        *(spread_text(row["prefill_tokens_s"]) + ratio.get("prefill", ""), f"{row['matrix_share']:.0%}"),
        *(spread_text(row["decode_tokens_s"]) + ratio.get("decode", ""), f"{row['bandwidth_share']:.0%}"),
        f"{row['memory_bytes'] / 2**30:.2f}" if ours else "",
    )


def _cached(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """With the growth of time and of bytes from the first case of the same model, layers and batch."""
    first = next(other for other in rows if all(other[key] == row[key] for key in ("model", "layers", "batch")))
    time, size = row["step_s"]["median"] / first["step_s"]["median"], row["step_bytes"] / first["step_bytes"]
    about = (row["model"], row["layers"], str(row["batch"]), str(row["cached_tokens"]), spread_text(row["step_s"], 1e3))
    return (*about, f"{row['step_bytes'] / 1e6:.0f}", f"{row['bandwidth_share']:.0%}", f"x{time:.2f}", f"x{size:.2f}")


def spread_text(values: dict[str, float], unit: float = 1.0) -> str:
    middle, least, most = (f"{values[name] * unit:.{0 if values['median'] * unit >= 100 else 2}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least} - {most})"


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def chart(report: dict[str, Any], path: str) -> None:
    """Bars of prefill and decode tokens/s, one group a case, one colour a contender, with the spread; written to `path` (.png, .svg, .pdf)."""
    from matplotlib.figure import Figure

    rows, machine = report["rows"], report["machine"]
    case = lambda row: f"{row['model']}\n{row['layers']}, batch {row['batch']}\n{row['prompt_tokens']} tokens"
    cases, names = (list(dict.fromkeys(key(row) for row in rows)) for key in (case, lambda row: row["by"]))
    figure = Figure(figsize=(3 + 2.4 * len(cases), 4.2), layout="constrained")
    figure.suptitle(f"{machine['device']}, {machine['dtype']}")
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode")):
        for i, name in enumerate(names):
            mine = [row for row in rows if row["by"] == name]
            values = [row[f"{phase}_tokens_s"] for row in mine]
            middle = [value["median"] for value in values]
            error = [[m - v["min"] for m, v in zip(middle, values)], [v["max"] - m for m, v in zip(middle, values)]]
            places = [cases.index(case(row)) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for row in mine]
            bars = axes.bar(places, middle, 0.75 / len(names), yerr=error, label=name, capsize=3, color=f"C{i}")
            axes.bar_label(bars, [f"{m:,.0f}" if m >= 100 else f"{m:.3g}" for m in middle], padding=2, fontsize=8)
        axes.set(title=phase, ylabel="tokens/s", xticks=range(len(cases)), xticklabels=cases)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
