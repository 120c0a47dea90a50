"""`python -m convert`: converts checkpoints, and tells what they are."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m convert google-paligemma2-3b my-checkpoint --to jax --verify
  python -m convert my-checkpoint for-transformers --to huggingface --dtype bfloat16 --max-shard-size 5GB
  python -m convert pt_224.npz for-transformers --to huggingface --config a-huggingface-directory
  python -m convert my-checkpoint smaller --quantize nf4,embedding=int8
  python -m convert inspect my-checkpoint
"""
CHANGES = ("dtype", "resolution", "numerics", "quantize")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m convert", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="SRC", help="a Hugging Face directory, a checkpoint of this project, or a big_vision .npz")
    p.add_argument("destination", metavar="DST", type=Path, help="what to write; it appears under this name when complete")
    p.add_argument("--to", choices=("jax", "huggingface", "big_vision"), help="the format of DST; with --quantize jax, else to be named")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of every tensor; by default each keeps its own")
    p.add_argument("--resolution", type=int, metavar="PIXELS", help="resize the position embeddings for images of this size")
    p.add_argument("--numerics", choices=("transformers", "big_vision"), help="the profile to record; by default what SRC means")
    p.add_argument("--quantize", metavar="FORMAT", help='in 8 or 4 bits: int8, int4, nf4, "nf4-32-double,embedding=int8,vision=int8"')
    p.add_argument("--config", metavar="FILE", help="a config.json for SRC; or a Hugging Face directory, whose tokenizer comes along too")
    p.add_argument("--max-shard-size", type=_bytes, metavar="SIZE", help="of one safetensors file, as 5GB; by default those of SRC, or 5GB")
    p.add_argument("--verify", action="store_true", help="read DST back and compare every tensor")
    p.add_argument("--force", action="store_true", help="replace DST if it exists")
    p.add_argument("--dry-run", action="store_true", help="write nothing; print the tensors, their shapes, dtypes and bytes")
    return p


def inspector() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m convert inspect", description="Tells format, variant, parameters, dtype, resolution, and what is odd.")
    p.add_argument("source", metavar="SRC")
    p.add_argument("--config", metavar="FILE", help="as in conversion")
    p.add_argument("--json", action="store_true", help="one JSON object")
    return p


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["inspect"]:
            _inspect(inspector().parse_args(arguments[1:]))
        else:
            options = parser().parse_args(arguments)
            options.to = options.to or ("jax" if options.quantize else parser().error("the following arguments are required: --to"))
            _convert(options)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _convert(options: argparse.Namespace) -> None:
    from convert.formats import convert, opened, table, with_changes

    if options.dry_run:
        checkpoint = opened(Path(options.source).expanduser(), options.config)
        checkpoint = with_changes(checkpoint, options.to, **{name: getattr(options, name) for name in CHANGES})
        rows = table(checkpoint)
        width, middle = max(len(path) for path, *_ in rows), max(len(shape) for _, shape, *_ in rows)
        for path, shape, dtype, nbytes in rows:
            print(f"{path:{width}}  {shape:{middle}}  {dtype:8}  {nbytes:>14,}")
        print(f"{len(rows)} tensors, {checkpoint.nbytes:,} bytes, from {checkpoint.format} to {options.to}")
        return
    names = (*CHANGES, "config", "force", "verify")
    checkpoint = convert(
        options.source,
        options.destination,
        options.to,
        max_shard=options.max_shard_size,
        progress=_progress,
        **{name: getattr(options, name) for name in names},
    )
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{options.destination}: {options.to}, {len(checkpoint.tensors)} tensors, {checkpoint.nbytes / 1e6:,.1f} MB{', verified' * options.verify}")


def _inspect(options: argparse.Namespace) -> None:
    from convert.formats import inspect

    found = inspect(options.source, options.config)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        lines = value if isinstance(value, list) else [", ".join(f"{k} ({n})" for k, n in value.items())] if isinstance(value, dict) else [value]
        lines = [f"{line:,}" if isinstance(line, int) and name != "resolution" else str(line) for line in lines] or ["nothing"]
        print(f"{name:11} " + ("\n" + " " * 12).join(lines))


def _progress(name: str, nbytes: int):
    """A bar with bytes, speed and time left; none where stderr is not a terminal."""
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def stage():
        with tqdm(total=nbytes, desc=name, unit="B", unit_scale=True, disable=None) as bar:
            yield bar.update

    return stage()


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+\.?\d*) *([a-z]*)", text, re.IGNORECASE)
    if not found or (unit := UNITS.get(found[2].upper())) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB")
    if (size := int(float(found[1]) * unit)) < 1:
        raise argparse.ArgumentTypeError("a shard holds at least one byte")
    return size


if __name__ == "__main__":
    main()
