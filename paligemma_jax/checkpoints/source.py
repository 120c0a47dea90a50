"""Find a checkpoint: "tiny", a directory, an .npz file, a LoRA adapter, a run, or a hub id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from convert import formats, orbax, peft
from convert.adapter import Adapter, merge
from convert.checkpoint import Checkpoint
from convert.config import load_config
from convert.files import user_path
from paligemma_jax.checkpoints.runs import CONFIG, RunState, find_result, is_run, is_state
from paligemma_jax.model.config import PaliGemmaConfig

TINY = Path(__file__).parents[1] / "assets" / "tiny"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "vae-*.npz"]


@dataclass(frozen=True)
class CheckpointSource:
    """Where the parts of a checkpoint are. Made by `resolve`, once per load, and passed on."""

    reference: str  # as given by the user
    weights: Path  # for an adapter or a training state, those of its base checkpoint
    adapter: Path | None  # directory of a LoRA adapter
    tokenizer_dir: Path
    codec_file: Path | None  # mask codec: vae-oid.npz, or another vae-*.npz or vae-*.safetensors
    state: RunState | None = None  # trained from `weights` and `adapter`
    note: str = ""  # what was chosen, if `reference` is a run

    @cached_property
    def config(self) -> PaliGemmaConfig:
        """The model's config. For a Hugging Face directory, only config.json is read."""
        if self.state is None and formats.detect_format(self.weights) == "huggingface":
            return load_config(self.weights)
        return self.checkpoint.config

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint, without `delta`: names, shapes and dtypes are checked; no tensor
        is read yet."""
        if self.state is not None:
            base = replace(self, state=None)
            if base.delta is None:
                return self.state.apply(base.checkpoint)
            # Its soft prompt or prefix was trained further, and is that of the state.
            delta = replace(base.delta, soft_prompt=None, prefix=None)
            return self.state.apply(merge(base.checkpoint, delta))
        is_huggingface = formats.detect_format(self.weights) == "huggingface"
        return formats.read(self.weights, self.config if is_huggingface else None)

    @property
    def has_adapter(self) -> bool:
        return bool(self.state.adapter if self.state else self.adapter)

    @cached_property
    def delta(self) -> Adapter | None:
        """The LoRA adapter to attach to `checkpoint` or to merge into it."""
        if self.state is not None:
            return self.state.adapter
        return peft.read(self.adapter, self.checkpoint.config) if self.adapter else None

    @property
    def soft_tokens(self) -> range:
        """The ids of the adapter's soft prompt, in front of each prompt."""
        return self.config.soft_tokens(self.delta.soft_tokens if self.delta else 0)

    @property
    def merged(self) -> Checkpoint:
        """The opened checkpoint with its adapter merged."""
        return merge(self.checkpoint, self.delta) if self.delta else self.checkpoint


def resolve(
    reference: str | Path | CheckpointSource,
    presets: Iterable[str] = (),
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> CheckpointSource:
    """Find the parts of a checkpoint, and download it if it is a hub id.

    Args:
        reference: "tiny" (the embedded model), a directory, an .npz file, a run or one of its
            checkpoints (RUN/checkpoints/200), or a hub id such as
            "google/paligemma2-3b-mix-224", also "google/paligemma2-3b-mix-224@REVISION". A resolved
            source is returned unchanged.
        presets: Other names that the caller accepts, to list in the error.
        base: The base checkpoint of an adapter or a run, if it is no longer where they say.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: There is no such checkpoint, or it cannot be downloaded.
    """
    if isinstance(reference, CheckpointSource):
        return reference
    location, note = _locate(reference, presets, revision), ""
    if is_run(location):
        location, chosen = find_result(location)
        note = f"{reference} is a run: loading {location}, {chosen}"
    if is_state(location):
        state = RunState(location)
        source = _resolve_base(location, base or state.settings.base or state.settings.model)
        return replace(source, reference=str(reference), state=state, note=note)
    if peft.is_adapter(location):
        weights = _resolve_base(location, base or peft.base_checkpoint(location)).weights
        return _source(str(reference), weights, location, note)
    if base is not None:
        raise ValueError(
            f"--base is for an adapter or a checkpoint of a run; {reference} is neither"
        )
    return _source(str(reference), location, None, note)


def find_adapter(reference: str | Path) -> Path:
    """Find the directory of an adapter, which may be the result of a run, and download it if it is
    a hub id. Its base is not opened.

    Raises:
        ValueError: There is no such directory, or it is not an adapter.
    """
    location = _locate(reference, ())
    location = find_result(location)[0] if is_run(location) else location
    if not peft.is_adapter(location):
        raise ValueError(
            f"an adapter must be a directory with {peft.CONFIG}, got {reference}: load a complete "
            "model with pg.load"
        )
    return location


def _source(reference: str, weights: Path, adapter: Path | None, note: str) -> CheckpointSource:
    is_ours = (weights / orbax.CONFIG).exists()
    directory = weights.parent if weights.is_file() else weights
    tokenizer_dir = directory / orbax.FILES if is_ours else directory
    codecs = sorted(tokenizer_dir.glob("vae-*"))
    codec_file = next((file for file in codecs if file.suffix in (".npz", ".safetensors")), None)
    return CheckpointSource(reference, weights, adapter, tokenizer_dir, codec_file, note=note)


def _locate(reference: str | Path, presets: Iterable[str], revision: str | None = None) -> Path:
    path = TINY if str(reference) == "tiny" else user_path(reference)
    if path.is_dir() or (path.suffix == ".npz" and path.is_file()):
        if revision is not None:
            raise ValueError(f"revision applies to a hub id, but {reference} is a local checkpoint")
        return path
    if path.exists():
        raise ValueError(
            f"{reference} is a file: give the directory that contains config.json and "
            "model.safetensors"
        )
    is_local = str(reference).startswith((".", "/", "~"))
    repo, _, suffix = str(reference).partition("@")
    if isinstance(reference, str) and repo.count("/") == 1 and not is_local:
        if suffix and revision:
            raise ValueError(f"{reference} has a revision already: leave out revision={revision!r}")
        return _download(repo, suffix or revision)
    choices = ["'tiny'", "a directory", "a hub id like google/paligemma2-3b-mix-224"]
    names = ", ".join(presets)
    if names:
        choices.append(f"one of {names}")
    raise ValueError(
        f"no such checkpoint: {reference}; give {', '.join(choices[:-1])}, or {choices[-1]}"
    )


def _resolve_base(owner: Path, base: str | Path) -> CheckpointSource:
    """Resolve the base checkpoint of an adapter or of a training state."""
    is_adapter = peft.is_adapter(owner)
    try:
        source = resolve(base)
    except ValueError as error:
        kind, file = ("adapter", peft.CONFIG) if is_adapter else ("state", f"the run's {CONFIG}")
        raise ValueError(
            f"cannot find the base checkpoint of the {kind} {owner}: {error} (named in {file}; if "
            "it has moved, give its place with --base)"
        ) from None
    if is_adapter and (source.adapter or source.state):
        raise ValueError(
            f"the base checkpoint of the adapter {owner} must be a model, got {source.reference}"
        )
    return source


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ValueError(
            f"downloading {repo} requires the hub extra: pip install 'paligemma-jax[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
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
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repo} cannot be downloaded: it has no revision {revision}") from None
    except Exception as error:  # errors of the Hub, the network or the disk
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"{repo} is not a local directory and cannot be downloaded: "
            f"{lines[0] if lines else type(error).__name__}"
        ) from None
