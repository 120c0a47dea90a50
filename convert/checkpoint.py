"""`Checkpoint`: the form that every format is read into and written from, and changes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from convert.files import FileContent, json_bytes, parse_json
from convert.tensor import DTYPES, Index, Tensor
from convert.typed_json import JsonObject
from paligemma_jax.model.config import NUMERICS, PaliGemmaConfig, with_resolution
from paligemma_jax.model.precision import WeightFormat

# Files that mention dtype and resolution, and the values in them by key: old -> new.
CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
Edits = Mapping[str, Callable[[object], object]]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint of any format. No tensor is in memory: each is read when it is written
    elsewhere or put on devices.

    `config.numerics` is the profile that the source implies, and `config.dtype` the dtype of the
    largest tensor that is not quantized.
    """

    format: str  # "huggingface", "jax", "big_vision"
    config: PaliGemmaConfig
    tensors: dict[str, Tensor]  # by parameter path, in the order of the files
    files: dict[str, FileContent] = field(default_factory=dict)  # config.json, tokenizer, ...
    shards: dict[str, list[str]] = field(default_factory=dict)  # safetensors file -> its keys
    notes: tuple[str, ...] = ()  # anything unusual
    # By path of a quantized matrix, as in "decoder/layers/0/mlp/down"; `tensors` has its parts.
    formats: dict[str, WeightFormat] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parts(self) -> set[str]:
        """The paths of quantized codes and scales, whose dtypes are those of their formats."""
        return {
            path
            for path in self.tensors
            if path.rpartition("/")[0] in self.formats and not path.endswith("/bias")
        }

    @property
    def largest_dtype(self) -> str:
        """The dtype of the largest tensor that is not quantized."""
        parts = self.parts
        dense = [tensor for path, tensor in self.tensors.items() if path not in parts]
        return max(dense, key=lambda tensor: tensor.nbytes).dtype.name

    def with_dtype(self, dtype: str | None) -> Checkpoint:
        """Cast every tensor, rounding to nearest even. None keeps all dtypes."""
        if dtype is None:
            return self
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        parts = self.parts
        tensors = {
            path: tensor if path in parts else tensor.cast(dtype)
            for path, tensor in self.tensors.items()
        }
        config = replace(self.config, dtype=dtype)
        return replace(self, config=config, tensors=tensors).with_files(self.files)

    def with_files(self, files: dict[str, FileContent]) -> Checkpoint:
        """Take the tokenizer, processor and config.json of another checkpoint, with this dtype."""

        def dtype(old: object) -> object:
            return self.config.dtype

        return replace(self, files=_edit(files, {"dtype": dtype, "torch_dtype": dtype}))

    def with_resolution(self, size: int | None) -> Checkpoint:
        """Resample the position embeddings (`resample`) for images of `size` pixels."""
        vision = self.config.vision
        if size is None or size == vision.image_size:
            return self
        if size < 1 or size % vision.patch_size:
            multiple = f"a multiple of the patch size {vision.patch_size}"
            raise ValueError(f"resolution must be {multiple}, got {size}")
        config = with_resolution(self.config, size)
        position, patches = self.tensors["vision/position"], config.vision.num_patches

        def raw(index: Index) -> np.ndarray:
            return resample(position.numpy(), patches)[index]

        def pixels(old: object) -> object:
            if isinstance(old, dict) and set(old) <= {"height", "width"}:
                return dict.fromkeys(old, size)
            return old

        edits: Edits = {
            "image_size": lambda old: size,
            "num_image_tokens": lambda old: patches,
            "image_seq_length": lambda old: patches,
            "size": pixels,
        }
        resampled = Tensor((patches, vision.hidden_size), position.dtype, raw)
        tensors = self.tensors | {"vision/position": resampled}
        return replace(self, config=config, tensors=tensors, files=_edit(self.files, edits))

    def with_numerics(self, numerics: str | None) -> Checkpoint:
        """Record the profile (`paligemma_jax.model.numerics.NUMERICS`) that loading selects."""
        if numerics is None:
            return self
        if numerics not in NUMERICS:
            raise ValueError(f"numerics must be one of {', '.join(NUMERICS)}, got {numerics!r}")
        return replace(self, config=replace(self.config, numerics=numerics))


def _edit(files: dict[str, FileContent], edits: Edits) -> dict[str, FileContent]:
    """Replace the values of the keys of `edits` in CONFIG_FILES, at any depth; other files stay."""

    def edit(value: object) -> object:
        if isinstance(value, list):
            return [edit(item) for item in value]
        return edit_object(value) if isinstance(value, dict) else value

    def edit_object(value: JsonObject) -> JsonObject:
        return {
            key: edits[key](item) if key in edits and item is not None else edit(item)
            for key, item in value.items()
        }

    edited = dict(files)
    for name in files.keys() & set(CONFIG_FILES):
        old = parse_json(files[name])
        new = edit_object(old)
        if new != old:
            edited[name] = json_bytes(new)
    return edited


def resample(table: np.ndarray, patches: int) -> np.ndarray:
    """Resize the square grid of position embeddings [P, W] linearly, with aligned corners and
    antialiasing.

    Enlarging matches big_vision at load (`models/vit.py` resample_posemb: scipy.ndimage.zoom of
    order 1). Shrinking, where zoom would pick single points, weights the old points by a triangle
    as wide as the distance between new points. Computed in float32, then rounded to the dtype of
    `table`.
    """
    old, new = round(table.shape[0] ** 0.5), round(patches**0.5)
    points = np.linspace(0, old - 1, new) if new > 1 else np.array([(old - 1) / 2])
    step = max(1.0, (old - 1) / max(1, new - 1))
    kernel = np.maximum(0, 1 - np.abs(points[:, None] - np.arange(old)) / step)
    kernel = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)
    grid = table.astype(np.float32).reshape(old, old, -1)
    resized = np.einsum("ih,jw,hwW->ijW", kernel, kernel, grid, optimize=True)
    return resized.reshape(patches, -1).astype(table.dtype)
