"""Directories of other programs: loaded as transformers loads them, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import checkpoint_sources as sources
from support.paths import GOLDEN

import paligemma_jax as pg
from convert import big_vision, convert, read
from convert.config import load_config
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.lora import add_lora

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PATCH = "vision_tower.vision_model.embeddings.patch_embedding.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return sources.huggingface(tmp_path_factory.mktemp("source") / "pg2")


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def edit_config(directory: Path, section: str, **values) -> None:
    config = json.loads((directory / "config.json").read_text())
    (config[section] if section else config).update(values)
    (directory / "config.json").write_text(json.dumps(config))


def test_a_single_file_wins_over_an_index(source, copy, tmp_path):
    """Also one whose shards are complete, with other weights."""
    other = {key: value + 1 for key, value in sources.tensors(source).items()}
    save_file(other, copy / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(other, "shard.safetensors")}
    (copy / INDEX).write_text(json.dumps(index))
    assert sources.same(sources.arrays(read(copy)), sources.arrays(read(source)))
    assert f"{INDEX} is ignored" in read(copy).notes[0]
    convert(copy, tmp_path / "b", "huggingface")
    assert not (tmp_path / "b" / INDEX).exists()


def test_the_patch_embedding_of_mlx(source, copy):
    tensors = sources.tensors(copy)
    tensors[PATCH] = np.ascontiguousarray(tensors[PATCH].transpose(0, 2, 3, 1))
    save_file(tensors, copy / WEIGHTS)
    assert sources.same(sources.arrays(read(copy)), sources.arrays(read(source)))
    assert "MLX" in read(copy).notes[0]


@pytest.mark.parametrize(
    "key,program",
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("scales", "MLX"),
        ("weight_scale_inv", "fp8"),
    ],
)
def test_weights_that_another_program_quantized(copy, key, program):
    save_file(sources.tensors(copy) | {f"a.{key}": np.zeros(3, np.float32)}, copy / WEIGHTS)
    with pytest.raises(ValueError, match=f"a.{key} is quantized by {program}.*use the unquantized"):
        read(copy)


def test_a_pickle_is_not_read(copy):
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"has pytorch_model\.bin, which is a pickle.*transformers"
    ):
        read(copy)


def test_an_npz_needs_a_tokenizer_beside_it(tmp_path, monkeypatch):
    """Without one it is refused before its arrays are read."""
    (tmp_path / "a.npz").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no tokenizer at"):
        pg.load(tmp_path / "a.npz")
    convert(GOLDEN / "pg2", tmp_path / "b.npz", "big_vision")
    for file in GOLDEN.glob("pg2/*token*"):
        shutil.copy(file, tmp_path)
    config = load_config(GOLDEN / "pg2")
    monkeypatch.setattr(big_vision, "PRESETS", {"small": config})
    answer = pg.load(tmp_path / "b.npz").generate(GOLDEN / "image.png", "caption en", 2)
    expected = pg.load(GOLDEN / "pg2", numerics="big_vision")
    assert answer == expected.generate(GOLDEN / "image.png", "caption en", 2)


# The effect of each value in transformers 5.23 was found by running it.
@pytest.mark.parametrize(
    "section,values,parts",
    [
        ("text_config", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "'yarn'"),
        ("text_config", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type"),
        ("text_config", {"rope_parameters": {"full_attention": {}}}, "full_attention must be null"),
        ("text_config", {"per_layer_config": {"0": {}}}, "per_layer_config"),
        ("text_config", {"attention_bias": True}, "attention_bias must be false, got true"),
        ("text_config", {"sliding_window": 0}, "sliding_window must be"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act must be"),
        ("", {"projection_dim": 7}, "projection_dim must be text_config.hidden_size, 56, got 7"),
        ("", {"image_token_id": 3}, "must be equal, got 450 and 3"),
        ("", {"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got null"),
        ("", {"transformers_weights": "x.safetensors"}, "transformers_weights"),
        ("", {"quantization": {"bits": 4}}, "quantized by MLX"),
        ("", {"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
    ],
)
def test_values_that_are_not_supported(copy, section, values, parts):
    edit_config(copy, section, **values)
    with pytest.raises(ValueError) as error:
        load_config(copy)
    assert parts in str(error.value) and "\n" not in str(error.value)


def test_rope_parameters_win_over_rope_theta(copy):
    edit_config(copy, "text_config", rope_theta=500.0)
    assert load_config(copy).decoder.rope_theta == 1e4
    edit_config(copy, "text_config", rope_parameters=None)
    assert load_config(copy).decoder.rope_theta == 500


def test_the_softcap_of_a_gemma_1(tmp_path):
    directory = sources.huggingface(tmp_path / "a", "pg1")
    edit_config(directory, "text_config", final_logit_softcapping=3.0)
    assert load_config(directory).decoder.final_logit_softcapping == 3


def test_a_model_that_cannot_be_loaded_is_not_saved(source, tmp_path):
    model = load_model(source)
    with pytest.raises(ValueError, match="must have no LoRA adapters"):
        save_model(tmp_path / "a", add_lora(model, {"decoder": 2}, alpha=1))
    model.decoder.extra = model.projector
    with pytest.raises(ValueError, match="unknown key decoder/extra/kernel"):
        save_model(tmp_path / "a", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunks", [[2**40], [2**31]])
def test_chunks_larger_than_their_array(source, tmp_path, chunks):
    """tensorstore would abort the process."""
    convert(source, tmp_path / "a", "jax")
    file = tmp_path / "a" / "params" / "projector.bias" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chunks": chunks}))
    with pytest.raises(ValueError, match="exceed its shape"):
        read(tmp_path / "a")
