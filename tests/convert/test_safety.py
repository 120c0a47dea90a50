"""A failed conversion leaves a complete destination or none, and describes a source that is not a
PaliGemma."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import checkpoint_sources as sources
from support import hf_models
from support.checkpoint_sources import run
from support.paths import ROOT

from convert import convert, files, formats, read

FORMATS = ("huggingface", "jax", "big_vision")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.huggingface(tmp_path_factory.mktemp("source") / "pg2")


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten(source, tmp_path, to, capsys):
    destination = tmp_path / "there"
    destination.write_text("mine")
    code, _, err = run(capsys, source, destination, "--to", to)
    assert code == 2 and "exists" in err and "--force" in err
    assert destination.read_text() == "mine"
    convert(source, destination, to, force=True)
    if to != "big_vision":
        convert(source, destination, to, force=True, verify=True)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_the_old_checkpoint(source, tmp_path, to):
    def contents():
        return sorted((item.name, item.stat().st_mtime_ns) for item in tmp_path.rglob("*"))

    def fail(nbytes):
        raise OSError(28, "No space left on device")

    convert(source, tmp_path / "there", to)
    before = contents()
    with pytest.raises(OSError, match="No space left"):
        formats.write(read(source), tmp_path / "there", to, force=True, progress=fail)
    assert contents() == before


def test_interruption_between_the_two_renames(source, tmp_path):
    """The old checkpoint, moved aside but not replaced, is restored by the next run of any kind."""
    work = tmp_path / ".there.unfinished"
    work.mkdir()
    convert(source, work / ".replaced", "jax")
    (work / "there").mkdir()
    with pytest.raises(RuntimeError), files.atomic_output(tmp_path / "there", force=False):
        raise RuntimeError
    assert read(tmp_path / "there").format == "jax" and not work.exists()


def test_two_conversions_to_the_same_destination(source, tmp_path):
    with files.atomic_output(tmp_path / "there", force=False) as path:
        with pytest.raises(ValueError, match="another process is writing"):
            convert(source, tmp_path / "there", "jax")
        path.mkdir()


def test_the_destination_must_not_contain_the_source(source, tmp_path):
    for destination in (source, source.parent):
        with pytest.raises(ValueError, match="is or contains the source"):
            convert(source, destination, "jax", force=True)
    with pytest.raises(ValueError, match="is not a directory"):
        convert(source, tmp_path / "no" / "where", "jax")


def test_disk_space_is_checked_first(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="are free on that disk"):
        convert(source, tmp_path / "a", "jax")
    assert not list(tmp_path.iterdir())


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def foreign_sources(directory: Path, source: Path) -> dict[str, tuple[Path, str]]:
    """A path and part of the message, by name."""
    weights, config = sources.tensors(source), (source / "config.json").read_bytes()

    def tower(part: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{part}."): v for key, v in weights.items() if part in key}

    def prefixed(part: str) -> dict[str, np.ndarray]:
        return {f"{part}.{key}": value for key, value in tower(part).items()}

    def make(name: str, tensors: dict, config: bytes | dict = config) -> Path:
        place = directory / name
        place.mkdir()
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        content = config if isinstance(config, bytes) else json.dumps(config).encode()
        (place / "config.json").write_bytes(content)
        return place

    def npz(name: str, part: str, **more) -> Path:
        members = np.load(sources.big_vision(source, directory / "full.npz"))
        kept = {key: value for key, value in members.items() if part in key}
        np.savez(directory / name, **kept, **more)
        return directory / name

    first = {key: value for key, value in weights.items() if key < "m"}
    other = sources.tensors(sources.huggingface(directory / "pg1", "pg1"))
    second = {key: other[key][..., :-1].copy() for key in weights.keys() - first.keys()}
    mixed = make("two", first)
    save_file(second, mixed / "b.safetensors")
    (mixed / "model.safetensors").rename(mixed / "a.safetensors")
    names = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (mixed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (directory / "orbax" / "params").mkdir(parents=True)
    (directory / "orbax" / "params" / "_METADATA").write_text("{}")
    text, image = tower("language_model"), tower("vision_tower")
    evil = npz("evil.npz", "params", evil=np.array([Evil()], object))
    no_tensor, siglip = "it contains no PaliGemma tensors", "only an image encoder (a SigLIP?)"
    gemma = "text-only model (a Gemma?)"
    return {
        "gemma": (make("gemma", text, {"model_type": "gemma2"}), "got 'gemma2'"),
        "siglip": (make("siglip", image, {"model_type": "siglip"}), "got 'siglip'"),
        "gemma under a paligemma config": (make("gemma2", prefixed("language_model")), gemma),
        "siglip under a paligemma config": (make("siglip2", image), no_tensor),
        "vision of a paligemma": (make("tower", prefixed("vision_tower")), siglip),
        "shards of two models": (mixed, "has shape"),
        "npz of text": (npz("text.npz", "llm/"), gemma),
        "npz of images": (npz("image.npz", "img/"), siglip),
        "npz of something": (npz("other.npz", "nothing", a=np.zeros(3)), no_tensor),
        "npz of objects": (evil, "Python objects, which are never unpickled"),
        "orbax": (directory / "orbax", "Orbax checkpoint of another program"),
        "safetensors file": (source / "model.safetensors", "use its directory"),
        "text file": (Path(__file__), "is not a checkpoint"),
        "nothing": (directory / "none", "does not exist"),
    }


def test_other_checkpoints_are_named(source, tmp_path, capsys):
    for name, (path, message) in foreign_sources(tmp_path, source).items():
        for arguments in ((path, tmp_path / "x", "--to", "jax"), ("inspect", path)):
            code, out, err = run(capsys, *arguments)
            assert code == 2 and out == "" and message in err, (name, err)
            assert "Traceback" not in err and err.count("\n") < 60, (name, err)
    assert not Path("PWNED").exists() and not (tmp_path / "x").exists()


KILLED = """
import sys, time
from contextlib import nullcontext
sys.path.insert(0, {root!r})
from convert import convert, tensor
tensor.BLOCK = 2**12
progress = lambda name, nbytes: nullcontext(lambda nbytes: time.sleep({pause}))
print("go", flush=True)
convert({source!r}, {destination!r}, {to!r}, force=True, progress=progress)
"""


def test_a_killed_conversion_leaves_a_complete_checkpoint(source, tmp_path):
    """Killed at 20 random points: the final name has the complete old checkpoint or the complete
    new one, and the next run succeeds."""
    rng = np.random.default_rng(0)
    old = read(source).with_dtype("float16")
    expected = {p: array.astype("float32").tobytes() for p, array in sources.arrays(old).items()}
    killed = 0
    for i in range(20):
        to, replaced = FORMATS[i % 3], i % 2
        destination = tmp_path / f"{to}{i}"
        if replaced:
            formats.write(old, destination, to)
        values = dict(source=str(source), destination=str(destination), to=to)
        code = KILLED.format(root=str(ROOT), pause=0.0005, **values)
        command, env = [sys.executable, "-c", code], os.environ | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() != 0
        process.stdout.close()
        if not destination.exists():
            aside = tmp_path / f".{destination.name}.unfinished" / ".replaced"
            assert not replaced or aside.exists()
        elif read(destination, old.config).tensors["projector/bias"].dtype == np.float16:
            assert replaced
            for path, array in sources.arrays(read(destination, old.config)).items():
                bits = array[: hf_models.IMAGE].astype("float32").tobytes()
                assert bits == expected[path][: len(bits)]
        else:
            formats.check_equal(read(source), read(destination, old.config))
        convert(source, destination, to, force=True)
        formats.check_equal(read(source), read(destination, old.config))
        assert not list(tmp_path.glob(".*"))
    assert killed > 10
