"""Conversion between all formats is exact in both directions; transformers and big_vision agree."""

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
from convert.formats import check_equal
from convert.match import file_shapes, weights
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
    """Whether two directories have the same files, byte for byte."""
    names = sorted(file.name for file in a.iterdir())
    return names == sorted(file.name for file in b.iterdir()) and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names
    )


def save_changed(source: Path, directory: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Save other tensors with the config of `source`."""
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def hf_logits(directory: Path) -> np.ndarray:
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager"
    )
    inputs = hf_models.random_inputs(hf_models.random_model("pg2", **sources.SMALL))
    return hf_models.hf_logits(model.eval(), inputs)


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
@pytest.mark.parametrize("layout", ["released", "v5", "memory"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True])
def test_huggingface_and_back(tmp_path, kind, layout, dtype, shards):
    """Every file is byte-identical after a round trip through jax, and after a direct copy."""
    options = dict(shards=shards, head=not shards)
    directory = sources.huggingface(tmp_path / "a", kind, layout, DTYPES[dtype], **options)
    convert(directory, tmp_path / "b", "jax", verify=True)
    convert(tmp_path / "b", tmp_path / "c", "huggingface", verify=True)
    convert(tmp_path / "c", tmp_path / "d", "huggingface")
    assert identical(directory, tmp_path / "c") and identical(directory, tmp_path / "d")
    assert ("lm_head" in " ".join(sources.tensors(tmp_path / "c"))) == (not shards)


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_big_vision_and_back(tmp_path, kind, dtype):
    """After a round trip through big_vision and jax, only the vocabulary rows after the text
    differ; they are the mean of the others."""
    directory = sources.huggingface(tmp_path / "a", kind, dtype=DTYPES[dtype])
    convert(directory, tmp_path / "b.npz", "big_vision", verify=True)
    convert(tmp_path / "b.npz", tmp_path / "c", "jax", config=directory, verify=True)
    convert(tmp_path / "c", tmp_path / "d", "huggingface", verify=True)
    before, after = sources.tensors(directory), sources.tensors(tmp_path / "d")
    key, text = "language_model.model.embed_tokens.weight", hf_models.IMAGE
    old, new = before.pop(key), after.pop(key)
    assert sources.same(before, after)
    assert old.shape == new.shape and old[:text].tobytes() == new[:text].tobytes()
    mean = old[:text].astype(np.float64).mean(axis=0).astype(old.dtype)
    expected = np.broadcast_to(mean, (hf_models.VOCAB - text, len(mean)))
    np.testing.assert_array_equal(new[text:], expected)


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
@pytest.mark.parametrize(
    "dtype,options",
    [
        ("float32", {}),
        ("float16", {"prefix": ""}),
        ("bfloat16", {}),
        ("bfloat16", {"compressed": True}),
    ],
)
def test_an_npz_made_by_hand(tmp_path, kind, dtype, options):
    """An .npz made from big_vision's key list has the weights of the Hugging Face directory, and
    gives its logits."""
    directory = sources.huggingface(tmp_path / "a", kind, dtype=DTYPES[dtype])
    # A counter of the optimizer, beside params/.
    step = {} if options.get("prefix") == "" else {"count": np.int32(7)}
    npz = sources.big_vision(directory, tmp_path / "b.npz", dtype, **step, **options)
    theirs = read(directory)
    ours = sources.arrays(read(npz, theirs.config))
    text = slice(hf_models.IMAGE)
    for path, array in sources.arrays(theirs).items():
        rows = text if path == "decoder/embedder/table" else slice(None)
        assert array[rows].tobytes() == ours[path][rows].tobytes(), path
    if dtype == "float32":
        convert(npz, tmp_path / "c", "jax", config=directory)
        inputs = hf_models.random_inputs(hf_models.random_model(kind, **sources.SMALL))
        model = load_model(tmp_path / "c")
        expected = load_model(directory, numerics="big_vision")
        assert model.config == expected.config
        np.testing.assert_array_equal(
            sources.logits(model, inputs)[..., text], sources.logits(expected, inputs)[..., text]
        )


@pytest.mark.parametrize("name", PRESETS)
def test_published_variants_are_known_by_their_shapes(name):
    """Every variant at every resolution, with the query scale of 28b."""
    preset = PRESETS[name]
    shapes = file_shapes(weights(BIG_VISION[preset.decoder.model_type], preset))
    assert infer_config(shapes, Path("x.npz")) == preset


def test_unpublished_variants_need_a_config(source, tmp_path):
    npz = sources.big_vision(source, tmp_path / "a.npz")
    message = r"no published PaliGemma has these shapes: .*q_einsum/w \[3, 4, 56, 20\].*--config"
    with pytest.raises(ValueError, match=message):
        read(npz)
    assert inspect(npz, source / "config.json")["numerics"] == "big_vision"


def test_other_files_are_kept(source, tmp_path):
    """After a round trip through jax, config, tokenizer, processor and license are the same. Code
    and pickles are not copied."""
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"pickle")
    convert(source, tmp_path / "jax", "jax")
    convert(tmp_path / "jax", tmp_path / "hf", "huggingface")
    (source / "modeling.py").unlink()
    (source / "training_args.bin").unlink()
    assert identical(source, tmp_path / "hf")


def test_a_converted_checkpoint_gives_the_same_answers(tmp_path):
    golden, image = GOLDEN / "pg2", np.full((56, 56, 3), 99, np.uint8)
    convert(golden, tmp_path / "jax", "jax")
    ours, expected = (pg.load(place) for place in (tmp_path / "jax", golden))
    assert ours.generate(image, "caption en", 4) == expected.generate(image, "caption en", 4)


def test_transformers_loads_the_result(source, tmp_path):
    """The logits are those of the source after splitting into other shards, and after exporting a
    model in memory with a new config.json."""
    shards = tmp_path / "shards"
    convert(source, tmp_path / "jax", "jax")
    convert(tmp_path / "jax", shards, "huggingface", max_shard=10**5)
    save_model(tmp_path / "export", load_model(source), to="huggingface", like=source)
    save_model(tmp_path / "bare", load_model(source), to="huggingface")
    expected = hf_logits(source)
    for name in ("shards", "export", "bare"):
        np.testing.assert_array_equal(hf_logits(tmp_path / name), expected)
    index = json.loads((shards / INDEX).read_text())
    parts = {file.name: load_file(file) for file in shards.glob("*.safetensors")}
    sizes = {name: sum(value.nbytes for value in part.values()) for name, part in parts.items()}
    assert len(parts) > 5
    assert index["weight_map"] == {key: name for name, part in parts.items() for key in part}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 10**5 or len(parts[name]) == 1 for name, size in sizes.items())
    assert sorted(parts)[0] == f"model-00001-of-{len(parts):05}.safetensors"


def test_dtype(source, tmp_path):
    """Numbers are rounded as in torch. config.json has the new dtype and no other change."""
    half, full = tmp_path / "half", tmp_path / "full"
    convert(source, half, "huggingface", dtype="bfloat16", verify=True)
    convert(half, full, "jax", dtype="float32", verify=True)
    rounded = sources.tensors(half)
    for key, value in sources.tensors(source).items():
        expected = torch.tensor(value).to(torch.bfloat16).view(torch.int16)
        assert torch.equal(torch.tensor(rounded[key].view(np.int16)), expected), key
    original = sources.arrays(read(source))
    for path, value in sources.arrays(read(full)).items():
        assert (value == original[path].astype(ml_dtypes.bfloat16)).all()
    old, new = (json.loads((place / "config.json").read_text()) for place in (source, half))
    assert new["dtype"] == "bfloat16"
    assert json.dumps(old).replace("float32", "bfloat16") == json.dumps(new)
    assert PaliGemmaForConditionalGeneration.from_pretrained(half).dtype == torch.bfloat16


def test_float16_overflow_is_an_error(source, tmp_path):
    changed = sources.tensors(source)
    changed["multi_modal_projector.linear.bias"][3] = 1e5
    save_changed(source, tmp_path / "a", changed)
    for to in ("jax", "huggingface", "big_vision"):
        with pytest.raises(ValueError, match=r"projector/bias.*65504.*bfloat16"):
            convert(tmp_path / "a", tmp_path / "b.npz", to, dtype="float16")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a"]


def test_mixed_dtypes_are_kept(source, tmp_path):
    mixed = {
        key: value.astype(np.float16) if "norm" in key else value
        for key, value in sources.tensors(source).items()
    }
    save_changed(source, tmp_path / "a", mixed)
    convert(tmp_path / "a", tmp_path / "b", "jax")
    convert(tmp_path / "b", tmp_path / "c", "huggingface")
    assert identical(tmp_path / "a", tmp_path / "c")
    assert "its tensors have several dtypes" in inspect(tmp_path / "b")["notes"]


def test_a_head_that_differs_is_noted(tmp_path):
    """lm_head is used if it differs from the table to which config.json ties it."""
    directory = sources.huggingface(tmp_path / "a", head=True)
    assert not read(directory).notes
    changed = sources.tensors(directory)
    changed["language_model.lm_head.weight"][0, 0] += 1
    buffer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    changed[buffer] = np.zeros(10, np.float32)
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    first, second = read(directory).notes
    assert "lm_head differs" in first and "1 tensors" in second
    convert(directory, tmp_path / "b", "huggingface")
    assert "language_model.lm_head.weight" in sources.tensors(tmp_path / "b")
    assert not json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"]


def test_numerics_are_recorded(source, tmp_path):
    """Converted checkpoints record the numerics of the source. Loading uses them unless
    overridden."""
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
            other = load_model(place, numerics="transformers")
            assert other.config.numerics == "transformers"
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / f"hf{i}")
    with pytest.raises(ValueError, match="numerics must be one of"):
        convert(source, tmp_path / "x", "jax", numerics="mlx")


def test_inspect(source, tmp_path):
    description, values = inspect(source), sources.tensors(source).values()
    assert description["format"] == "huggingface" and description["resolution"] == 56
    assert description["dtypes"] == {"float32": len(read(source).tensors)}
    assert description["parameters"] == sum(value.size for value in values)
    assert description["bytes"] == description["parameters"] * 4
    assert description["notes"] == ["its shapes match no published PaliGemma"]
    npz = sources.big_vision(source, tmp_path / "a.npz")
    notes = inspect(npz, source / "config.json")["notes"]
    assert "50 missing rows" in notes[0] and "tokenizer.model" in notes[-1]


def test_verification_detects_a_difference(source, tmp_path):
    convert(source, tmp_path / "a", "jax")
    file = tmp_path / "a" / "params" / "projector.kernel" / "0.0"
    damaged = bytearray(file.read_bytes())
    damaged[5] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tensors that differ \(1\): projector/kernel"):
        check_equal(read(source), read(tmp_path / "a"))
