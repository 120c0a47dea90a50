"""Masks to 16 codes and back: the VQ-VAE behind PaliGemma's `<segNNN>` tokens.

The network is that of "All in Tokens" (arXiv:2301.02229; SwinTransformer/AiT, vae/models/VQVAE.py
with configs/insseg). big_vision decodes with it in
evaluators/proj/paligemma/transfers/segmentation.py and encodes in
pp/proj/paligemma/segmentation.py. The published weights are
gs://big_vision/paligemma/vae-oid.npz: 128 codes of width 512, 16 to 128 channels. A loaded codec
has the widths of its file.

Axes: B masks, H and W pixels, C channels, E width of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from convert.big_vision import DAMAGED
from paligemma_jax.model.tree import parameters, with_parameters

SIDE = 64  # pixels along the side of a mask
GRID = 4  # codes along it: each of the four strided convolutions halves the side
CODES = 16  # codes of a mask, row after row
VOCABULARY = 128
READ_ERRORS = *DAMAGED, TypeError, KeyError, SafetensorError
NO_CODEC = (
    "no mask codec beside the checkpoint: put the published vae-oid.npz "
    "(gs://big_vision/paligemma/) into its directory"
)


class Residual(nnx.Module):
    """x + conv1(relu(conv3(relu(conv3(x)))))."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        convs = [nnx.Conv(width, width, (size, size), rngs=rngs) for size in (3, 3, 1)]
        self.net = nnx.List(convs)

    def __call__(self, x: Float32[Array, "B H W C"]) -> Float32[Array, "B H W C"]:
        conv1, conv2, conv3 = self.net
        return x + conv3(nnx.relu(conv2(nnx.relu(conv1(x)))))


class MaskCodec(nnx.Module):
    """The VQ-VAE.

    Args:
        narrow: Channels after the first of four halvings; each of the others doubles them.
        width: Width of a code.
    """

    def __init__(self, narrow: int = 16, width: int = 512, rngs: nnx.Rngs | None = None):
        rngs = rngs or nnx.Rngs(0)
        channels = [1, narrow, narrow * 2, narrow * 4, narrow * 8]
        wide = channels[-1]
        size, strides = (4, 4), (2, 2)
        self.down = nnx.List(
            nnx.Conv(a, b, size, strides, padding=1, rngs=rngs) for a, b in pairwise(channels)
        )
        self.encoder = nnx.List(Residual(wide, rngs) for _ in range(2))
        self.to_code = nnx.Conv(wide, width, (1, 1), rngs=rngs)
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, width)))
        self.from_code = nnx.Conv(width, wide, (1, 1), rngs=rngs)
        self.decoder = nnx.List(Residual(wide, rngs) for _ in range(2))
        self.up = nnx.List(
            nnx.ConvTranspose(a, b, size, strides, padding=2, transpose_kernel=True, rngs=rngs)
            for a, b in pairwise([wide, *channels[:0:-1]])
        )
        self.to_mask = nnx.Conv(narrow, 1, (1, 1), rngs=rngs)

    def embed(self, masks: Float32[Array, "B H W"]) -> Float32[Array, "B h w E"]:
        """Encode masks of values 0 to 1 to vectors, one per 16 x 16 pixels, before quantization."""
        x = 2 * masks[..., None] - 1
        for conv in self.down:
            x = nnx.relu(conv(x))
        for block in self.encoder:
            x = block(x)
        return self.to_code(x)

    def nearest(self, x: Float32[Array, "*B E"]) -> Int32[Array, "*B"]:
        """Return the nearest code to each vector."""
        codebook = self.codebook[...]
        return jnp.argmin((codebook**2).sum(1) - 2 * x @ codebook.T, axis=-1)

    def draw(self, x: Float32[Array, "B h w E"]) -> Float32[Array, "B H W"]:
        """Decode vectors to masks: about -1 outside and 1 inside."""
        x = nnx.relu(self.from_code(x))
        for block in self.decoder:
            x = block(x)
        for conv in self.up:
            x = nnx.relu(conv(x))
        return self.to_mask(x)[..., 0]

    def encode(self, masks: ArrayLike) -> Int32[np.ndarray, "B 16"]:
        """Encode masks float[B, 64, 64] of values 0 to 1, as `crop_mask` returns them."""
        if np.shape(masks)[1:] != (SIDE, SIDE):
            raise ValueError(
                f"masks must be [B, {SIDE}, {SIDE}], got {list(np.shape(masks))}: "
                "resize them with crop_mask"
            )
        return np.asarray(_encode(self, jnp.asarray(masks, jnp.float32)))

    def decode(self, codes: ArrayLike) -> Float32[np.ndarray, "B 64 64"]:
        """Decode codes int[B, 16] to masks, positive inside.

        Raises:
            ValueError: A number is not a code.
        """
        codes = np.asarray(codes, int)
        is_code = (codes >= 0) & (codes < VOCABULARY)
        if codes.shape[1:] != (CODES,) or not is_code.all():
            raise ValueError(
                f"codes must be [B, {CODES}] with values from 0 to {VOCABULARY - 1}, "
                f"got {list(codes.shape)}"
            )
        return np.asarray(_decode(self, jnp.asarray(codes)))


@jax.jit
def _encode(codec: MaskCodec, masks: Array) -> Array:
    return codec.nearest(codec.embed(masks)).reshape(len(masks), CODES)


@jax.jit
def _decode(codec: MaskCodec, codes: Array) -> Array:
    return codec.draw(codec.codebook[...][codes.reshape(-1, GRID, GRID)])


def crop_mask(
    mask: Bool[np.ndarray, "height width"] | UInt8[np.ndarray, "height width"],
    box: tuple[int, int, int, int],
) -> Float32[np.ndarray, "64 64"]:
    """Crop a mask to a box (left, top, right, bottom), and resize it for the codec.

    The filter is bilinear and antialiased. The values are 0 to 1.
    """
    image = Image.fromarray(np.asarray(mask, bool).astype(np.uint8) * 255).crop(box)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255


def _module_names() -> dict[str, str]:
    """Path of a module -> its published name, whose numbers count torch's relus as well."""
    names = {"to_code": "encoder.10", "from_code": "decoder.0", "to_mask": "decoder.12"}
    for n in range(4):
        names |= {f"down/{n}": f"encoder.{2 * n}", f"up/{n}": f"decoder.{4 + 2 * n}"}
    for side, first in (("encoder", 8), ("decoder", 2)):
        for block in range(2):
            for n in range(3):
                names[f"{side}/{block}/net/{n}"] = f"{side}.{first + block}.net.{2 * n}"
    return names


def _published_name(path: str) -> str:
    """The published name of a parameter."""
    module, _, kind = path.rpartition("/")
    if not module:
        return "_vq_vae._embedding"
    return f"{MODULE_NAMES[module]}.{'weight' if kind == 'kernel' else kind}"


MODULE_NAMES = _module_names()
# Kernel axes [h, w, in, out] to torch's [out, in, h, w], and back. In a transposed convolution, in
# and out are swapped on both sides.
TORCH, FLAX = (3, 2, 0, 1), (2, 3, 1, 0)


def tensors(codec: MaskCodec) -> dict[str, np.ndarray]:
    """Return every parameter under its published name and in torch's layout."""
    return {
        _published_name(path): np.asarray(x).transpose(TORCH) if x.ndim == 4 else np.asarray(x)
        for path, x in parameters(codec).items()
    }


def from_tensors(arrays: Mapping[str, np.ndarray], source: str | Path = "the file") -> MaskCodec:
    """Make a float32 codec from published names and layouts, with the widths of the arrays.

    Args:
        arrays: Arrays with other names are ignored.
        source: Named in the error.

    Raises:
        ValueError: An array is missing or has another shape.
    """
    first, codebook = arrays.get("encoder.0.weight"), arrays.get("_vq_vae._embedding")
    narrow = 1 if first is None else first.shape[0]
    width = 1 if codebook is None else codebook.shape[-1]
    codec = nnx.eval_shape(lambda: MaskCodec(narrow, width, nnx.Rngs(0)))
    expected = {}
    for path, x in parameters(codec).items():
        is_kernel = len(x.shape) == 4
        shape = tuple(x.shape[axis] for axis in TORCH) if is_kernel else x.shape
        expected[_published_name(path)] = shape
    wrong = [
        f"{name} {list(shape)}"
        for name, shape in expected.items()
        if name not in arrays or arrays[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{source} is not a mask codec: {len(wrong)} of {len(expected)} tensors are missing "
            f"or have another shape: {', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}"
        )

    def load(path: str) -> Array:
        x = arrays[_published_name(path)]
        return jnp.asarray(x.transpose(FLAX) if x.ndim == 4 else x, jnp.float32)

    return with_parameters(codec, load)


def load_codec(file: str | Path) -> MaskCodec:
    """Load the published vae-oid.npz, or another .npz or .safetensors file.

    Raises:
        ValueError: The file is not a mask codec.
    """
    names = ("encoder.", "decoder.", "_vq_vae._embedding")
    try:
        if Path(file).suffix == ".safetensors":
            arrays = load_file(file)
        else:
            with np.load(file, allow_pickle=False) as npz:
                arrays = {name: npz[name] for name in npz.files if name.startswith(names)}
    except READ_ERRORS as error:
        raise ValueError(
            f"{file} cannot be read as a mask codec ({error}): use the published vae-oid.npz"
        ) from None
    return from_tensors(arrays, file)


def save_codec(file: str | Path, codec: MaskCodec) -> None:
    """Write a .safetensors file in float16."""
    arrays = tensors(codec).items()
    save_file({name: np.ascontiguousarray(x, np.float16) for name, x in arrays}, file)
