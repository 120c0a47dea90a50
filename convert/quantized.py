"""Quantized checkpoints: matrices as codes and scales (`paligemma_jax/model/codes.py`), computed
in strips while they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from string import ascii_letters
from typing import NamedTuple

import numpy as np

from convert.checkpoint import Checkpoint
from convert.match import TensorEntry, Weight, collapse_layers, huggingface_weights, match, weights
from convert.table import JAX
from convert.tensor import DTYPES, INTEGERS, Index, Tensor
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import Quantization, WeightFormat

STRIP = 2**27  # bytes of a matrix that are quantized at once
PART_DTYPES = DTYPES | INTEGERS


class Matrix(NamedTuple):
    """A matrix [out..., in...] that can be quantized: the parameter `name` of a module."""

    module: str  # as in "decoder/layers/0/mlp/down"
    name: str  # "kernel" or "table"
    shape: tuple[int, ...]
    contracted: int  # how many of its axes are inputs

    @property
    def path(self) -> str:
        return f"{self.module}/{self.name}"

    def fits(self, format: WeightFormat) -> bool:
        """Whether blocks of this format divide the matrix, or each row of the embedding table."""
        return format.fits(self.shape, looked_up=self.name == "table")

    def parts(self, format: WeightFormat) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape and dtype of its parts in this format, by name."""
        return _part_shapes(format, self.shape, self.contracted)


def quantizable_matrices(config: PaliGemmaConfig) -> dict[str, Matrix]:
    """Every matrix of a model that can be quantized, by the path of its parameter."""
    matrices = {}
    for weight in huggingface_weights(config):
        module, _, name = weight.path.rpartition("/")
        axes = weight.file_layout.split()  # torch's [out, in], which merges axes
        if name in ("kernel", "table") and len(axes) == 2:
            matrices[weight.path] = Matrix(module, name, weight.model_shape, len(axes[1]))
    return matrices


@cache
def _part_shapes(
    format: WeightFormat, shape: tuple[int, ...], contracted: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    import jax

    from paligemma_jax.model.codes import encode

    matrix = jax.ShapeDtypeStruct(shape, "float32")
    parts = jax.eval_shape(lambda matrix: encode(format, matrix, contracted), matrix)
    return {name: (part.shape, PART_DTYPES[part.dtype.name]) for name, part in parts.items()}


def quantize_checkpoint(checkpoint: Checkpoint, quantization: Quantization) -> Checkpoint:
    """Quantize the parts that `quantization` names. Nothing is computed before it is read.

    Matrices that cannot be divided into blocks are not quantized, and a note lists them. int8
    becomes w8a8, and the reverse, without a change of codes or scales.

    Raises:
        ValueError: If a matrix already has another format.
    """
    formats = dict(checkpoint.formats)
    for module, format in checkpoint.formats.items():
        target = quantization.at(module)
        if target is None:
            continue
        if target.stored != format.stored:
            raise ValueError(
                f"{module} is already {format} and cannot be quantized to {target}; "
                "start from the unquantized checkpoint"
            )
        formats[module] = target
    matrices = quantizable_matrices(checkpoint.config)
    tensors, indivisible = {}, []
    for path, tensor in checkpoint.tensors.items():
        matrix = matrices.get(path)
        format = quantization.at(matrix.module) if matrix else None
        if matrix is None or format is None:
            tensors[path] = tensor
        elif not matrix.fits(format):
            tensors[path] = tensor
            indivisible.append((matrix.module, matrix.shape))
        else:
            formats[matrix.module] = format
            for name, (shape, dtype) in matrix.parts(format).items():
                raw = partial(_encode_part, tensor, format, matrix, name)
                tensors[f"{matrix.module}/{name}"] = Tensor(shape, dtype, raw)
    notes = checkpoint.notes + ((indivisible_note(indivisible),) if indivisible else ())
    return replace(checkpoint, tensors=tensors, formats=formats, notes=notes)


def indivisible_note(matrices: list[tuple[str, tuple[int, ...]]]) -> str:
    """The note about matrices (path, shape) that are not quantized."""
    listed = collapse_layers([f"{module} {list(shape)}" for module, shape in matrices])
    return f"not quantized, because they cannot be divided into blocks: {', '.join(listed)}"


def _encode_part(
    tensor: Tensor, format: WeightFormat, matrix: Matrix, name: str, index: Index
) -> np.ndarray:
    """A slice of a part of a matrix that is not in memory. Only the rows needed are read, where the
    rows of the part are those of the matrix."""
    from paligemma_jax.model.codes import quantize_scales

    shape = matrix.parts(format)[name][0]
    nested = format.double and name != "codes"
    has_rows = not format.has_blocks or len(shape) == len(tensor.shape)
    by_rows = name == "codes" or (has_rows and not nested)
    rows, *rest = index if index and by_rows else (slice(None),)
    plain = replace(format, double=False)
    strips = _encode_strips(tensor, plain, matrix.contracted, "scale" if nested else name, rows)
    part = np.concatenate(list(strips))
    if nested:  # the mean of all scales is needed
        part = np.asarray(quantize_scales(part.reshape(-1))[name]).reshape(shape)
    return part[(slice(None), *rest) if by_rows else index]


def _encode_strips(
    tensor: Tensor, format: WeightFormat, contracted: int, name: str, rows: slice
) -> Iterator[np.ndarray]:
    """Yield a part of these rows in strips, or of all rows at once if blocks cross their ends."""
    encode_part = _encoder(format, contracted, name)
    if format.has_blocks and math.prod(tensor.shape[1:]) % format.block:
        part = np.asarray(encode_part(tensor.load()))
        yield part[rows] if name == "codes" else part
        return
    start, stop, _ = rows.indices(tensor.shape[0])
    step = max(1, STRIP * tensor.shape[0] // max(1, tensor.nbytes))
    for first in range(start, stop, step):
        strip = tensor.load((slice(first, min(first + step, stop)),))
        yield np.asarray(encode_part(strip))


@cache
def _encoder(format: WeightFormat, contracted: int, name: str) -> Callable:
    import jax

    from paligemma_jax.model.codes import encode

    return jax.jit(lambda matrix: encode(format, matrix, contracted)[name])


def dequantize_checkpoint(
    checkpoint: Checkpoint, modules: Collection[str] | None = None
) -> Checkpoint:
    """Replace codes and scales by the matrices they represent, in the config's dtype. By default
    those of all modules."""
    formats = checkpoint.formats
    dense = formats.keys() if modules is None else formats.keys() & set(modules)
    kept = {module: format for module, format in formats.items() if module not in dense}
    quantized = checkpoint.parts - replace(checkpoint, formats=kept).parts
    tensors = {path: t for path, t in checkpoint.tensors.items() if path not in quantized}
    dtype = DTYPES[checkpoint.config.dtype]
    for path, matrix in quantizable_matrices(checkpoint.config).items():
        if matrix.module in dense:
            format = formats[matrix.module]
            names = matrix.parts(format)
            parts = {name: checkpoint.tensors[f"{matrix.module}/{name}"] for name in names}
            raw = partial(_decode, format, parts, matrix.shape)
            tensors[path] = Tensor(matrix.shape, dtype, raw)
    return replace(checkpoint, tensors=tensors, formats=kept)


def _decode(
    format: WeightFormat, parts: Mapping[str, Tensor], shape: tuple[int, ...], index: Index
) -> np.ndarray:
    from jax.numpy import asarray

    from paligemma_jax.model.codes import decode

    arrays = {name: asarray(part.load()) for name, part in parts.items()}
    return np.asarray(decode(format, arrays, shape))[index]


def check_complete(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has the parameters that its config and formats describe.

    Raises:
        ValueError: Lists missing and unknown parameters, and wrong shapes.
    """
    config, entries = checkpoint.config, {}
    for path, tensor in checkpoint.tensors.items():
        entries[path] = TensorEntry(tensor.dtype.name, tensor.shape, lambda tensor=tensor: tensor)
    dense = weights(JAX[config.decoder.model_type], config)
    expected, _ = quantized_weights(dense, checkpoint.formats, config)
    match(entries, expected, dtypes=PART_DTYPES, source="the model", config_name="its config")


def quantized_weights(
    weights: Iterable[Weight], formats: Mapping[str, WeightFormat], config: PaliGemmaConfig
) -> tuple[list[Weight], dict[str, np.dtype]]:
    """Replace every matrix of `formats` by its parts.

    Returns:
        The weights in this project's own layout, and the dtypes of the parts by path.

    Raises:
        ValueError: If there is no such matrix, or if blocks do not divide it.
    """
    matrices = quantizable_matrices(config)
    unknown = formats.keys() - {matrix.module for matrix in matrices.values()}
    if unknown:
        listed = ", ".join(collapse_layers(sorted(unknown)))
        raise ValueError(f"the model has no matrix {listed}")
    result, dtypes = [], {}
    for weight in weights:
        matrix = matrices.get(weight.path)
        format = formats.get(matrix.module) if matrix else None
        if matrix is None or format is None:
            result.append(weight)
            continue
        if not matrix.fits(format):
            reason = "it cannot be divided into blocks"
            raise ValueError(f"{matrix.module} {list(matrix.shape)} cannot be {format}: {reason}")
        for name, (shape, dtype) in matrix.parts(format).items():
            path, letters = f"{matrix.module}/{name}", ascii_letters[: len(shape)]
            layout, sizes = " ".join(letters), dict(zip(letters, shape, strict=True))
            result.append(Weight(path, (), layout, path, layout, sizes))
            dtypes[path] = dtype
    return result, dtypes
