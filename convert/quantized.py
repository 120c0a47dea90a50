"""Checkpoints whose matrices are codes and scales (`paligemma_jax/model/codes.py`): quantized as they go by, in parts, and whole again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from string import ascii_letters
from typing import NamedTuple

import numpy as np

from convert.checkpoint import Checkpoint
from convert.layout import layout_shape
from convert.match import Piece, alike, pieces
from convert.table import HUGGINGFACE
from convert.tensor import DTYPES, INTEGERS, Index, Tensor
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import Quantization, WeightFormat

STRIP = 2**27  # bytes of a matrix that are quantized at once


class Matrix(NamedTuple):
    """One that can be held in parts: "decoder/layers/0/mlp/down", of shape [out..., in...], under the name "kernel" when whole."""

    where: str
    name: str
    shape: tuple[int, ...]
    contracted: int  # how many of its axes are `in`

    @property
    def path(self) -> str:
        return f"{self.where}/{self.name}"

    @property
    def looked_up(self) -> bool:
        """Are its rows read one by one?"""
        return self.name == "table"


def quantizable_matrices(config: PaliGemmaConfig) -> dict[str, Matrix]:
    """Every matrix of a model, by its path when whole."""
    found = {}
    for piece in pieces(HUGGINGFACE[config.decoder.model_type], config):
        where, _, name = piece.path.rpartition("/")
        if name in ("kernel", "table") and len(axes := piece.layout.split()) == 2:  # torch's [out, in]: letters written together are one axis
            found[piece.path] = Matrix(where, name, layout_shape(piece.target, piece.sizes), len(axes[1]))
    return found


@cache
def part_shapes(format: WeightFormat, of: tuple[int, ...], contracted: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of the parts of a matrix."""
    import jax

    from paligemma_jax.model.codes import encode

    parts = jax.eval_shape(lambda matrix: encode(format, matrix, contracted), jax.ShapeDtypeStruct(of, "float32"))
    return {name: (part.shape, part.dtype.name) for name, part in parts.items()}


def quantize_checkpoint(checkpoint: Checkpoint, how: Quantization) -> Checkpoint:
    """The checkpoint with what `how` names held so. A part is computed, some rows at a time, when it is read: from the numbers in the file.

    What blocks do not divide stays as it is, and is told in the notes. ValueError if something is held otherwise already.
    """
    for where, held in checkpoint.formats.items():
        if (wanted := how.at(where)) not in (None, held):
            raise ValueError(f"{where} is held as {held} already and cannot be made {wanted}: start from the checkpoint that was quantized")
    known, tensors, formats, whole = quantizable_matrices(checkpoint.config), {}, dict(checkpoint.formats), []
    for path, tensor in checkpoint.tensors.items():
        matrix = known.get(path)
        wanted = how.at(matrix.where) if matrix else None
        if matrix is None or wanted is None:
            tensors[path] = tensor
        elif not wanted.fits(matrix.shape, matrix.looked_up):
            tensors[path] = tensor
            whole.append((matrix.where, matrix.shape))
        else:
            formats[matrix.where] = wanted
            for name, (of, dtype) in part_shapes(wanted, matrix.shape, matrix.contracted).items():
                raw = partial(_raw, tensor, wanted, matrix.contracted, name)
                tensors[f"{matrix.where}/{name}"] = Tensor(of, (DTYPES | INTEGERS)[dtype], raw)
    return replace(checkpoint, tensors=tensors, formats=formats, notes=checkpoint.notes + ((indivisible_note(whole),) if whole else ()))


def indivisible_note(whole: list[tuple[str, tuple[int, ...]]]) -> str:
    """What is told of matrices, as (path, shape), that were to be quantized and were not."""
    return f"left as they are, since blocks do not divide them: {', '.join(alike([f'{where} {list(of)}' for where, of in whole]))}"


def _raw(tensor: Tensor, format: WeightFormat, contracted: int, name: str, index: Index) -> np.ndarray:
    """The part `name` of a matrix that is in no memory yet: of the rows that are asked for alone, where they are those of the matrix."""
    from paligemma_jax.model.codes import quantize_scales

    of, nested = part_shapes(format, tensor.shape, contracted)[name][0], format.double and name != "codes"
    by_rows = name == "codes" or (not nested and (format.kind == "int8" or len(of) == len(tensor.shape)))
    rows, *rest = index if index and by_rows else (slice(None),)
    found = np.concatenate(list(_strips(tensor, replace(format, double=False), contracted, "scale" if nested else name, rows)))
    if nested:  # with the mean of all scales
        found = np.asarray(quantize_scales(found.reshape(-1))[name]).reshape(of)
    return found[(slice(None), *rest) if by_rows else index]


def _strips(tensor: Tensor, format: WeightFormat, contracted: int, name: str, rows: slice) -> Iterator[np.ndarray]:
    """A part of these rows, strip by strip; of all rows at once where blocks run over their ends."""
    start, stop, _ = rows.indices(tensor.shape[0])
    encoded = _encoder(format, contracted, name)
    if format.kind != "int8" and math.prod(tensor.shape[1:]) % format.block:
        part = np.asarray(encoded(tensor.load()))
        yield part[rows] if name == "codes" else part
        return
    step = max(1, STRIP * tensor.shape[0] // max(1, tensor.nbytes))
    for first in range(start, stop, step):
        yield np.asarray(encoded(tensor.load((slice(first, min(first + step, stop)),))))


@cache
def _encoder(format: WeightFormat, contracted: int, name: str) -> Callable:
    import jax

    from paligemma_jax.model.codes import encode

    return jax.jit(lambda matrix: encode(format, matrix, contracted)[name])


def dequantize_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every matrix whole again, in the dtype of its config; what rounding took is gone."""
    parts, tensors = checkpoint.parts, dict(checkpoint.tensors)
    tensors = {path: tensor for path, tensor in tensors.items() if path not in parts}
    for matrix in quantizable_matrices(checkpoint.config).values():
        if format := checkpoint.formats.get(matrix.where):
            parts = {name: checkpoint.tensors[f"{matrix.where}/{name}"] for name in part_shapes(format, matrix.shape, matrix.contracted)}
            tensors[matrix.path] = Tensor(matrix.shape, DTYPES[checkpoint.config.dtype], partial(_decoded, format, parts, matrix.shape))
    return replace(checkpoint, tensors=tensors, formats={})


def _decoded(format: WeightFormat, parts: Mapping[str, Tensor], of: tuple[int, ...], index: Index) -> np.ndarray:
    from jax.numpy import asarray

    from paligemma_jax.model.codes import decode

    return np.asarray(decode(format, {name: asarray(part.load()) for name, part in parts.items()}, of))[index]


def in_parts(found: Iterable[Piece], formats: Mapping[str, WeightFormat], config: PaliGemmaConfig) -> tuple[list[Piece], dict[str, str]]:
    """The pieces of this project's own layout with the parts of every matrix of `formats` in its place, and the dtypes of those.

    ValueError if a format is of no matrix, or of one that blocks do not divide.
    """
    known, result, dtypes = quantizable_matrices(config), [], {}
    if strange := formats.keys() - {matrix.where for matrix in known.values()}:
        raise ValueError(f"{', '.join(alike(sorted(strange)))}: no matrix of this model")
    for piece in found:
        matrix = known.get(piece.path)
        if matrix is None or not (format := formats.get(matrix.where)):
            result.append(piece)
            continue
        if not format.fits(matrix.shape, matrix.looked_up):
            raise ValueError(f"{matrix.where} {list(matrix.shape)} cannot be {format}: blocks do not divide it")
        for name, (of, dtype) in part_shapes(format, matrix.shape, matrix.contracted).items():
            path, letters = f"{matrix.where}/{name}", ascii_letters[: len(of)]
            result.append(Piece(path, (), " ".join(letters), path, " ".join(letters), dict(zip(letters, of))))
            dtypes[path] = dtype
    return result, dtypes
