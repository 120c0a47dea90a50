"""transformers, peft and bitsandbytes read a directory by themselves; what they cannot read is
refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_models import random_model, save_checkpoint
from transformers import BitsAndBytesConfig, PaliGemmaForConditionalGeneration

from convert import formats
from convert.huggingface import canonical_name
from convert.match import huggingface_weights
from convert.quantized import dequantize_checkpoint
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.parity import torch_loading
from paligemma_jax.parity.end_to_end import GreedyTokens


@pytest.fixture(scope="module")
def converted(directory) -> Path:
    path = directory.with_name("converted")
    formats.convert(directory, path, "jax")
    return path


@pytest.fixture
def copy(directory, tmp_path) -> Path:
    """A copy of `directory` to break."""
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def test_a_converted_copy_alone_is_compared_in_its_computation_only(command, converted):
    code, out, err = command("parity", "--model", converted, "--new", 0)
    assert (code, err) == (0, "")
    assert out.count("only the computation is compared") == 2  # at the top and in the verdict


def test_a_converted_copy_is_compared_with_its_original(command, directory, converted):
    """In JSON, from the inputs that each side made itself."""
    options = ("--model", converted, "--against", directory, "--new", 3, "--json")
    code, out, err = command("parity", *options)
    report = json.loads(out)
    assert (code, err, report["first_divergence"]) == (0, "", None)
    assert report["reference"] == f"{directory} is read by transformers 5.23.0"
    stages = [row["stage"] for row in report["stages"]]
    assert stages[:4] == ["pixels", "ids", "valid", "targets"]
    assert "logits, one program" in stages
    assert not any(row["details"] for row in report["stages"])
    assert report["tokens"]["texts"][0] == report["tokens"]["texts"][1]


def lose_a_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["multi_modal_projector.linear.bias"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def transpose_the_patches(copy: Path) -> None:
    """The layout of MLX."""
    tensors = load_file(copy / "model.safetensors")
    key = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    tensors[key] = tensors[key].permute(0, 2, 3, 1).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def break_the_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")


def use_other_sizes(copy: Path) -> None:
    model = random_model(text={"num_hidden_layers": 2, "vocab_size": 1600}, image_id=1552)
    save_checkpoint(model, copy)


def resize_images(copy: Path) -> None:
    file = copy / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["size"] = {"height": 28, "width": 28}
    file.write_text(json.dumps(content))


UNREADABLE = {
    "a tensor is missing": (lose_a_tensor, "no tensor that fits model.multi_modal_projector"),
    "MLX layout": (transpose_the_patches, "no tensor that fits model.vision_tower"),
    "broken tokenizer": (break_the_tokenizer, "transformers 5.23.0 cannot load the processor of"),
    "other sizes": (use_other_sizes, "decoder num_hidden_layers is 4 here and 2 in transformers"),
    "other image size": (resize_images, "transformers 5.23.0 cannot run on these inputs"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_directory_that_transformers_cannot_read_is_refused(command, directory, copy, name):
    plant, message = UNREADABLE[name]
    plant(copy)
    code, out, err = command("parity", "--model", directory, "--against", copy, "--new", 0)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "model,against,message",
    [
        ("tiny", "converted", "--against must be a Hugging Face directory"),
        ("3b-224", "tiny", "leave out --image, --prompt, --suffix and --against"),
        ("tiny", "nowhere", "no such checkpoint: nowhere"),
    ],
)
def test_what_cannot_be_the_reference_is_refused(command, converted, model, against, message):
    against = converted if against == "converted" else against
    code, out, err = command("parity", "--model", model, "--against", against)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_an_adapter_that_does_not_fit_is_refused_by_peft(directory, tmp_path):
    """peft itself would go on with random factors, and a warning."""
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    adapter |= {"base_model_name_or_path": str(directory)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"cannot load the adapter .*missing adapter keys"):
        torch_loading.load_reference(resolve(tmp_path), "float32")


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantized_weights_are_those_of_bitsandbytes(tmp_path, options):
    """Also where blocks cross rows, as in a row of 72 values."""
    plain = save_checkpoint(random_model(), tmp_path / "plain")
    load = PaliGemmaForConditionalGeneration.from_pretrained
    if "load_in_4bit" in options:
        options = options | {"bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**options)
    model = load(plain, quantization_config=config, dtype=torch.float32, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    source = resolve(tmp_path / "quantized")
    loaded = torch_loading.load_reference(source, "float32")
    theirs = {canonical_name(name): value for name, value in loaded.named_parameters()}
    ours = dequantize_checkpoint(source.checkpoint)
    for weight in huggingface_weights(ours.config):
        value = weight.to_file(ours.tensors[weight.path]).load()
        np.testing.assert_allclose(
            theirs[weight.key].detach(), value, rtol=1e-6, err_msg=weight.key
        )


def test_equal_tokens_of_different_texts_diverge():
    tokens, gaps = np.array([[5, 1]]), np.ones((1, 2))
    assert GreedyTokens(tokens, tokens, gaps, (["a"], ["a"])).texts_equal
    assert not GreedyTokens(tokens, tokens, gaps, (["a<table>"], ["a"])).texts_equal
    assert GreedyTokens(tokens, tokens, gaps, None).texts_equal
