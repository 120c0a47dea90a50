"""Checkpoints to models: finds a source, reads it tensor by tensor, puts each where it belongs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert import huggingface
from paligemma_jax.model.config import NUMERICS, PaliGemmaConfig
from paligemma_jax.model.layers import parameters, with_parameters
from paligemma_jax.model.paligemma import PaliGemma

TINY = Path(__file__).parent / "assets" / "tiny"
DTYPES = ("float32", "bfloat16", "float16")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def resolve(source: str | Path) -> Path:
    """The directory of a checkpoint: "tiny" (the embedded default), a directory, or a hub id ("google/paligemma2-3b-mix-224"), downloaded."""
    if str(source) == "tiny":
        return TINY
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{source} is a file; give the directory that holds config.json and model.safetensors")
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _download(source)
    raise ValueError(f"no such checkpoint: {source} is neither 'tiny', nor a directory, nor a hub id like google/paligemma2-3b-mix-224")


def abstract(config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes in the place of arrays: costs nothing, whatever its size."""
    return nnx.eval_shape(lambda: PaliGemma(config, nnx.Rngs(0)))


def load_config(directory: Path) -> PaliGemmaConfig:
    """The config of a directory that `resolve` found."""
    return huggingface.load_config(directory)


def load_model(directory: Path, dtype: str | None = None, numerics: str = "transformers") -> PaliGemma:
    """The model of a Hugging Face directory.

    dtype: of parameters and activations, one of DTYPES. By default the checkpoint's own; on a CPU float32, where bfloat16 is slower
    (43 ms for 3 ms in a 2304 x 9216 product). ValueError if the directory is not a whole PaliGemma checkpoint.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if numerics not in NUMERICS:
        raise ValueError(f"unknown numerics {numerics!r}; there are {', '.join(NUMERICS)}")
    config = load_config(directory)
    stored = huggingface.checkpoint_dtype(directory)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else stored)
    model = abstract(replace(config, dtype=dtype, numerics=numerics))
    arrays: dict[str, Any] = {}
    for path, array in huggingface.load_tensors(directory, config, parameters(model)):
        arrays[path] = jnp.asarray(array, dtype)
    return with_parameters(model, arrays.pop)


def _download(repo: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ValueError(f"to download {repo}, install the extra: pip install 'paligemma-jax[hub]'") from None
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its licence on its page on the hub, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{repo} does not exist on the hub, or is private and you are not logged in (`hf auth login`)") from None
    except Exception as error:  # of the hub, of the network below it, of the disk
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{repo} is not a directory here, and cannot be downloaded: {first}") from None
