"""."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from convert import formats, orbax, peft
from paligemma_jax.model.config import PaliGemmaConfig

TINY = Path(__file__).parents[1] / "assets" / "tiny"


HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "vae-*.npz"]


def resolve(source: str | Path, presets: Iterable[str] = ()) -> Path:
    """The place of a checkpoint: "tiny" (the embedded default), a directory, an .npz, or a hub id ("google/paligemma2-3b-mix-224"), downloaded.

    presets: the names that the caller takes too, told with the others where there is no such checkpoint.
    """
    if str(source) == "tiny":
        return TINY
    directory = Path(source).expanduser()
    if directory.is_dir() or (directory.suffix == ".npz" and directory.is_file()):
        return directory
    if directory.exists():
        raise ValueError(f"{source} is a file; give the directory that holds config.json and model.safetensors")
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _download(source)
    named = "".join(f", nor {what}" for what in ("a directory", "a hub id like google/paligemma2-3b-mix-224", ", ".join(presets)) if what)
    raise ValueError(f"no such checkpoint: {source} is neither 'tiny'{named}")


def load_config(source: Path) -> PaliGemmaConfig:
    """The config of what `resolve` found."""
    return formats.load_config(under(source))


def files(source: Path) -> Path:
    """Where the tokenizer of what `resolve` found lies."""
    source = under(source)
    return source / orbax.FILES if (source / orbax.CONFIG).exists() else source


def codec_file(source: Path) -> Path | None:
    """The mask codec beside a checkpoint: vae-oid.npz as published, or another vae-*.npz or vae-*.safetensors."""
    place = files(source)
    found = sorted((place if place.is_dir() else place.parent).glob("vae-*"))
    return next((file for file in found if file.suffix in (".npz", ".safetensors")), None)


def under(source: Path) -> Path:
    """The checkpoint itself: of a LoRA adapter, the one that its config names."""
    if not peft.is_adapter(source):
        return source
    try:
        return resolve(peft.base_checkpoint(source))
    except ValueError as error:
        raise ValueError(f"{source} is an adapter: {error}; its base_model_name_or_path is in {peft.CONFIG}") from None


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
