"""Broken checkpoint directories: one clear ValueError, before any weight is read; the command says the same (tests/commands/test_errors.py)."""

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
NORM, PATCH = "language_model.model.norm.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"


def write(name: str, content: bytes | dict | list):
    return lambda directory: (directory / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def cut(name: str, size: int):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def byte(name: str, place: int):
    """Makes a byte one that UTF-8 never has."""

    def change(directory):
        content = bytearray((directory / name).read_bytes())
        content[place] = 0xFF
        (directory / name).write_bytes(content)

    return change


def config(where: str | None = None, **changes):
    """Sets keys of config.json, at its top or in `where`; a key set to `...` is removed."""

    def change(directory):
        content = json.loads((directory / CONFIG).read_text())
        place = content[where] if where else content
        place |= changes
        for key in [key for key, value in changes.items() if value is ...]:
            del place[key]
        (directory / CONFIG).write_text(json.dumps(content))

    return change


def keys(*names: str, add: dict | None = None):
    """Removes tensors, and adds or replaces others."""

    def change(directory):
        tensors = load_file(directory / WEIGHTS)
        save_file({key: value for key, value in tensors.items() if key not in names} | (add or {}), directory / WEIGHTS)

    return change


def sharded(weight_map: dict, twice: str | None = None):
    """Splits model.safetensors into a.safetensors and b.safetensors, the tensor `twice` in both, with `weight_map` over their index."""

    def change(directory):
        tensors = load_file(directory / WEIGHTS)
        parts = {"a": {key: value for key, value in tensors.items() if key < "m" or key == twice}, "b": {}}
        parts["b"] = {key: value for key, value in tensors.items() if key >= "m" or key == twice}
        for name, part in parts.items():
            save_file(part, directory / f"{name}.safetensors")
        names = {key: f"{name}.safetensors" for name, part in parts.items() for key in part} | weight_map
        (directory / INDEX).write_text(json.dumps({"weight_map": names}))
        (directory / WEIGHTS).unlink()

    return change


def folder(name: str):
    def change(directory):
        (directory / name).unlink()
        (directory / name).mkdir()

    return change


def vanish(directory):
    for file in directory.iterdir():
        file.unlink()


TEXT, VISION = "text_config", "vision_config"
BROKEN = {
    "empty directory": (vanish, "no config.json", "Hugging Face"),
    "no config": (remove(CONFIG), "no config.json"),
    "config is a directory": (folder(CONFIG), CONFIG, "not readable JSON"),
    "config cut": (cut(CONFIG, 100), CONFIG, "not readable JSON"),
    "config empty": (write(CONFIG, b""), CONFIG, "not readable JSON"),
    "config not UTF-8": (write(CONFIG, b'{"model_type": "\xff"}'), CONFIG, "not readable JSON"),
    "config too deep": (write(CONFIG, b"[" * 10**5), CONFIG, "not readable JSON"),
    "config of endless digits": (write(CONFIG, b'{"a": ' + b"9" * 5000 + b"}"), CONFIG, "not readable JSON"),
    "config a list": (write(CONFIG, []), CONFIG, "no JSON object"),
    "config of gemma2": (write(CONFIG, {"model_type": "gemma2", "hidden_size": 2304}), "'gemma2'", "paligemma"),
    "config of siglip": (write(CONFIG, {"model_type": "siglip", "text_config": {}, "vision_config": {}}), "'siglip'", "paligemma"),
    "config of none": (write(CONFIG, {}), "no model_type", "paligemma"),
    "no text_config": (config(text_config=...), "text_config"),
    "vision_config a list": (config(vision_config=[1]), "vision_config"),
    "unknown decoder": (config(TEXT, model_type="llama"), "'llama'", "gemma, gemma2"),
    "decoder type a list": (config(TEXT, model_type=["gemma"]), "['gemma']"),
    "unknown encoder": (config(VISION, model_type="clip_vision_model"), "'clip_vision_model'", "siglip_vision_model"),
    "size a word": (config(TEXT, hidden_size="abc"), "text_config.hidden_size = 'abc'", "whole number"),
    "size null": (config(TEXT, hidden_size=None), "text_config.hidden_size = None"),
    "size negative": (config(VISION, hidden_size=-48), "vision_config.hidden_size = -48"),
    "size 0": (config(VISION, patch_size=0), "patch_size = 0"),
    "size a fraction": (config(TEXT, intermediate_size=72.5), "intermediate_size = 72.5"),
    "size true": (config(TEXT, num_key_value_heads=True), "num_key_value_heads = True"),
    "size endless": (config(TEXT, num_hidden_layers=10**12), "num_hidden_layers = 1000000000000"),
    "layers a word": (config(TEXT, num_hidden_layers="4"), "num_hidden_layers = '4'"),
    "number not finite": (config(TEXT, attn_logit_softcapping=float("inf")), "attn_logit_softcapping = inf"),
    "number NaN": (config(TEXT, rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    "rope_parameters a word": (config(TEXT, rope_parameters="default"), "rope_parameters", "'default'"),
    "rope scaled": (config(TEXT, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope_type = 'llama3'"),
    "heads": (config(VISION, num_attention_heads=5), "num_attention_heads divides hidden_size"),
    "key heads": (config(TEXT, num_key_value_heads=3), "num_key_value_heads divides num_attention_heads"),
    "patches": (config(VISION, image_size=57), "patch_size divides image_size"),
    "head_dim odd": (config(TEXT, head_dim=19), "head_dim is even"),
    "layer order": (config(TEXT, layer_types=["full_attention"] * 4), "layer_types"),
    "activation": (config(TEXT, hidden_activation="relu"), "hidden_activation = 'relu'"),
    "image id a word": (config(image_token_index="x"), "image_token_index = 'x'"),
    "pad id negative": (config(pad_token_id=-1), "pad_token_id = -1"),
    "eos a word": (write("generation_config.json", {"eos_token_id": ["1"]}), "eos_token_id = '1'"),
    "generation_config cut": (cut("generation_config.json", 20), "generation_config.json", "not readable JSON"),
    "no weights": (remove(WEIGHTS), "neither model.safetensors nor", INDEX),
    "weights empty": (write(WEIGHTS, b""), WEIGHTS, "truncated"),
    "weights cut": (cut(WEIGHTS, 300_000), WEIGHTS, "truncated", "download it again"),
    "weights cut in the header": (cut(WEIGHTS, 1000), WEIGHTS, "truncated"),
    "weights garbage": (write(WEIGHTS, struct.pack("<Q", 40) + b"garbage " * 10), WEIGHTS, "not a safetensors file"),
    "weights' header huge": (write(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), WEIGHTS, "not a safetensors file"),
    "weights an LFS pointer": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), WEIGHTS, "not a safetensors"),
    "weights a directory": (folder(WEIGHTS), WEIGHTS, "not a safetensors file"),
    "index not JSON": (write(INDEX, b"{"), INDEX, "not readable JSON"),
    "index a list": (write(INDEX, []), INDEX, "no JSON object"),
    "index without map": (write(INDEX, {"metadata": {}}), INDEX, "no weight_map"),
    "weight_map a list": (write(INDEX, {"weight_map": [WEIGHTS]}), INDEX, "no weight_map"),
    "weight_map empty": (write(INDEX, {"weight_map": {}}), INDEX, "no weight_map"),
    "shard a number": (write(INDEX, {"weight_map": {NORM: 3}}), INDEX, "'3'"),
    "shard above": (write(INDEX, {"weight_map": {NORM: "../x.safetensors"}}), INDEX, "'../x.safetensors'", "own directory"),
    "shard elsewhere": (write(INDEX, {"weight_map": {NORM: "/x.safetensors"}}), INDEX, "'/x.safetensors'", "own directory"),
    "shard above, Windows": (write(INDEX, {"weight_map": {NORM: "..\\x.safetensors"}}), INDEX, "own directory"),
    "shard missing": (sharded({"z": "c.safetensors"}), "c.safetensors", INDEX, "missing"),
    "tensor twice": (sharded({}, twice=NORM), NORM, "a.safetensors", "b.safetensors"),
    "no tokenizer": (remove("tokenizer.model"), "no tokenizer", "tokenizer.model"),
    "tokenizer empty": (write("tokenizer.model", b""), "tokenizer.model", "not a sentencepiece model"),
    "tokenizer cut": (cut("tokenizer.model", 5001), "tokenizer.model"),
    "tokenizer garbage": (write("tokenizer.model", b"garbage " * 99), "tokenizer.model", "not a sentencepiece model"),
    "tokenizer with a byte changed": (byte("tokenizer.model", 4581), "tokenizer.model", "not a sentencepiece model"),
    "tokenizer a directory": (folder("tokenizer.model"), "no tokenizer", "tokenizer.model"),
    "image id of another": (config(image_token_index=7), "<image>", "by config.json", "7"),
    "added_tokens corrupt": (write("added_tokens.json", [1]), "added_tokens.json"),
    "rows fewer than tokens": (config(TEXT, vocab_size=500), "tokenizer.model has", "500"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory(case, random_directory, command):
    damage, *parts = BROKEN[case]
    damage(directory := random_directory())
    check_refused(command, parts, directory)


def test_sharded_is_fine(random_directory):
    sharded({})(directory := random_directory())
    assert pg.load(directory).generate(IMAGE, "caption en", 1) == predictor().generate(IMAGE, "caption en", 1)


def test_all_wrong_keys_in_one_error(random_directory, command):
    """Missing, unknown, mis-shaped, of another dtype: one line each under the first."""
    added = {"lora.weight": np.zeros(3, np.float32), PATCH: np.zeros((48, 3, 16, 16), np.float32), NORM: np.zeros(56, np.int32)}
    keys("multi_modal_projector.linear.bias", add=added)(directory := random_directory())
    with pytest.raises(ValueError) as error:
        pg.load(directory)
    first, *faults = str(error.value).splitlines()
    assert str(directory) in first and "4 faults" in first
    assert sorted(fault.strip() for fault in faults) == [
        f"{NORM} has dtype I32; known are F32, BF16, F16",
        "missing multi_modal_projector.linear.bias",
        "unknown key lora.weight",
        f"{PATCH} has shape [48, 3, 16, 16], config.json asks for [48, 3, 14, 14]",
    ]
    code, out, err = command("generate", "--model", directory, "--image", IMAGE, "--prompt", "a")
    assert (code, out, err) == (2, "", f"paligemma-jax: {error.value}\n")


def test_weights_of_nothing(random_directory):
    save_file({}, (directory := random_directory()) / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing language_model.model.norm.weight"):
        pg.load(directory)


def test_weights_of_another(random_directory):
    """A Gemma 2 checkpoint under a PaliGemma config, and PaliGemma 1 under 2: every key that differs is told."""
    directory = random_directory()
    tensors = load_file(directory / WEIGHTS)
    save_file({key.removeprefix("language_model."): value for key, value in tensors.items() if "language" in key}, directory / WEIGHTS)
    with pytest.raises(ValueError, match=r"unknown key model.layers.0(.|\n)*missing vision_tower"):
        pg.load(directory)
    shutil.copy(GOLDEN / "pg1" / WEIGHTS, directory / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing language_model.model.layers.0.pre_feedforward_layernorm.weight"):
        pg.load(directory)
