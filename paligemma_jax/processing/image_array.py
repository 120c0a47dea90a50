"""Arrays of numpy, JAX or torch as images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA


@runtime_checkable
class SupportsArray(Protocol):
    """Anything that numpy can read: np.ndarray, jax.Array, torch.Tensor."""

    def __array__(self) -> np.ndarray: ...


def to_uint8(source: SupportsArray) -> UInt8[np.ndarray, "H W ..."]:
    """Check the array of one image, and return it as uint8[H, W] or [H, W, 3 or 4].

    Args:
        source: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; uint8 in 0 to 255, or any float type in
            0 to 1, which is scaled by 255 and rounded.

    Raises:
        ValueError: The array has another shape or dtype, or floats outside of [0, 1].
    """
    array = _to_numpy(source)
    _check_shape(array.shape)
    if array.shape[2:] == (1,):
        array = array[..., 0]
    if array.dtype == np.uint8:
        return array
    # The kind of bfloat16 is "V", like that of a structured dtype.
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ValueError(
            "an image array must be uint8 (0 to 255) or float (0 to 1), got "
            f"{array.dtype}: scale and cast it first"
        )
    values = array.astype(np.float32)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ValueError(
            f"a float image array must have values in [0, 1], got {low:.4g} to {high:.4g}: "
            "scale them, or pass uint8 for values from 0 to 255"
        )
    return np.round(values * 255).astype(np.uint8)


def _to_numpy(source: Any) -> np.ndarray:
    """Copy the array to the host, if it is not there."""
    try:
        if hasattr(source, "detach"):  # a torch tensor
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source  # bfloat16 too
        return np.asarray(source)
    except Exception as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"an image must be an array that numpy can read, got {type(source).__name__} "
            f"({reason[0]}): pass a numpy array"
        ) from None


def is_channels_first(shape: Sequence[int]) -> bool:
    """Whether an array of this shape can be an image [C, H, W], and not [H, W, C]."""
    return len(shape) == 3 and shape[0] in CHANNELS and shape[2] not in CHANNELS


def _check_shape(shape: tuple[int, ...]) -> None:
    if is_channels_first(shape) and 0 not in shape:
        raise ValueError(
            f"an image array must have its channels last, got {list(shape)}: transpose it with "
            "image.transpose(1, 2, 0), or image.permute(1, 2, 0) in torch"
        )
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in CHANNELS):
        raise ValueError(
            "an image array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
            f"got {list(shape)}: pass one image, channels last"
        )
