"""Find a checkpoint: "tiny", a directory, an .npz file, a LoRA adapter, or a hub id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from convert import formats, orbax, peft
from convert.checkpoint import Checkpoint
from convert.config import load_config
from convert.files import user_path
from paligemma_jax.model.config import PaliGemmaConfig

TINY = Path(__file__).parents[1] / "assets" / "tiny"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "vae-*.npz"]


@dataclass(frozen=True)
class CheckpointSource:
    """Where the parts of a checkpoint are. Made by `resolve`, once per load, and passed on."""

    reference: str  # as given by the user
    weights: Path  # for an adapter, those of its base checkpoint
    adapter: Path | None  # directory of a LoRA adapter
    tokenizer_dir: Path
    codec_file: Path | None  # mask codec: vae-oid.npz, or another vae-*.npz or vae-*.safetensors

    @cached_property
    def config(self) -> PaliGemmaConfig:
        """The model's config. For a Hugging Face directory, only config.json is read."""
        if formats.detect_format(self.weights) == "huggingface":
            return load_config(self.weights)
        return self.checkpoint.config

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint: names, shapes and dtypes are checked; no tensor is read yet."""
        is_huggingface = formats.detect_format(self.weights) == "huggingface"
        return formats.read(self.weights, self.config if is_huggingface else None)


def resolve(
    reference: str | Path | CheckpointSource, presets: Iterable[str] = ()
) -> CheckpointSource:
    """Find the parts of a checkpoint, and download it if it is a hub id.

    Args:
        reference: "tiny" (the embedded model), a directory, an .npz file, or a hub id such as
            "google/paligemma2-3b-mix-224". A resolved source is returned unchanged.
        presets: Other names that the caller accepts, to list in the error.

    Raises:
        ValueError: There is no such checkpoint, or it cannot be downloaded.
    """
    if isinstance(reference, CheckpointSource):
        return reference
    weights, adapter = _locate(reference, presets), None
    if peft.is_adapter(weights):
        adapter = weights
        weights = _locate_base(adapter)
    is_ours = (weights / orbax.CONFIG).exists()
    directory = weights.parent if weights.is_file() else weights
    tokenizer_dir = directory / orbax.FILES if is_ours else directory
    codecs = sorted(tokenizer_dir.glob("vae-*"))
    codec_file = next((file for file in codecs if file.suffix in (".npz", ".safetensors")), None)
    return CheckpointSource(str(reference), weights, adapter, tokenizer_dir, codec_file)


def _locate(reference: str | Path, presets: Iterable[str]) -> Path:
    if str(reference) == "tiny":
        return TINY
    path = user_path(reference)
    if path.is_dir() or (path.suffix == ".npz" and path.is_file()):
        return path
    if path.exists():
        raise ValueError(
            f"{reference} is a file: give the directory that contains config.json and "
            "model.safetensors"
        )
    is_local = str(reference).startswith((".", "/", "~"))
    if isinstance(reference, str) and reference.count("/") == 1 and not is_local:
        return _download(reference)
    choices = ["'tiny'", "a directory", "a hub id like google/paligemma2-3b-mix-224"]
    names = ", ".join(presets)
    if names:
        choices.append(f"one of {names}")
    raise ValueError(
        f"no such checkpoint: {reference}; give {', '.join(choices[:-1])}, or {choices[-1]}"
    )


def _locate_base(adapter: Path) -> Path:
    """Find the checkpoint that an adapter's config names."""
    try:
        return _locate(peft.base_checkpoint(adapter), ())
    except ValueError as error:
        raise ValueError(
            f"cannot find the base checkpoint of the adapter {adapter}: {error} "
            f"(base_model_name_or_path in {peft.CONFIG})"
        ) from None


def _download(repo: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ValueError(
            f"downloading {repo} requires the hub extra: pip install 'paligemma-jax[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        raise ValueError(
            f"{repo} is gated: accept its license on its page on the Hub, then log in with "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{repo} does not exist on the Hub, or is private and you are not logged in "
            "(`hf auth login`)"
        ) from None
    except Exception as error:  # errors of the Hub, the network or the disk
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"{repo} is not a local directory and cannot be downloaded: "
            f"{lines[0] if lines else type(error).__name__}"
        ) from None
