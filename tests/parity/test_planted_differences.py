"""Between two directories, and between a directory and what this model reads of it, parity names
whatever differs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from convert.tensor import Tensor
from paligemma_jax.parity import case as parity_case
from paligemma_jax.parity.report import verdict
from paligemma_jax.parity.run import ParityConfig, run
from paligemma_jax.processing import processor
from paligemma_jax.processing.tokenizer import Tokenizer

FIRST_WEIGHTS = "decoder/layers/0/attention/weights"
LAST_MLP = "decoder/layers/3/mlp/output"


@pytest.fixture(scope="module")
def adapter(directory) -> Path:
    """An adapter on `directory`, saved by peft."""
    torch.manual_seed(0)
    base = PaliGemmaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    options = dict(r=2, lora_alpha=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options))
    model.peft_config["default"].base_model_name_or_path = str(directory)
    model.save_pretrained(str(directory.parent / "adapter"))
    return directory.parent / "adapter"


def diverging(model: Path, against: Path | None = None) -> tuple[list[str], str]:
    """The rows that parity refuses, and its verdict."""
    report = run(ParityConfig(str(model), new=0, against=against and str(against)))
    rows = [row.stage for row in report.rows if row.diverges]
    assert (report.first_divergence is None) == (not rows)
    return rows, verdict(report)


def edit_json(directory: Path, file: str, *path: str, **changes) -> None:
    content = json.loads((directory / file).read_text())
    part = content
    for name in path:
        part = part[name]
    assert all(part.get(key) != value for key, value in changes.items())
    part.update(changes)
    (directory / file).write_text(json.dumps(content))


def edit_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def double_down_projection(directory: Path) -> None:
    key = "language_model.model.layers.3.mlp.down_proj.weight"

    def double(tensors):
        tensors[key] = tensors[key] * 1.01

    edit_weights(directory, double)


def untie_head(directory: Path) -> None:
    def add_head(tensors):
        table = tensors["language_model.model.embed_tokens.weight"]
        tensors["language_model.lm_head.weight"] = table.flip(1).contiguous()

    edit_weights(directory, add_head)
    edit_json(directory, "config.json", tie_word_embeddings=False)
    edit_json(directory, "config.json", "text_config", tie_word_embeddings=False)


def add_token(directory: Path) -> None:
    """A token for a piece of both suffixes, which moves to another id."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    content["added_tokens"].append(dict(id=1599, content="4") | flags)
    file.write_text(json.dumps(content))


def text_config(**changes):
    return lambda directory: edit_json(directory, "config.json", "text_config", **changes)


def image_processor(**changes):
    file = "processor_config.json"
    return lambda directory: edit_json(directory, file, "image_processor", **changes)


ROPE = {"rope_theta": 1e6, "rope_type": "default"}
# What differs in the directory that transformers reads, and the first row that must diverge.
DIFFERENCES = {
    "nothing": (lambda directory: None, None),
    "weights": (double_down_projection, LAST_MLP),
    "head": (untie_head, "logits"),
    "added token": (add_token, "ids"),
    "mean": (image_processor(image_mean=[0.5, 0.4, 0.5]), "pixels"),
    "resample": (image_processor(resample=2), "pixels"),
    "rope theta": (text_config(rope_parameters=ROPE), FIRST_WEIGHTS),
    "window": (text_config(sliding_window=7), FIRST_WEIGHTS),
    "softcap": (text_config(attn_logit_softcapping=20.0), FIRST_WEIGHTS),
    "final softcap": (text_config(final_logit_softcapping=29.0), "logits"),
    "eps": (text_config(rms_norm_eps=1e-5), FIRST_WEIGHTS),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_between_two_directories_is_named(directory, tmp_path, name):
    plant, place = DIFFERENCES[name]
    other = Path(shutil.copytree(directory, tmp_path / "other"))
    plant(other)
    rows, text = diverging(directory, other)
    assert rows[:1] == ([place] if place else []), rows
    assert text.startswith(f"first divergence: {place}" if place else "within tolerance"), text


def test_another_scale_of_an_adapter_is_named(adapter, tmp_path):
    """peft merges the adapter for transformers; the scale there is twice that of here."""
    assert diverging(adapter)[0] == []
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    edit_json(other, "adapter_config.json", lora_alpha=8)
    rows, _ = diverging(adapter, other)
    assert rows[0] == FIRST_WEIGHTS and LAST_MLP in rows


def read_other_weights(monkeypatch) -> None:
    load = Tensor.load

    def scaled(tensor: Tensor, *index) -> np.ndarray:
        array = load(tensor, *index)
        return array * array.dtype.type(1.01) if array.shape == (72, 56) else array

    monkeypatch.setattr(Tensor, "load", scaled)


def read_another_scale(monkeypatch) -> None:
    read = parity_case.load_model

    def load_base(source, *options):
        return read(replace(source, adapter=None), *options)

    monkeypatch.setattr(parity_case, "load_model", load_base)


def process_other_pixels(monkeypatch) -> None:
    process = processor.pixel_values
    monkeypatch.setattr(processor, "pixel_values", lambda *options: process(*options) * 0.99)


def encode_other_ids(monkeypatch) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text: encode(self, text.replace("n", "m"))
    )


# What this model reads wrongly of the directory that both read, and the row that must diverge.
MISREADINGS = {
    "weights": (read_other_weights, "decoder/layers/0/mlp/output"),
    "adapter": (read_another_scale, FIRST_WEIGHTS),
    "pixels": (process_other_pixels, "pixels"),
    "ids": (encode_other_ids, "ids"),
}


@pytest.mark.parametrize("name", MISREADINGS)
def test_what_this_model_misreads_does_not_reach_the_reference(
    directory, adapter, monkeypatch, name
):
    plant, place = MISREADINGS[name]
    plant(monkeypatch)
    rows, text = diverging(adapter if name == "adapter" else directory)
    assert rows[0] == place and place in text, rows
