"""`Checkpoint`: what every format is read into and written from, and the changes that can be made on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import json_bytes
from convert.tensor import DTYPES, Tensor
from paligemma_jax.model.config import NUMERICS, PaliGemmaConfig, with_resolution
from paligemma_jax.model.precision import WeightFormat

CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")  # these speak of dtype and resolution
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of any format. No tensor is in memory: they are read when written elsewhere, or put on devices.

    `config.numerics` is the profile that the source means. `dtype` in the config is that of the largest tensor that is not quantized.
    """

    format: str  # "huggingface", "jax", "big_vision"
    config: PaliGemmaConfig
    tensors: dict[str, Tensor]  # by parameter path, in the order of the files
    files: dict[str, Path | bytes] = field(default_factory=dict)  # what comes along: config.json, tokenizer, processor, generation
    shards: dict[str, list[str]] = field(default_factory=dict)  # safetensors file -> its keys as spelled, in order: to write the same again
    notes: tuple[str, ...] = ()  # what is odd about it
    formats: dict[str, WeightFormat] = field(default_factory=dict)  # of what is quantized: "decoder/layers/0/mlp/down", whose parts are tensors then

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parts(self) -> set[str]:
        """The paths of codes and scales: their dtypes are those of their formats."""
        return {path for path in self.tensors if path.rpartition("/")[0] in self.formats and not path.endswith("/bias")}

    def with_dtype(self, dtype: str | None) -> Checkpoint:
        """Every tensor as `dtype`; bfloat16 and float16 are rounded to nearest even. None leaves all as they are."""
        if dtype is None:
            return self
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
        parts = self.parts
        tensors = {path: tensor if path in parts else tensor.cast(dtype) for path, tensor in self.tensors.items()}
        files = self._edited({name: lambda _: dtype for name in DTYPE_KEYS})
        return replace(self, config=replace(self.config, dtype=dtype), tensors=tensors, files=files)

    def with_files(self, files: dict[str, Path | bytes]) -> Checkpoint:
        """With the tokenizer, processor and config.json of another checkpoint; what that says of the dtype is set right."""
        checkpoint = replace(self, files=files)
        return replace(checkpoint, files=checkpoint._edited({name: lambda _: self.config.dtype for name in DTYPE_KEYS}))

    def with_resolution(self, size: int | None) -> Checkpoint:
        """For images of `size` pixels: position embeddings resampled (`resample`), everything else as it is."""
        old = self.config.vision
        if size is None or size == old.image_size:
            return self
        if size < 1 or size % old.patch_size:
            raise ValueError(f"resolution {size} is not a multiple of the patch size {old.patch_size}")
        config = with_resolution(self.config, size)
        position = self.tensors["vision/position"]
        grid = lambda index: resample(position.read(), config.vision.num_patches)[index]
        tensor = Tensor((config.vision.num_patches, old.hidden_size), position.dtype, grid)
        tokens = lambda _: config.vision.num_patches
        pixels = lambda value: {key: size for key in value} if isinstance(value, dict) and {"height", "width"} >= set(value) else value
        edits = {"image_size": lambda _: size, "num_image_tokens": tokens, "image_seq_length": tokens, "size": pixels}
        return replace(self, config=config, tensors=self.tensors | {"vision/position": tensor}, files=self._edited(edits))

    def with_numerics(self, numerics: str | None) -> Checkpoint:
        """To be computed with this profile (`paligemma_jax.model.config.NUMERICS`) wherever it is loaded without naming one."""
        if numerics is None:
            return self
        if numerics not in NUMERICS:
            raise ValueError(f"unknown numerics {numerics!r}; there are {', '.join(NUMERICS)}")
        return replace(self, config=replace(self.config, numerics=numerics))

    def _edited(self, edits: dict[str, Callable[[Any], Any]]) -> dict[str, Path | bytes]:
        """The files with every value of a key of `edits` replaced in those that speak of dtype and resolution; the others verbatim."""

        def edit(value: Any) -> Any:
            if isinstance(value, list):
                return [edit(item) for item in value]
            if not isinstance(value, dict):
                return value
            return {key: edits[key](item) if key in edits and item is not None else edit(item) for key, item in value.items()}

        files = dict(self.files)
        for name in set(CONFIGS) & set(files):
            content = json.loads(contents(files[name]))
            if (edited := edit(content)) != content:
                files[name] = json_bytes(edited)
        return files


def contents(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def resample(table: np.ndarray, patches: int) -> np.ndarray:
    """Position embeddings [P, W] for `patches` patches: the square grid resized linearly, corner on corner, and antialiased.

    Enlarging, this is what big_vision does at load (`models/vit.py` resample_posemb: scipy.ndimage.zoom of order 1). Shrinking, where
    zoom would only pick single points, each new point is the mean of the old ones under a triangle as wide as the step between new
    points. Computed in float32, rounded to the dtype of `table`.
    """
    old, new = round(table.shape[0] ** 0.5), round(patches**0.5)
    at = np.linspace(0, old - 1, new) if new > 1 else np.array([(old - 1) / 2])
    step = max(1.0, (old - 1) / max(1, new - 1))
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)) / step)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    grid = table.astype(np.float32).reshape(old, old, -1)
    return np.einsum("ih,jw,hwW->ijW", weights, weights, grid, optimize=True).reshape(patches, -1).astype(table.dtype)
