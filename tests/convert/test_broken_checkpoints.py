"""Broken checkpoint directories give one clear ValueError before any weight is read; the command
prints the same (tests/commands/test_errors.py)."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.paths import GOLDEN
from support.refusals import IMAGE, check_refused, predictor

import paligemma_jax as pg

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER, GENERATION = "tokenizer.model", "generation_config.json"
NORM = "language_model.model.norm.weight"
PATCH = "vision_tower.vision_model.embeddings.patch_embedding.weight"


def replace(name: str, content: bytes | dict | list):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda directory: (directory / name).write_bytes(data)


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def truncate(name: str, size: int):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def corrupt(name: str, position: int):
    """Change one byte to a value that UTF-8 never has."""

    def damage(directory):
        content = bytearray((directory / name).read_bytes())
        content[position] = 0xFF
        (directory / name).write_bytes(content)

    return damage


def config(section: str | None = None, **changes):
    """Set keys of config.json, at its top or in a section; remove those that are set to `...`."""

    def damage(directory):
        content = json.loads((directory / CONFIG).read_text())
        values = content[section] if section else content
        values |= changes
        for key in [key for key, value in changes.items() if value is ...]:
            del values[key]
        (directory / CONFIG).write_text(json.dumps(content))

    return damage


def tensors(*removed: str, added: dict | None = None):
    """Remove tensors, and add or replace others."""

    def damage(directory):
        content = load_file(directory / WEIGHTS)
        kept = {key: value for key, value in content.items() if key not in removed}
        save_file(kept | (added or {}), directory / WEIGHTS)

    return damage


def shards(weight_map: dict, twice: str | None = None):
    """Split model.safetensors into a.safetensors and b.safetensors, with the tensor `twice` in
    both, and add `weight_map` to their index."""

    def damage(directory):
        content = load_file(directory / WEIGHTS)
        parts = {
            "a.safetensors": {key: v for key, v in content.items() if key < "m" or key == twice},
            "b.safetensors": {key: v for key, v in content.items() if key >= "m" or key == twice},
        }
        for name, part in parts.items():
            save_file(part, directory / name)
        names = {key: name for name, part in parts.items() for key in part} | weight_map
        (directory / INDEX).write_text(json.dumps({"weight_map": names}))
        (directory / WEIGHTS).unlink()

    return damage


def index(content: bytes | dict | list):
    """An index in place of the weights."""

    def damage(directory):
        replace(INDEX, content)(directory)
        (directory / WEIGHTS).unlink()

    return damage


def make_directory(name: str):
    """Replace a file by a directory."""

    def damage(directory):
        (directory / name).unlink()
        (directory / name).mkdir()

    return damage


def empty(directory):
    for file in directory.iterdir():
        file.unlink()


TEXT, VISION = "text_config", "vision_config"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
GARBAGE = b"garbage " * 99
BROKEN = {
    "empty directory": (empty, "no config.json", "Hugging Face"),
    "no config": (remove(CONFIG), "no config.json"),
    "config is a directory": (make_directory(CONFIG), CONFIG, "not readable"),
    "config cut": (truncate(CONFIG, 100), CONFIG, "not readable JSON"),
    "config empty": (replace(CONFIG, b""), CONFIG, "not readable JSON"),
    "config not UTF-8": (replace(CONFIG, b'{"model_type": "\xff"}'), CONFIG, "not readable JSON"),
    "config too deep": (replace(CONFIG, b'{"x": ' * 10**5), CONFIG, "nested more than"),
    "config of endless digits": (
        replace(CONFIG, b'{"a": ' + b"9" * 5000 + b"}"),
        CONFIG,
        "out of range",
    ),
    "config a list": (replace(CONFIG, []), CONFIG, "must be an object, got an array"),
    "config of gemma2": (
        replace(CONFIG, {"model_type": "gemma2", "hidden_size": 2304}),
        "'gemma2'",
        "paligemma",
    ),
    "config of siglip": (
        replace(CONFIG, {"model_type": "siglip", TEXT: {}, VISION: {}}),
        "'siglip'",
        "paligemma",
    ),
    "config of none": (replace(CONFIG, {}), "model_type must be", "paligemma"),
    "no text_config": (config(text_config=...), "text_config"),
    "vision_config a list": (config(vision_config=[1]), "vision_config"),
    "unknown decoder": (config(TEXT, model_type="llama"), "'llama'", "gemma, gemma2"),
    "decoder type a list": (config(TEXT, model_type=["gemma"]), "model_type", "got an array"),
    "unknown encoder": (
        config(VISION, model_type="clip_vision_model"),
        "'clip_vision_model'",
        "siglip_vision_model",
    ),
    "size a word": (
        config(TEXT, hidden_size="abc"),
        "text_config.hidden_size must be an integer",
        "got 'abc'",
    ),
    "size null": (config(TEXT, hidden_size=None), "text_config.hidden_size", "got null"),
    "size negative": (config(VISION, hidden_size=-48), "vision_config.hidden_size", "got -48"),
    "size 0": (config(VISION, patch_size=0), "patch_size", "got 0"),
    "size a fraction": (config(TEXT, intermediate_size=72.5), "intermediate_size", "got 72.5"),
    "size true": (config(TEXT, num_key_value_heads=True), "num_key_value_heads", "got true"),
    "size endless": (
        config(TEXT, num_hidden_layers=10**12),
        "num_hidden_layers",
        "got 1000000000000",
    ),
    "layers a word": (config(TEXT, num_hidden_layers="4"), "num_hidden_layers", "got '4'"),
    "number not finite": (
        config(TEXT, attn_logit_softcapping=float("inf")),
        "NaN and Infinity are not JSON",
    ),
    "number NaN": (config(TEXT, rms_norm_eps=float("nan")), "NaN and Infinity are not JSON"),
    "rope_parameters a word": (
        config(TEXT, rope_parameters="default"),
        "rope_parameters",
        "'default'",
    ),
    "rope scaled": (
        config(TEXT, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        "rope_type",
        "got 'llama3'",
    ),
    "heads": (config(VISION, num_attention_heads=5), "num_attention_heads must divide hidden_size"),
    "key heads": (
        config(TEXT, num_key_value_heads=3),
        "num_key_value_heads must divide num_attention_heads",
    ),
    "patches": (config(VISION, image_size=57), "patch_size must divide image_size"),
    "head_dim odd": (config(TEXT, head_dim=19), "head_dim must be even"),
    "layer order": (config(TEXT, layer_types=["full_attention"] * 4), "layer_types"),
    "activation": (config(TEXT, hidden_activation="relu"), "hidden_activation", "got 'relu'"),
    "image id a word": (config(image_token_index="x"), "image_token_index", "got 'x'"),
    "pad id negative": (config(pad_token_id=-1), "pad_token_id", "got -1"),
    "eos a word": (replace(GENERATION, {"eos_token_id": ["1"]}), "eos_token_id", "got '1'"),
    "generation_config cut": (truncate(GENERATION, 20), GENERATION, "not readable JSON"),
    "no weights": (remove(WEIGHTS), "neither model.safetensors nor", INDEX),
    "weights empty": (replace(WEIGHTS, b""), WEIGHTS, "truncated"),
    "weights cut": (truncate(WEIGHTS, 300_000), WEIGHTS, "truncated", "download it again"),
    "weights cut in the header": (truncate(WEIGHTS, 1000), WEIGHTS, "truncated"),
    "weights garbage": (
        replace(WEIGHTS, struct.pack("<Q", 40) + b"garbage " * 10),
        WEIGHTS,
        "not a safetensors file",
    ),
    "weights' header huge": (
        replace(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
        WEIGHTS,
        "not a safetensors file",
    ),
    "weights an LFS pointer": (replace(WEIGHTS, LFS_POINTER), WEIGHTS, "not a safetensors"),
    "weights a directory": (make_directory(WEIGHTS), WEIGHTS, "not a safetensors file"),
    "index not JSON": (index(b"{"), INDEX, "not readable JSON"),
    "index a list": (index([]), INDEX, "must be an object, got an array"),
    "index without map": (index({"metadata": {}}), INDEX, "weight_map is missing"),
    "weight_map a list": (index({"weight_map": [WEIGHTS]}), INDEX, "weight_map must be"),
    "weight_map empty": (index({"weight_map": {}}), INDEX, "empty weight_map"),
    "shard a number": (index({"weight_map": {NORM: 3}}), INDEX, "must be a string, got an integer"),
    "shard above": (
        index({"weight_map": {NORM: "../x.safetensors"}}),
        INDEX,
        "'../x.safetensors'",
        "own directory",
    ),
    "shard elsewhere": (
        index({"weight_map": {NORM: "/x.safetensors"}}),
        INDEX,
        "'/x.safetensors'",
        "own directory",
    ),
    "shard above, Windows": (
        index({"weight_map": {NORM: "..\\x.safetensors"}}),
        INDEX,
        "own directory",
    ),
    "shard missing": (shards({"z": "c.safetensors"}), "c.safetensors", INDEX, "missing"),
    "tensor twice": (shards({}, twice=NORM), NORM, "a.safetensors", "b.safetensors"),
    "no tokenizer": (remove(TOKENIZER), "no tokenizer", TOKENIZER),
    "tokenizer empty": (replace(TOKENIZER, b""), TOKENIZER, "not a sentencepiece model"),
    "tokenizer cut": (truncate(TOKENIZER, 5001), TOKENIZER),
    "tokenizer garbage": (replace(TOKENIZER, GARBAGE), TOKENIZER, "not a sentencepiece model"),
    "tokenizer with a byte changed": (
        corrupt(TOKENIZER, 4581),
        TOKENIZER,
        "not a sentencepiece model",
    ),
    "tokenizer a directory": (make_directory(TOKENIZER), "no tokenizer", TOKENIZER),
    "image id of another": (config(image_token_index=7), "<image>", "in config.json", "7"),
    "added_tokens corrupt": (replace("added_tokens.json", [1]), "added_tokens.json"),
    "rows fewer than tokens": (config(TEXT, vocab_size=500), "tokenizer.model has", "500"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory(case, random_directory, command):
    damage, *parts = BROKEN[case]
    directory = random_directory()
    damage(directory)
    check_refused(command, parts, directory)


def test_shards_are_read(random_directory):
    directory = random_directory()
    shards({})(directory)
    answer = pg.load(directory).generate(IMAGE, "caption en", 1)
    assert answer == predictor().generate(IMAGE, "caption en", 1)


def test_all_wrong_tensors_are_in_one_error(random_directory, command):
    """Missing, unknown, of another shape, of another dtype: one line each under the first."""
    directory, patch = random_directory(), np.zeros((48, 3, 16, 16), np.float32)
    added = {"lora.weight": np.zeros(3, np.float32), PATCH: patch, NORM: np.zeros(56, np.int32)}
    tensors("multi_modal_projector.linear.bias", added=added)(directory)
    with pytest.raises(ValueError) as error:
        pg.load(directory)
    first, *errors = str(error.value).splitlines()
    assert str(directory) in first and "(errors: 4)" in first
    assert sorted(line.strip() for line in errors) == [
        f"{NORM} has dtype I32, must be one of F32, BF16, F16",
        "missing multi_modal_projector.linear.bias",
        "unknown key lora.weight",
        f"{PATCH} has shape [48, 3, 16, 16], but config.json requires [48, 3, 14, 14]",
    ]
    code, out, err = command("generate", "--model", directory, "--image", IMAGE, "--prompt", "a")
    assert (code, out, err) == (2, "", f"paligemma-jax: {error.value}\n")


def test_empty_weights(random_directory):
    directory = random_directory()
    save_file({}, directory / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing language_model.model.norm.weight"):
        pg.load(directory)


def test_weights_of_another_model(random_directory):
    """A Gemma 2 checkpoint under a PaliGemma config, and PaliGemma 1 under 2: every key that
    differs is listed."""
    directory = random_directory()
    content, prefix = load_file(directory / WEIGHTS), "language_model."
    text = {key.removeprefix(prefix): value for key, value in content.items() if prefix in key}
    save_file(text, directory / WEIGHTS)
    with pytest.raises(ValueError, match=r"unknown key model.layers.0(.|\n)*missing vision_tower"):
        pg.load(directory)
    shutil.copy(GOLDEN / "pg1" / WEIGHTS, directory / WEIGHTS)
    missing = "missing language_model.model.layers.0.pre_feedforward_layernorm.weight"
    with pytest.raises(ValueError, match=missing):
        pg.load(directory)
