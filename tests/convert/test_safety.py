"""Conversion that goes wrong: the destination is whole or is not there, and what a source is instead of a PaliGemma is named."""

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
    assert code == 2 and "exists" in err and "--force" in err and destination.read_text() == "mine"
    convert(source, destination, to, force=True)
    convert(source, destination, to, force=True, verify=True) if to != "big_vision" else None
    assert sorted(item.name for item in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_the_old_one(source, tmp_path, to, monkeypatch):
    convert(source, tmp_path / "there", to)
    before = sorted((item.name, item.stat().st_mtime_ns) for item in tmp_path.rglob("*"))

    def fail(done):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        formats.write(read(source), tmp_path / "there", to, force=True, progress=fail)
    assert sorted((item.name, item.stat().st_mtime_ns) for item in tmp_path.rglob("*")) == before


def test_interrupted_between_the_two_renames(source, tmp_path):
    """The old checkpoint, moved aside but not replaced, is put back by the next run, which may be any."""
    work = tmp_path / ".there.unfinished"
    work.mkdir()
    convert(source, work / ".replaced", "jax")
    (work / "there").mkdir()
    with pytest.raises(RuntimeError), files.output(tmp_path / "there", force=False):
        raise RuntimeError
    assert read(tmp_path / "there").format == "jax" and not work.exists()


def test_two_at_once(source, tmp_path):
    with files.output(tmp_path / "there", force=False) as path:
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert(source, tmp_path / "there", "jax")
        path.mkdir()


def test_the_source_is_not_the_destination(source, tmp_path):
    for destination in (source, source.parent):
        with pytest.raises(ValueError, match="is the source itself"):
            convert(source, destination, "jax", force=True)
    with pytest.raises(ValueError, match="is not a directory"):
        convert(source, tmp_path / "no" / "where", "jax")


def test_a_full_disk_is_told_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="are free on that disk"):
        convert(source, tmp_path / "a", "jax")
    assert not list(tmp_path.iterdir())


class Evil:
    """What unpickling would run."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def foreign_sources(directory: Path, source: Path) -> dict[str, tuple[Path, str]]:
    """name -> (path, part of the message)."""
    weights, config = sources.tensors(source), (source / "config.json").read_bytes()
    text = {key.removeprefix("language_model."): value for key, value in weights.items() if "language_model" in key}
    image = {key.removeprefix("vision_tower."): value for key, value in weights.items() if "vision_tower" in key}

    def make(name: str, tensors: dict, config: bytes | dict = config) -> Path:
        (place := directory / name).mkdir()
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
        return place

    def npz(name: str, keep: str, **more) -> Path:
        whole = np.load(sources.big_vision(source, directory / "whole.npz"))
        np.savez(directory / name, **{key: value for key, value in whole.items() if keep in key}, **more)
        return directory / name

    first, second = {k: v for k, v in weights.items() if k < "m"}, {k: v for k, v in weights.items() if k >= "m"}
    other = sources.tensors(sources.huggingface(directory / "pg1", "pg1"))
    place = make("two", first)
    save_file({key: other[key][..., :-1].copy() for key in second}, place / "b.safetensors")
    (place / "model.safetensors").rename(place / "a.safetensors")
    names = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (directory / "orbax" / "params").mkdir(parents=True)
    (directory / "orbax" / "params" / "_METADATA").write_text("{}")
    return {
        "gemma": (make("gemma", text, {"model_type": "gemma2"}), "'gemma2' model"),
        "siglip": (make("siglip", image, {"model_type": "siglip"}), "'siglip' model"),
        "gemma under a paligemma config": (make("gemma2", {f"language_model.{k}": v for k, v in text.items()}), "text-only model (a Gemma?)"),
        "siglip under a paligemma config": (make("siglip2", image), "none of its tensors is a PaliGemma's"),
        "vision of a paligemma": (make("tower", {f"vision_tower.{k}": v for k, v in image.items()}), "image encoder alone (a SigLIP?)"),
        "shards of two models": (place, "has shape"),
        "npz of text": (npz("text.npz", "llm/"), "text-only model (a Gemma?)"),
        "npz of images": (npz("image.npz", "img/"), "image encoder alone (a SigLIP?)"),
        "npz of something": (npz("other.npz", "nothing", a=np.zeros(3)), "none of its tensors"),
        "npz of objects": (npz("evil.npz", "params", evil=np.array([Evil()], object)), "Python objects; they are never unpickled"),
        "orbax": (directory / "orbax", "Orbax checkpoint of another program"),
        "safetensors file": (source / "model.safetensors", "give its directory"),
        "text file": (Path(__file__), "is not a checkpoint"),
        "nothing": (directory / "none", "does not exist"),
    }


def test_foreign_sources_are_named(source, tmp_path, capsys):
    for name, (path, part) in foreign_sources(tmp_path, source).items():
        for arguments in ((path, tmp_path / "x", "--to", "jax"), ("inspect", path)):
            code, out, err = run(capsys, *arguments)
            assert code == 2 and out == "" and part in err and "Traceback" not in err, (name, err)
            assert err.count("\n") < 60, name
    assert not Path("PWNED").exists() and not (tmp_path / "x").exists()


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from convert import convert, tensor
tensor.BLOCK = 2**12
slow = lambda done: time.sleep({pause})
from contextlib import nullcontext
print("go", flush=True)
convert({source!r}, {destination!r}, {to!r}, force=True, progress=lambda name, nbytes: nullcontext(slow))
"""


def test_kills(source, tmp_path):
    """Killed at 20 random points: under the final name is the old checkpoint, whole, or the new one, whole; the next run just works."""
    rng, root = np.random.default_rng(0), str(ROOT)
    old = read(source).with_dtype("float16")
    expected = {path: tensor.read().astype("float32").tobytes() for path, tensor in old.tensors.items()}
    killed = 0
    for i in range(20):
        to, replaced = FORMATS[i % 3], i % 2
        destination = tmp_path / f"{to}{i}"
        if replaced:
            formats.write(old, destination, to)
        code = KILLED.format(root=root, pause=0.0005, source=str(source), destination=str(destination), to=to)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() != 0
        process.stdout.close()
        if destination.exists():
            found = formats.read(destination, old.config)
            if found.tensors["projector/bias"].dtype == np.float16:
                assert replaced
                for path, tensor in found.tensors.items():
                    assert tensor.read()[: hf_models.IMAGE].astype("float32").tobytes() == expected[path][: tensor.read()[: hf_models.IMAGE].size * 4]
            else:
                formats.compare(read(source), found)
        else:
            assert not replaced or (tmp_path / f".{destination.name}.unfinished" / ".replaced").exists()
        convert(source, destination, to, force=True)
        formats.compare(read(source), formats.read(destination, old.config))
        assert not list(tmp_path.glob(".*"))
    assert killed > 10
