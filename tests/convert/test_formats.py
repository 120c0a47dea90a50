"""Conversion between all formats: exact, both ways, and what transformers, Orbax and big_vision's names say of the result."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support import checkpoint_sources as sources
from support import hf_models
from support.hf_processor import save_processor, train_tokenizer
from support.paths import GOLDEN
from transformers import PaliGemmaForConditionalGeneration

import paligemma_jax as pg
from convert import convert, inspect, read
from convert.big_vision import infer_config
from convert.match import pieces, shapes
from convert.table import BIG_VISION
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.model.config import PRESETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The Hugging Face directory of a small random model, with its processor."""
    directory = sources.huggingface(tmp_path_factory.mktemp("source") / "pg2")
    train_tokenizer(directory / "tokenizer.model", vocabulary=400)
    save_processor(directory, 56, 14)
    (directory / "LICENSE").write_text("as is")
    return directory


def identical(a: Path, b: Path) -> bool:
    """The same files, byte for byte."""
    names = sorted(file.name for file in a.iterdir())
    return names == sorted(file.name for file in b.iterdir()) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def logits(model, directory: Path) -> np.ndarray:
    return hf_models.hf_logits(PaliGemmaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval(), model)


def batch():
    return hf_models.random_inputs(hf_models.random_model("pg2", **sources.SMALL))


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
@pytest.mark.parametrize("layout", ["released", "v5", "memory"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True])
def test_huggingface_and_back(tmp_path, kind, layout, dtype, shards):
    """Hugging Face -> jax -> Hugging Face: every file the same, to the byte; and Hugging Face -> Hugging Face."""
    directory = sources.huggingface(tmp_path / "a", kind, layout, DTYPES[dtype], shards=shards, head=not shards)
    convert(directory, tmp_path / "b", "jax", verify=True)
    convert(tmp_path / "b", tmp_path / "c", "huggingface", verify=True)
    convert(tmp_path / "c", tmp_path / "d", "huggingface")
    assert identical(directory, tmp_path / "c") and identical(directory, tmp_path / "d")
    assert ("lm_head" in " ".join(sources.tensors(tmp_path / "c"))) == (not shards)


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_big_vision_and_back(tmp_path, kind, dtype):
    """Hugging Face -> big_vision -> jax -> Hugging Face: all but the rows after the text are the same; those are the mean of the others."""
    directory = sources.huggingface(tmp_path / "a", kind, dtype=DTYPES[dtype])
    convert(directory, tmp_path / "b.npz", "big_vision", verify=True)
    convert(tmp_path / "b.npz", tmp_path / "c", "jax", config=directory, verify=True)
    convert(tmp_path / "c", tmp_path / "d", "huggingface", verify=True)
    before, after = sources.tensors(directory), sources.tensors(tmp_path / "d")
    key = "language_model.model.embed_tokens.weight"
    old, new = before.pop(key), after.pop(key)
    assert sources.same(before, after)
    assert old.shape == new.shape and old[: hf_models.IMAGE].tobytes() == new[: hf_models.IMAGE].tobytes()
    mean = old[: hf_models.IMAGE].astype(np.float64).mean(axis=0).astype(old.dtype)
    np.testing.assert_array_equal(new[hf_models.IMAGE :], np.broadcast_to(mean, (hf_models.VOCAB - hf_models.IMAGE, len(mean))))


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
@pytest.mark.parametrize("dtype, how", [("float32", {}), ("float16", {"prefix": ""}), ("bfloat16", {}), ("bfloat16", {"compressed": True})])
def test_npz_by_hand(tmp_path, kind, dtype, how):
    """An .npz made from big_vision's key list holds the weights of the Hugging Face directory, and gives its logits."""
    directory = sources.huggingface(tmp_path / "a", kind, dtype=DTYPES[dtype])
    step = {} if how.get("prefix") == "" else {"count": np.int32(7)}  # of the optimizer, beside params/
    npz = sources.big_vision(directory, tmp_path / "b.npz", dtype, **step, **how)
    theirs, ours = read(directory).tensors, read(npz, read(directory).config).tensors
    for path, tensor in theirs.items():
        rows = hf_models.IMAGE if path == "decoder/embedder/table" else None
        assert tensor.read()[:rows].tobytes() == ours[path].read()[:rows].tobytes(), path
    if dtype == "float32":
        convert(npz, tmp_path / "c", "jax", config=directory)
        inputs = hf_models.random_inputs(hf_models.random_model(kind, **sources.SMALL))
        model, expected = load_model(tmp_path / "c"), load_model(directory, numerics="big_vision")
        assert model.config == expected.config
        text = slice(hf_models.IMAGE)
        np.testing.assert_array_equal(sources.logits(model, inputs)[..., text], sources.logits(expected, inputs)[..., text])


@pytest.mark.parametrize("name", PRESETS)
def test_variants_are_told_from_their_shapes(name):
    """Every published variant at every resolution, the query scale of 28b included."""
    found = shapes(pieces(BIG_VISION[PRESETS[name].decoder.model_type], PRESETS[name]))
    assert infer_config(found, Path("x.npz")) == PRESETS[name]


def test_other_variants_need_a_config(source, tmp_path):
    npz = sources.big_vision(source, tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"no published PaliGemma has a gemma2 decoder with hidden_size 56.*--config"):
        read(npz)
    assert inspect(npz, source / "config.json")["numerics"] == "big_vision"


def test_files_come_along(source, tmp_path):
    """Through jax and back, config, tokenizer, processor and licence are the same; code and pickles stay where they are."""
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"pickle")
    convert(source, tmp_path / "jax", "jax")
    convert(tmp_path / "jax", tmp_path / "hf", "huggingface")
    (source / "modeling.py").unlink()
    (source / "training_args.bin").unlink()
    assert identical(source, tmp_path / "hf")


def test_a_converted_checkpoint_answers_as_its_source(tmp_path):
    golden, image = GOLDEN / "pg2", np.full((56, 56, 3), 99, np.uint8)
    convert(golden, tmp_path / "jax", "jax")
    assert pg.load(tmp_path / "jax").generate(image, "caption en", 4) == pg.load(golden).generate(image, "caption en", 4)


def test_transformers_loads_the_result(source, tmp_path):
    """Cut into shards anew, and exported from a model in memory with a config.json made from ours: the logits of the source."""
    convert(source, tmp_path / "jax", "jax")
    convert(tmp_path / "jax", tmp_path / "shards", "huggingface", max_shard=10**5)
    save_model(tmp_path / "export", load_model(source), to="huggingface", like=source)
    save_model(tmp_path / "bare", load_model(source), to="huggingface")
    expected = logits(batch(), source)
    for name in ("shards", "export", "bare"):
        np.testing.assert_array_equal(logits(batch(), tmp_path / name), expected)
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    found = {file.name: load_file(file) for file in (tmp_path / "shards").glob("*.safetensors")}
    assert len(found) > 5 and index["weight_map"] == {key: name for name, part in found.items() for key in part}
    assert index["metadata"]["total_size"] == sum(value.nbytes for part in found.values() for value in part.values())
    assert all(sum(value.nbytes for value in part.values()) <= 10**5 or len(part) == 1 for part in found.values())
    assert sorted(found)[0] == f"model-00001-of-{len(found):05}.safetensors"


def test_dtype(source, tmp_path):
    """Rounding is torch's; config.json says the new dtype and nothing else has changed in it."""
    convert(source, tmp_path / "half", "huggingface", dtype="bfloat16", verify=True)
    convert(tmp_path / "half", tmp_path / "full", "jax", dtype="float32", verify=True)
    for key, value in sources.tensors(source).items():
        expected = torch.tensor(value).to(torch.bfloat16)
        assert torch.equal(torch.tensor(sources.tensors(tmp_path / "half")[key].view(np.int16)), expected.view(torch.int16)), key
    full = {path: tensor.read() for path, tensor in read(tmp_path / "full").tensors.items()}
    assert all((value == read(source).tensors[path].read().astype(ml_dtypes.bfloat16)).all() for path, value in full.items())
    old, new = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "half"))
    assert new["dtype"] == "bfloat16" and json.dumps(old).replace("float32", "bfloat16") == json.dumps(new)
    assert PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_float16_does_not_overflow_in_silence(source, tmp_path):
    changed = sources.tensors(source)
    changed["multi_modal_projector.linear.bias"][3] = 1e5
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(changed, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    for to in ("jax", "huggingface", "big_vision"):
        with pytest.raises(ValueError, match=r"projector/bias.*65504.*bfloat16"):
            convert(tmp_path / "a", tmp_path / "b.npz", to, dtype="float16")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a"]


def test_mixed_dtypes_are_kept(source, tmp_path):
    mixed = {key: value.astype(np.float16) if "norm" in key else value for key, value in sources.tensors(source).items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(mixed, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "a", tmp_path / "b", "jax")
    convert(tmp_path / "b", tmp_path / "c", "huggingface")
    assert identical(tmp_path / "a", tmp_path / "c")
    assert "its tensors have several dtypes" in inspect(tmp_path / "b")["odd"]


def test_a_head_of_its_own_is_told(tmp_path):
    """lm_head is tied to the table: one that differs is left out, and said."""
    directory = sources.huggingface(tmp_path / "a", head=True)
    assert not read(directory).notes
    changed = sources.tensors(directory)
    changed["language_model.lm_head.weight"][0, 0] += 1
    changed["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(10, np.float32)
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    first, second = read(directory).notes
    assert "lm_head differs" in first and "2 tensors" in second
    convert(directory, tmp_path / "b", "huggingface")
    assert "language_model.lm_head.weight" not in sources.tensors(tmp_path / "b")


def test_numerics_are_what_the_source_means(source, tmp_path):
    """Recorded in what is written, heeded at load, unless one is named."""
    npz = sources.big_vision(source, tmp_path / "a.npz")
    chain = [
        ("big_vision", npz, {"config": source / "config.json"}),
        ("transformers", source, {}),
        ("big_vision", source, {"numerics": "big_vision"}),
    ]
    for i, (profile, origin, options) in enumerate(chain):
        convert(origin, tmp_path / f"jax{i}", "jax", **options)
        convert(tmp_path / f"jax{i}", tmp_path / f"hf{i}", "huggingface")
        for place in (tmp_path / f"jax{i}", tmp_path / f"hf{i}"):
            assert load_model(place).config.numerics == profile
            assert load_model(place, numerics="transformers").config.numerics == "transformers"
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / f"hf{i}")
    with pytest.raises(ValueError, match="unknown numerics"):
        convert(source, tmp_path / "x", "jax", numerics="keras")


def test_inspect(source, tmp_path):
    found = inspect(source)
    assert found["format"] == "huggingface" and found["resolution"] == 56 and found["dtypes"] == {"float32": len(read(source).tensors)}
    assert found["parameters"] == sum(value.size for value in sources.tensors(source).values()) and found["bytes"] == found["parameters"] * 4
    assert found["odd"] == ["its shapes are those of no published PaliGemma"]
    npz = sources.big_vision(source, tmp_path / "a.npz")
    odd = inspect(npz, source / "config.json")["odd"]
    assert "50 rows" in odd[0] and "tokenizer.model" in odd[-1]


def test_verify_finds_a_difference(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "a", "jax")
    file = tmp_path / "a" / "params" / "projector.kernel" / "0.0"
    damaged = bytearray(file.read_bytes())
    damaged[5] ^= 1
    file.write_bytes(damaged)
    from convert.formats import compare

    with pytest.raises(ValueError, match="1 tensors differ: projector/kernel"):
        compare(read(source), read(tmp_path / "a"))
