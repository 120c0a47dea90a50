"""Resolving references to checkpoints: once per load, with everything that belongs to one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from support.paths import GOLDEN

import paligemma_jax as pg
from convert import convert
from convert.peft import Factors, save_adapter
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY, resolve
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.tree import parameters

HUB_ID = "google/paligemma2-3b-mix-224"


@pytest.fixture
def downloads(monkeypatch):
    """The hub ids that are downloaded; each is the embedded model."""
    calls = []

    def snapshot_download(repo, **options):
        calls.append(repo)
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def reads(monkeypatch):
    """How often each file is read, by name."""
    counts = Counter()
    for method in ("read_text", "read_bytes"):
        original = getattr(Path, method)

        def read(path, *args, original=original, **kwargs):
            counts[path.name] += 1
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, method, read)
    return counts


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter whose base checkpoint is a hub id."""
    directory, config = tmp_path / "adapter", PaliGemmaConfig.preset("tiny")
    D, N, H = (
        config.decoder.hidden_size,
        config.decoder.num_attention_heads,
        config.decoder.head_dim,
    )
    a, b = np.ones((2, D), np.float32), np.ones((N, H, 2), np.float32)
    save_adapter(directory, {"decoder/layers/0/attention/q": Factors(a, b, 1.0)}, config, HUB_ID)
    return directory


@pytest.mark.parametrize("with_adapter", [False, True], ids=["hub id", "adapter"])
def test_a_load_resolves_once_and_reads_the_config_once(downloads, reads, adapter, with_adapter):
    predictor = pg.load(adapter if with_adapter else HUB_ID)
    assert downloads == [HUB_ID]
    assert reads["config.json"] == 1
    assert predictor.codec_file == resolve("tiny").codec_file


def test_an_adapter_has_the_parts_of_its_base_checkpoint(downloads, adapter):
    source, tiny = resolve(adapter), resolve("tiny")
    assert (source.reference, source.adapter) == (str(adapter), adapter)
    assert (source.weights, source.tokenizer_dir) == (TINY, TINY)
    assert source.codec_file == tiny.codec_file is not None
    assert source.config == tiny.config and tiny.adapter is None
    changed = parameters(load_model(source))["decoder/layers/0/attention/q/kernel"]
    assert not np.array_equal(
        changed, parameters(load_model(tiny))["decoder/layers/0/attention/q/kernel"]
    )


def test_a_converted_checkpoint_keeps_its_tokenizer_and_codec_apart(tmp_path):
    convert(TINY, tmp_path / "converted", "jax")
    source = resolve(tmp_path / "converted")
    assert source.weights == tmp_path / "converted"
    assert source.tokenizer_dir == tmp_path / "converted" / "huggingface"
    assert source.codec_file == source.tokenizer_dir / resolve("tiny").codec_file.name
    assert source.config.vision == resolve("tiny").config.vision


def test_tokenizer_and_mask_codec_are_found_beside_an_npz(tmp_path):
    for name in ("weights.npz", "vae-readme.txt", "vae-oid.npz"):
        (tmp_path / name).write_bytes(b"")
    source = resolve(tmp_path / "weights.npz")
    assert (source.tokenizer_dir, source.codec_file) == (tmp_path, tmp_path / "vae-oid.npz")
    assert resolve(GOLDEN / "pg2").codec_file is None


def test_a_resolved_source_is_returned_unchanged():
    source = resolve("tiny")
    assert resolve(source) is source


def test_the_error_lists_every_choice(tmp_path):
    choices = "give 'tiny', a directory, a hub id like google/paligemma2-3b-mix-224, or one of a, b"
    with pytest.raises(ValueError, match=f"no such checkpoint: nowhere; {choices}"):
        resolve("nowhere", ["a", "b"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gone"}))
    with pytest.raises(
        ValueError, match=r"base checkpoint of the adapter .* no such checkpoint: gone"
    ):
        resolve(adapter)


def test_a_revision_is_downloaded(monkeypatch):
    """Given with the id or apart; an adapter's base may have one too."""
    calls = []

    def snapshot_download(repo, *, revision=None, allow_patterns):
        calls.append((repo, revision))
        assert "*.json" in allow_patterns  # tokenizer.json included
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve(f"{HUB_ID}@refs/pr/3")
    resolve(HUB_ID, revision="v1")
    resolve(HUB_ID)
    assert calls == [(HUB_ID, "refs/pr/3"), (HUB_ID, "v1"), (HUB_ID, None)]
    with pytest.raises(ValueError, match="has a revision already"):
        resolve(f"{HUB_ID}@v1", revision="v2")
    with pytest.raises(ValueError, match="revision applies to a hub id, but tiny is a local"):
        resolve("tiny", revision="v1")


def test_the_cache_of_the_hub_is_used_offline(tmp_path, monkeypatch):
    """conftest.py sets HF_HUB_OFFLINE."""
    commit, repo = "0" * 40, tmp_path / "models--some--body"
    (repo / "refs").mkdir(parents=True)
    for revision in ("main", "v1"):
        (repo / "refs" / revision).write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(TINY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for reference in ("some/body", "some/body@v1", f"some/body@{commit}"):
        assert resolve(reference).config == resolve("tiny").config
    with pytest.raises(ValueError, match="some/body"):
        resolve("some/body@v2")


def test_the_base_of_an_adapter_may_have_moved(adapter, tmp_path, monkeypatch, command):
    (tmp_path / "base").symlink_to(TINY)
    with pytest.raises(ValueError, match=r"cannot be downloaded.* give its place with --base"):
        resolve(adapter)
    expected = parameters(pg.load(adapter, base="tiny").model)
    actual = parameters(pg.load(adapter, base=tmp_path / "base").model)
    assert all(np.array_equal(expected[path], value) for path, value in actual.items())
    image = ("--image", GOLDEN / "image.png", "--prompt", "ocr", "--max-new-tokens", 2)
    code, _, err = command("generate", "--model", adapter, "--base", tmp_path / "base", *image)
    assert code == 0, err
    with pytest.raises(ValueError, match="--base is for an adapter or a checkpoint of a run"):
        resolve("tiny", base=tmp_path / "base")
    config = tmp_path / "nameless" / "adapter_config.json"
    shutil.copytree(adapter, config.parent)
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None})
    )
    with pytest.raises(ValueError, match=r"got null; give the base with --base"):
        resolve(config.parent)
    assert resolve(config.parent, base="tiny").weights == TINY
