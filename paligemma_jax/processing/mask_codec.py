"""Masks <-> 16 codes, which PaliGemma says as `<segNNN>`: the VQ-VAE of its segmentation, encoder and decoder.

The network is that of "All in Tokens" (arXiv:2301.02229; SwinTransformer/AiT, vae/models/VQVAE.py with configs/insseg). big_vision decodes with
it in evaluators/proj/paligemma/transfers/segmentation.py and encodes in pp/proj/paligemma/segmentation.py; the published weights are
gs://big_vision/paligemma/vae-oid.npz: 128 codes of width 512, 16 to 128 channels. The widths here are those of the file that is loaded.
Axes: B masks, H and W pixels, C channels, E width of a code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paligemma_jax.model.tree import parameters, with_parameters

SIDE = 64  # pixels along the side of a mask
GRID = 4  # codes along it: each halving is one of 4 convolutions
CODES = 16  # codes of a mask, row after row
VOCABULARY = 128
NO_CODEC = "no mask codec beside the checkpoint: put the published vae-oid.npz (gs://big_vision/paligemma/) into its directory"


class Residual(nnx.Module):
    """x + conv1(relu(conv3(relu(conv3(x)))))."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.net = nnx.List([nnx.Conv(width, width, (size, size), rngs=rngs) for size in (3, 3, 1)])

    def __call__(self, x: Array) -> Array:
        y = x
        for n, conv in enumerate(self.net):
            y = conv(nnx.relu(y) if n else y)
        return x + y


class MaskCodec(nnx.Module):
    """The VQ-VAE: `narrow` is the width after the first of the four halvings (each of the others doubles it), `width` that of a code."""

    def __init__(self, narrow: int = 16, width: int = 512, rngs: nnx.Rngs | None = None):
        rngs, wide = rngs or nnx.Rngs(0), narrow * 8
        half: Any = dict(kernel_size=(4, 4), strides=(2, 2), rngs=rngs)
        widths = [1, narrow, narrow * 2, narrow * 4, wide]
        self.down = nnx.List([nnx.Conv(a, b, padding=1, **half) for a, b in pairwise(widths)])
        self.encoder = nnx.List([Residual(wide, rngs) for _ in range(2)])
        self.to_code = nnx.Conv(wide, width, (1, 1), rngs=rngs)
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, width)))
        self.from_code = nnx.Conv(width, wide, (1, 1), rngs=rngs)
        self.decoder = nnx.List([Residual(wide, rngs) for _ in range(2)])
        widths = [wide, *widths[:0:-1]]
        self.up = nnx.List([nnx.ConvTranspose(a, b, padding=2, transpose_kernel=True, **half) for a, b in pairwise(widths)])
        self.to_mask = nnx.Conv(narrow, 1, (1, 1), rngs=rngs)

    def embed(self, masks: Array) -> Array:
        """float32[B, H, W] in 0..1, H and W multiples of 16 -> what the codes are to be near: float32[B, H/16, W/16, E]."""
        x = 2 * masks[..., None] - 1
        for conv in self.down:
            x = nnx.relu(conv(x))
        for block in self.encoder:
            x = block(x)
        return self.to_code(x)

    def nearest(self, x: Array) -> Array:
        """float32[..., E] -> int32[...]: the code at the smallest distance."""
        codebook = self.codebook[...]
        return jnp.argmin((codebook**2).sum(1) - 2 * x @ codebook.T, axis=-1)

    def draw(self, x: Array) -> Array:
        """float32[B, h, w, E] -> float32[B, 16 h, 16 w]: -1 outside of the mask, 1 inside."""
        x = nnx.relu(self.from_code(x))
        for block in self.decoder:
            x = block(x)
        for conv in self.up:
            x = nnx.relu(conv(x))
        return self.to_mask(x)[..., 0]

    def encode(self, masks: Any) -> np.ndarray:
        """float[B, 64, 64] in 0..1 -> codes int32[B, 16]."""
        if np.shape(masks)[1:] != (SIDE, SIDE):
            raise ValueError(f"masks are {list(np.shape(masks))}: pass [B, {SIDE}, {SIDE}], as `square` makes them")
        return np.asarray(_encode(self, jnp.asarray(masks, jnp.float32)))

    def decode(self, codes: Any) -> np.ndarray:
        """Codes int[B, 16] -> float32[B, 64, 64], above 0 where the mask is. ValueError for a number that is no code."""
        codes = np.asarray(codes, int)
        if codes.shape[1:] != (CODES,) or codes.min(initial=0) < 0 or codes.max(initial=0) >= VOCABULARY:
            raise ValueError(f"codes are {list(codes.shape)}: pass [B, {CODES}] of 0 to {VOCABULARY - 1}")
        return np.asarray(_decode(self, jnp.asarray(codes)))


@jax.jit
def _encode(codec: MaskCodec, masks: Array) -> Array:
    return codec.nearest(codec.embed(masks)).reshape(len(masks), CODES)


@jax.jit
def _decode(codec: MaskCodec, codes: Array) -> Array:
    return codec.draw(codec.codebook[...][codes.reshape(-1, GRID, GRID)])


def crop_mask(mask: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """float32[64, 64] in 0..1: what the codes of a mask (bool or uint8[H, W]) say of its box (left, top, right, bottom): bilinear, antialiased."""
    image = Image.fromarray(np.asarray(mask, bool).astype(np.uint8) * 255).crop(box)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255


# The files


def _names() -> dict[str, str]:
    """Path of a module here -> its name in the files; a number there is a place in torch's Sequential, which counts the relus."""
    rows = {"to_code": "encoder.10", "from_code": "decoder.0", "to_mask": "decoder.12"}
    rows |= {f"down/{n}": f"encoder.{2 * n}" for n in range(4)} | {f"up/{n}": f"decoder.{4 + 2 * n}" for n in range(4)}
    for side, first in (("encoder", 8), ("decoder", 2)):
        rows |= {f"{side}/{block}/net/{n}": f"{side}.{first + block}.net.{2 * n}" for block in range(2) for n in range(3)}
    return rows


def _name(path: str) -> str:
    """The published name of a parameter."""
    module, _, kind = path.rpartition("/")
    return f"{NAMES[module]}.{'weight' if kind == 'kernel' else kind}" if module else "_vq_vae._embedding"


NAMES = _names()
TORCH, FLAX = (3, 2, 0, 1), (2, 3, 1, 0)  # [h, w, in, out] -> [out, in, h, w], and back; in and out change places where a convolution enlarges


def tensors(codec: MaskCodec) -> dict[str, np.ndarray]:
    """Every parameter under its published name and in torch's layout."""
    return {_name(path): np.asarray(x).transpose(TORCH) if x.ndim == 4 else np.asarray(x) for path, x in parameters(codec).items()}


def from_tensors(found: Mapping[str, np.ndarray], source: Any = "the tensors") -> MaskCodec:
    """The codec of `tensors`, as wide as they are, in float32. ValueError names what is missing or of another shape; other names are ignored."""
    narrow, width = (found[name].shape[axis] if name in found else 1 for name, axis in (("encoder.0.weight", 0), ("_vq_vae._embedding", -1)))
    codec = nnx.eval_shape(lambda: MaskCodec(narrow, width, nnx.Rngs(0)))
    wanted = {_name(path): tuple(x.shape[axis] for axis in TORCH) if len(x.shape) == 4 else x.shape for path, x in parameters(codec).items()}
    wrong = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found or found[name].shape != shape]
    if wrong:
        raise ValueError(f"{source} is no VQ-VAE of masks: of {len(wanted)} tensors it lacks {', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}")
    array = lambda x: jnp.asarray(x.transpose(FLAX) if x.ndim == 4 else x, jnp.float32)
    return with_parameters(codec, lambda path: array(found[_name(path)]))


def load_codec(file: str | Path) -> MaskCodec:
    """The codec of an .npz (the published vae-oid.npz) or a .safetensors file. ValueError if it is none."""
    try:
        if Path(file).suffix == ".safetensors":
            found = load_file(file)
        else:
            with np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files if name.startswith(("encoder.", "decoder.", "_vq_vae._embedding"))}
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a VQ-VAE of masks ({error}): give the published vae-oid.npz") from None
    return from_tensors(found, file)


def save_codec(file: str | Path, codec: MaskCodec) -> None:
    """Writes a .safetensors file in float16."""
    save_file({name: np.ascontiguousarray(x, np.float16) for name, x in tensors(codec).items()}, file)
