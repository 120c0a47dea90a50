"""Files of logits of unknown origin, with their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.big_vision import DAMAGED
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.processing.processor import Inputs

FLOATS, INTEGERS = "f", "iub"  # kinds of numpy's dtypes
EMPTY = np.empty(0)
# Names in files of logits, with those of transformers.
ALIASES = {
    "tokens": ("tokens", "input_ids"),
    "images": ("images", "pixel_values"),
    "valid": ("valid", "attention_mask"),
    "targets": ("targets", "token_type_ids"),
}


@dataclass(frozen=True)
class Sample:
    """Logits of unknown origin: float32[B, T, V], the inputs, and the dtype that made them."""

    logits: np.ndarray
    inputs: Inputs
    dtype: str


def read_sample(file: Path, config: PaliGemmaConfig) -> Sample:
    """Read a file of logits. ValueError if it does not fit the config."""
    arrays = _read_arrays(file)
    logits = _numbers(file, "logits", _required(file, arrays, "logits"), FLOATS)
    tokens = _numbers(file, "tokens", _required(file, arrays, "tokens"), INTEGERS).astype(np.int32)
    if not tokens.size:
        raise ValueError(f"{file}: tokens must not be empty, got {list(tokens.shape)}")
    if tokens.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"{file}: logits must be [B, T, V] for tokens [B, T], got {list(logits.shape)} and "
            f"{list(tokens.shape)}"
        )
    vocab = config.decoder.vocab_size
    if not config.image_token_id <= logits.shape[2] <= vocab:
        raise ValueError(f"{file}: logits must have {vocab} columns, got {logits.shape[2]}")
    if tokens.min() < 0 or tokens.max() >= max(vocab, config.image_token_id + 1):
        raise ValueError(f"{file}: tokens must be in [0, {vocab}), got {tokens.max()}")
    _require_finite(file, "logits", logits)
    ones, zeros = np.ones_like(tokens), np.zeros_like(tokens)
    flags = []
    for name, default in (("valid", ones), ("targets", zeros)):
        array = _optional(arrays, name, default)
        if array.shape != tokens.shape:
            got, expected = list(array.shape), list(tokens.shape)
            raise ValueError(f"{file}: {name} must be {expected}, got {got}")
        flags.append(_numbers(file, name, array, INTEGERS).astype(bool))
    valid, targets = flags
    images = _images(file, arrays, config, int((tokens == config.image_token_id).sum()))
    inputs = Inputs(tokens=tokens, images=images, valid=valid, prefix=~targets, targets=targets)
    logits = logits.astype(np.float32)
    are_bfloat16 = not (logits.view(np.uint32) & 0xFFFF).any()
    return Sample(logits, inputs, "bfloat16" if are_bfloat16 else "float32")


def _numbers(file: Path, name: str, array: np.ndarray, kinds: str) -> np.ndarray:
    """The array, if it has numbers of these kinds. ValueError otherwise."""
    if array.dtype == "V2" and "f" in kinds:  # numpy does not know bfloat16, which JAX saves
        array = array.view(jnp.bfloat16).astype(np.float32)
    if array.dtype.kind not in kinds:
        expected = "floats" if "f" in kinds else "integers"
        raise ValueError(f"{file}: {name} must be {expected}, got {array.dtype}")
    return array


def _require_finite(file: Path, name: str, array: np.ndarray) -> None:
    infinite = np.argwhere(~np.isfinite(array))
    if len(infinite):
        place = infinite[0].tolist()
        raise ValueError(f"{file}: {name} must be finite, got {array[tuple(place)]} at {place}")


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError(f"{file} must be a .npz with logits, tokens and images")
            known = {"logits"}.union(*ALIASES.values())  # a checkpoint's arrays would be large
            return {name: content[name] if name in known else EMPTY for name in content.files}
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except DAMAGED as error:
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} is not a complete .npz file: save it with numpy.savez") from None


def _required(file: Path, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    names = ALIASES.get(name, (name,))
    found = next((arrays[alias] for alias in names if alias in arrays), None)
    if found is None:
        listed = sorted(arrays)
        present = ", ".join(listed[:8] + ["..."] * (len(listed) > 8)) or "nothing"
        raise ValueError(f"{file} must have {' or '.join(names)}, got {present}")
    return found


def _optional(arrays: dict[str, np.ndarray], name: str, default: np.ndarray) -> np.ndarray:
    return next((arrays[alias] for alias in ALIASES[name] if alias in arrays), default)


def _images(
    file: Path, arrays: dict[str, np.ndarray], config: PaliGemmaConfig, image_tokens: int
) -> np.ndarray | None:
    if not image_tokens:
        return None
    images = _numbers(file, "images", _required(file, arrays, "images"), FLOATS).astype(np.float32)
    size, count = config.vision.image_size, image_tokens / config.vision.num_patches
    if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
        images = np.moveaxis(images, 1, 3)
    if images.shape != (count, size, size, 3):
        raise ValueError(
            f"{file}: images must be [{count:g}, {size}, {size}, 3] for {image_tokens} image "
            f"tokens, got {list(images.shape)}"
        )
    _require_finite(file, "images", images)
    return images
