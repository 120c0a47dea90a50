"""The settings of a checkpoint's image processor, from the files of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct
from PIL import Image

from convert.typed_json import describe, load_json

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
TYPES = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")

Level = Annotated[float, Meta(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Meta(ge=1e-6, le=1e6)]
Levels = Annotated[list[Level], Meta(min_length=3, max_length=3)]
Deviations = Annotated[list[Deviation], Meta(min_length=3, max_length=3)]
Filter = Annotated[int, Meta(ge=0, le=5)]  # PIL.Image.Resampling
Channels = tuple[float, float, float]
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImageSettings:
    """How images become pixels. The defaults are those of the published checkpoints.

    Pixels are `(value * rescale_factor - mean) / std`, where a value is from 0 to 255.
    """

    on_white: bool = True  # composite transparency on white; else keep the color stored under it
    resize: bool = True  # else images must have the size of the model
    resample: int = Image.Resampling.BICUBIC
    rescale_factor: float | None = 1 / 255  # None does not rescale
    mean: Channels | None = HALF  # None does not normalize
    std: Channels = HALF


class _ImageProcessor(Struct):
    """SiglipImageProcessor, with its defaults. A flag of null is off."""

    image_processor_type: str | None = None
    do_convert_rgb: bool | None = True
    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    do_center_crop: bool | None = None
    do_pad: bool | None = None
    size: dict[str, int] | list[int] | int | None = None  # of 224 pixels
    resample: Filter = Image.Resampling.BICUBIC.value
    rescale_factor: Level = 1 / 255
    image_mean: Level | Levels = 0.5
    image_std: Deviation | Deviations = 0.5
    image_seq_length: int | None = None
    input_data_format: str | None = None


class _Processor(Struct):
    image_processor: _ImageProcessor | None = None


def read_image_settings(directory: Path, size: int, tokens: int) -> ImageSettings:
    """Read the settings of a checkpoint as transformers 5.23 does.

    `image_processor` in processor_config.json, as release 5 writes it, comes before
    preprocessor_config.json. Without either, the settings are those of the published checkpoints.

    Args:
        directory: The directory of these files.
        size: Pixels per side of the model's images.
        tokens: Image tokens per image of the model.

    Raises:
        ValueError: A file is not valid, does not fit the model, or has a setting that is not
            supported.
    """
    file = directory / PROCESSOR
    found = load_json(file, _Processor).image_processor if file.is_file() else None
    if found is None:
        file = directory / PREPROCESSOR
        found = load_json(file, _ImageProcessor) if file.is_file() else None
    if found is None:
        return ImageSettings()
    error = _unsupported(found, size, tokens)
    if error:
        raise ValueError(f"{file}: {error}")
    return ImageSettings(
        on_white=bool(found.do_convert_rgb),
        resize=bool(found.do_resize),
        resample=found.resample,
        rescale_factor=found.rescale_factor if found.do_rescale else None,
        mean=_channels(found.image_mean) if found.do_normalize else None,
        std=_channels(found.image_std),
    )


def _unsupported(found: _ImageProcessor, size: int, tokens: int) -> str:
    """Describe the first setting that this model cannot follow."""
    kind = found.image_processor_type
    if kind not in (None, *TYPES):
        return f"image_processor_type must be {TYPES[0]}, got {describe(kind)}"
    for name in ("do_center_crop", "do_pad", "input_data_format"):
        if getattr(found, name):
            return f"{name} is not supported: remove it, and prepare the images so"
    fix = "use the files of one checkpoint"
    given, square = found.size or {"height": 224, "width": 224}, {"height": size, "width": size}
    if found.do_resize and given not in (square, [size, size]):
        return f"size must be {square}, image_size in config.json, got {given}: {fix}"
    if found.image_seq_length not in (None, tokens):
        patches = f"{tokens}, the number of patches in config.json"
        return f"image_seq_length must be {patches}, got {found.image_seq_length}: {fix}"
    return ""


def _channels(value: float | list[float]) -> Channels:
    red, green, blue = value if isinstance(value, list) else [value] * 3
    return red, green, blue
