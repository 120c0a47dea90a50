"""Checkpoints to models: finds a source, reads it tensor by tensor, puts each where it belongs."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from convert import formats, orbax, peft
from convert.checkpoint import Checkpoint
from convert.files import companions
from convert.quantized import quantized
from convert.tensor import Tensor, loaded
from paligemma_jax import quantization
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.layers import parameters, with_parameters
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import Quantization
from paligemma_jax.scaling import hosts
from paligemma_jax.scaling.sharding import distribute, find_mesh, shardings
from paligemma_jax.training import lora

TINY = Path(__file__).parent / "assets" / "tiny"
DTYPES = ("float32", "bfloat16", "float16")
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


def abstract(config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes in the place of arrays: costs nothing, whatever its size."""
    return nnx.eval_shape(lambda: PaliGemma(config, nnx.Rngs(0)))


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
        return resolve(peft.base(source))
    except ValueError as error:
        raise ValueError(f"{source} is an adapter: {error}; its base_model_name_or_path is in {peft.CONFIG}") from None


def load_model(
    source: Path,
    dtype: str | None = None,
    numerics: str | None = None,
    mesh: Mesh | str | None = None,
    wide: Callable[[str], bool] = lambda path: False,
    quantize: str | None = None,
) -> PaliGemma:
    """The model of a checkpoint: a Hugging Face directory, one of this project's own, a big_vision .npz of a published variant, or a LoRA adapter.

    dtype: of parameters and activations, one of DTYPES. By default the checkpoint's own; on a CPU float32, where bfloat16 is slower
    (43 ms for 3 ms in a 2304 x 9216 product).  numerics: by default what the checkpoint means.
    mesh: where to put the parameters (`paligemma_jax.scaling.sharding.find_mesh`); each device is given its slices, and only they are read.
    wide: the paths of the parameters to hold in float32 whatever `dtype` is: those that learn.
    quantize: what to hold in 8 or 4 bits (`Quantization.of`); each matrix is made smaller while it is read, some rows at a time.
    An adapter is merged into the model, or laid beside its products where some are quantized.
    ValueError if the source is not a whole PaliGemma checkpoint.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    how = Quantization.of(quantize)
    checkpoint = quantized(formats.read(under(source)).with_numerics(numerics), how)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype)
    for note in checkpoint.notes:
        warnings.warn(f"{source}: {note}", stacklevel=2)
    model = abstract(replace(checkpoint.config, dtype=dtype, cache=how.cache))
    model = jax.eval_shape(partial(quantization.hold, formats=checkpoint.formats), model) if checkpoint.formats else model
    mesh = find_mesh(mesh, checkpoint.config)
    places = shardings(parameters(model), mesh) if mesh else {}
    parts, arrays = checkpoint.parts, {}
    for path, tensor in checkpoint.tensors.items():
        arrays[path] = _put(tensor if path in parts else tensor.cast("float32" if wide(path) else dtype), places.get(path))
    model = with_parameters(model, arrays.pop)
    if not peft.is_adapter(source):
        return model
    model = lora.attach(model, peft.read(source, model.config))
    return distribute(model if checkpoint.formats else lora.merge(model), mesh)


def save(directory: Path, model: PaliGemma, like: str | Path | None = None, to: str = "jax", force: bool = False) -> None:
    """Writes a model, stacked or not, as "jax" (this project's own), "huggingface" or "big_vision", in the dtype of its parameters.

    like: the checkpoint that it was trained from, whose tokenizer and processor files come along. ValueError as in `convert.write`.
    Several processes write together, each its shards.
    """
    if jax.process_count() > 1:
        return _save_together(directory, model, like, to)
    tensors: dict[str, Tensor] = {}
    for path, array in parameters(model).items():
        if re.match(r"\w+/layers/\d|(?!\w+/layers/)", path):
            tensors[path] = loaded(array)
        else:  # what `stack` made
            tensors |= {path.replace("/layers/", f"/layers/{i}/"): loaded(array, (i,)) for i in range(array.shape[0])}
    config = replace(model.config, dtype=tensors.get("decoder/embedder/table", tensors["decoder/norm/scale"]).dtype.name)
    came_along = companions(files(resolve(like))) if like else {}
    checkpoint = Checkpoint("jax", config, tensors, came_along, formats=quantization.formats(model))
    formats.write(formats.changed(checkpoint, to), directory, to, force=force)


def _save_together(directory: Path, model: PaliGemma, like: str | Path | None, to: str) -> None:
    """As "jax", by Orbax; the first process describes it, and converts it where it shall be another format."""
    import orbax.checkpoint as ocp

    tree: dict = {}
    for path, array in parameters(model).items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    new = directory.with_name(f".{directory.name}.new")
    if hosts.first():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    hosts.wait("save")
    with ocp.StandardCheckpointer() as writer:
        writer.save(new.resolve() / orbax.PARAMS, tree)
    if hosts.first():
        config = replace(model.config, dtype=tree["decoder"]["norm"]["scale"].dtype.name)
        came_along = companions(files(resolve(like))) if like else {}
        orbax.describe(new, Checkpoint("jax", config, {}, came_along, formats=quantization.formats(model)))
        formats.convert(new, directory, to, force=True)
        shutil.rmtree(new)
    hosts.wait("saved")


def _put(tensor: Tensor, sharding: NamedSharding | None) -> jax.Array:
    """The tensor on its devices; what several of them hold is read once, and one slice at a time is on the host."""
    if sharding is None:
        return jnp.asarray(tensor.load())
    devices: dict[str, list] = {}
    places = sharding.addressable_devices_indices_map(tensor.shape)
    for device, index in places.items():
        devices.setdefault(str(index), []).append((device, index))
    parts = {}
    for group in devices.values():
        array = tensor.load(group[0][1] or ())
        parts |= {device: jax.device_put(array, device) for device, _ in group}
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, [parts[device] for device in places])


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
