"""What 8 and 4 bits take: answers of the embedded checkpoint on digits it never saw, and errors of layers of a published size.

    python -m tools.quantization_table --scenes 300
    python -m tools.quantization_table --layer 3b-224

Not a measure of speed: that is `paligemma-jax bench --quantize none int8 nf4`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert.quantized import quantizable_matrices
from paligemma_jax import Predictor, load
from paligemma_jax.inference.generate import encode_images
from paligemma_jax.model.codes import decode, encode
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.tiny import digits

FORMATS = ("int8", "int4-32", "int4-64", "nf4-32", "nf4-64", "nf4-64-double", "nf4-128")
HELD = ("none", *FORMATS, "embedding=int8", "embedding=nf4-32", "vision=int8", "vision=nf4", "cache=int8", "int8,embedding=int8,vision=int8")
HELD += ("nf4,embedding=int8,vision=int8", "nf4,embedding=int8,vision=int8,cache=int8")
TASKS = ("ocr", "count", "detect")


def answers(scenes: int, held: tuple[str, ...] = HELD, model: str = "tiny", dtype: str | None = None) -> Iterator[dict[str, float | str]]:
    """One row for each of `held`: bytes of the model, share of exact answers, of boxes found and spurious, and the error of `decoded`

    logits over their size. The dense model comes first, for that error.
    """
    if scenes < 1:
        raise ValueError(f"--scenes {scenes}: it can be 1 or more")
    for how in held:
        Quantization.parse(how)  # tells a name that is none before anything is measured
    samples = {task: tuple(zip(*digits.heldout(task, scenes))) for task in TASKS}
    images, prompts, truths = (list(part[:16]) for part in samples["ocr"])
    dense = None
    for how in ("none", *(how for how in held if how != "none")):
        predictor = load(model, quantize=how, dtype=dtype)
        logits = decoded(predictor, images, prompts, truths)
        dense = logits if dense is None else dense
        row: dict[str, float | str] = {"held": how, "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(predictor.model))}
        for task, (pictures, asked, expected) in samples.items():
            said = predictor.generate(list(pictures), list(asked), 48, progress=False)
            row |= {f"{task} {name}": value for name, value in digits.score_answers(task, said, expected).items() if (task, name) != ("detect", "exact")}
        yield row | {"logits": float(np.linalg.norm(logits - dense) / np.linalg.norm(dense))}


def decoded(predictor: Predictor, images: list, prompts: list[str], truths: list[str]) -> np.ndarray:
    """float32[n, B, V]: the logits for the first n tokens of the answers, all that the shortest has, each from the cache of those before it."""
    rows, asked, model = predictor.processor.encode(images, prompts, truths), predictor.processor(images, prompts), predictor.model
    n = min(len(row.suffix) for row in rows)
    prefill, step = jax.jit(type(model).prefill, static_argnames="slots"), jax.jit(type(model).decode_step)
    logits, cache = prefill(model, asked.tokens, encode_images(model, asked.images), asked.valid, asked.prefix, slots=asked.tokens.shape[1] + n)
    found = [logits]
    for token in np.array([row.suffix[: n - 1] for row in rows], np.int32).T:
        logits, cache = step(model, token, cache)
        found.append(logits)
    return np.stack(found)


def layer(name: str, rows: int = 8, seed: int = 0) -> Iterator[dict[str, float | str]]:
    """One row for each format, over the matrices of one decoder layer of a preset, normal weights: bits a number, errors of weights and of products.

    In both over the size of what is exact, root of mean squares; and that of bitsandbytes on the same weights, where it is installed.
    """
    rng, config = np.random.default_rng(seed), PaliGemmaConfig.preset(name)
    chosen = [m for m in quantizable_matrices(config).values() if m.module.startswith("decoder/layers/0/")]
    pairs = []
    for m in chosen:
        O, I = math.prod(m.shape[: -m.contracted]), math.prod(m.shape[-m.contracted :])
        pairs.append((rng.standard_normal((O, I), np.float32) * np.float32(I**-0.5), rng.standard_normal((I, rows), np.float32)))
    for name in FORMATS:
        format, found = WeightFormat.parse(name), []
        for matrix, x in pairs:
            parts = encode(format, jnp.asarray(matrix), 1)
            theirs = _bitsandbytes(format, matrix)
            found.append((sum(p.nbytes for p in parts.values()), *_errors(np.asarray(decode(format, parts, matrix.shape)), matrix, x)))
            found[-1] += _errors(theirs, matrix, x) if theirs is not None else (math.nan, math.nan)
        size, *errors = np.array(found).T
        numbers = [matrix.size for matrix, _ in pairs]
        names = ("weights", "products", "bitsandbytes' weights", "its products")
        yield {"held": name, "bits": 8 * size.sum() / sum(numbers)} | {n: float(np.average(e, weights=numbers)) for n, e in zip(names, errors)}


def _errors(found: np.ndarray, matrix: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    size = np.linalg.norm
    return float(size(found - matrix) / size(matrix)), float(size(found @ x - matrix @ x) / size(matrix @ x))


def _bitsandbytes(format: WeightFormat, matrix: np.ndarray) -> np.ndarray | None:
    """What it makes of the matrix; None if it has no such format, or is not installed."""
    if format.kind == "int4" or not find_spec("bitsandbytes"):
        return None
    import torch
    from bitsandbytes import functional

    if format.kind == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(torch.from_numpy(matrix).half())
        return functional.int8_vectorwise_dequant(codes, largest).numpy()
    flat = torch.from_numpy(matrix.ravel())  # else, where blocks run over rows, it reads the scales of others (0.50.2, on a CPU)
    packed, state = functional.quantize_4bit(flat, blocksize=format.block, quant_type="nf4", compress_statistics=format.double)
    return functional.dequantize_4bit(packed, state).numpy().reshape(matrix.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="of each task")
    parser.add_argument("--held", nargs="+", default=HELD, metavar="FORMAT", help="what to compare with the dense model")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", help="float32 on a CPU, else the checkpoint's")
    parser.add_argument("--layer", metavar="PRESET", help="errors of one layer of this size instead, 3b-224 for example")
    args = parser.parse_args()
    rows = layer(args.layer) if args.layer else answers(args.scenes, tuple(args.held), args.model, args.dtype)
    for n, row in enumerate(tqdm(rows, disable=None)):
        if not n:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print(
            "| "
            + " | ".join(f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value for value in row.values())
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
