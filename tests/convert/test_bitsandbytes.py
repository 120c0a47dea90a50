"""Checkpoints that transformers saved in bitsandbytes' nf4 (with and without quantized scales) and
int8: every value, and damaged files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is transformers: install the extra test")
pytest.importorskip("bitsandbytes", reason="the reference is bitsandbytes: install the extra test")

from safetensors.numpy import load_file, save_file  # noqa: E402
from support.hf_models import random_model, save_checkpoint  # noqa: E402

from paligemma_jax.checkpoints.load import load_model  # noqa: E402
from paligemma_jax.cli import main  # noqa: E402
from paligemma_jax.model.tree import parameters  # noqa: E402
from paligemma_jax.quantization import quantize  # noqa: E402

WEIGHT = "language_model.model.layers.0.mlp.down_proj.weight"
FOUR_BITS = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
OPTIONS = {
    "nf4": FOUR_BITS,
    "double": FOUR_BITS | {"bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "storage": FOUR_BITS | {"bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def dense_weight(module) -> np.ndarray:
    """The float32 weight of a quantized layer, dequantized by bitsandbytes."""
    from bitsandbytes import functional, nn

    if isinstance(module, nn.Linear8bitLt):
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).numpy()
    state = module.weight.quant_state
    # Flat: see tests/quantization/test_quantization.py.
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return functional.dequantize_4bit(module.weight.data, state).reshape(shape).numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory that transformers wrote and the dequantized weights by their path, by name."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig, PaliGemmaForConditionalGeneration

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    place = tmp_path_factory.mktemp("bitsandbytes")
    plain = save_checkpoint(random_model(), place / "plain")
    checkpoints = {}
    for name, options in OPTIONS.items():
        model = PaliGemmaForConditionalGeneration.from_pretrained(
            plain,
            quantization_config=BitsAndBytesConfig(**options),
            dtype=torch.float32,
            device_map="cpu",
        )
        model.save_pretrained(place / name)
        dense = {
            path: dense_weight(module)
            for path, module in model.named_modules()
            if isinstance(module, kinds)
        }
        checkpoints[name] = (place / name, dense)
    return checkpoints


def their_path(path: str, dense: dict[str, np.ndarray]) -> str:
    """The path of a module of ours in transformers."""
    if path == "projector":
        return next(theirs for theirs in dense if theirs.endswith("multi_modal_projector.linear"))
    tower, _, layer, *_, name = path.split("/")
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    if tower == "vision":
        names |= {"o": "out_proj", "up": "fc1", "down": "fc2"}
    prefix = {"vision": "vision_tower", "decoder": "language_model"}[tower]
    ending = names.get(name, f"{name}_proj")
    [match] = [
        theirs
        for theirs in dense
        if prefix in theirs and f".layers.{layer}." in theirs and theirs.endswith(ending)
    ]
    return match


@pytest.mark.parametrize(
    "name,format",
    [
        ("nf4", "nf4-64"),
        ("double", "nf4-64-double"),
        ("fp4", "fp4-64"),
        ("storage", "nf4-64"),
        ("int8", "int8"),
    ],
)
def test_every_number(saved, name, format, tmp_path):
    directory, dense = saved[name]
    model = load_model(directory)
    formats = quantize.weight_formats(model)
    assert {str(used) for used in formats.values()} == {format}
    assert len(formats) == len(dense) == 5 * 7 + 3 * 6 + 1
    for path in formats:
        expected, module = dense[their_path(path, dense)], model
        for step in path.split("/"):
            module = module[int(step)] if step.isdigit() else getattr(module, step)
        ours = np.asarray(module.dense("float32")).reshape(expected.shape)
        tolerance = 2e-7 if name == "int8" else 0
        np.testing.assert_allclose(ours, expected, rtol=tolerance, err_msg=path)
    main(["convert", str(directory), str(tmp_path / "ours"), "--to", "jax", "--verify"])
    for path, value in parameters(load_model(tmp_path / "ours")).items():
        np.testing.assert_array_equal(value, parameters(model)[path])
    main(["convert", str(directory), str(tmp_path / "dense"), "--to", "huggingface"])
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    weight = load_file(tmp_path / "dense" / "model.safetensors")[WEIGHT]
    np.testing.assert_array_equal(weight, model.decoder.layers[0].mlp.down.dense("float32"))


def test_nested_values_are_used_as_stored(saved, tmp_path):
    """bitsandbytes up to 0.49 writes -1.0 as the first on a CPU."""
    from bitsandbytes import functional

    directory = shutil.copytree(saved["double"][0], tmp_path / "x")
    tensors = load_file(directory / "model.safetensors")
    for key in tensors:
        if key.endswith(".nested_quant_map"):
            tensors[key][0] = -1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    parts = {
        key.removeprefix(WEIGHT + "."): torch.from_numpy(value)
        for key, value in tensors.items()
        if key.startswith(WEIGHT + ".")
    }
    state = functional.QuantState.from_dict(parts, device="cpu")
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    expected = functional.dequantize_4bit(torch.from_numpy(tensors[WEIGHT]), state).reshape(shape)
    model = load_model(directory)
    np.testing.assert_array_equal(model.decoder.layers[0].mlp.down.dense("float32"), expected)


def state(**changes):
    """Change the JSON beside the weight."""

    def change(tensors):
        key = WEIGHT + ".quant_state.bitsandbytes__nf4"
        content = json.loads(tensors[key].tobytes()) | changes
        tensors[key] = np.frombuffer(json.dumps(content).encode(), np.uint8)

    return change


def double(name: str):
    """Double the values of a tensor beside the weight."""
    return lambda tensors: tensors.update({WEIGHT + name: tensors[WEIGHT + name] * 2})


def replace_state(tensors):
    tensors[WEIGHT + ".quant_state.bitsandbytes__nf4"] = np.zeros(3, np.uint8)


@pytest.mark.parametrize(
    "change,message",
    [
        (state(quant_type="fp4"), "its 16 values differ from those of fp4"),
        (state(quant_type="af4"), "quant_type must be nf4 or fp4, got 'af4'"),
        (state(shape=[10**9] * 9), "shape"),
        (state(blocksize="64"), "blocksize must be an integer.* got '64'"),
        (state(blocksize=256), "block must be one of 32, 64, 128, got 256"),
        (state(blocksize=128), "blocks of 128 do not divide"),
        (state(shape=[56, 144]), "needs 126 of F32"),
        (lambda tensors: tensors.pop(WEIGHT + ".absmax"), "'.*absmax' is missing"),
        (double(".quant_map"), "its 16 values differ from those of nf4"),
        (replace_state, "is not a supported bitsandbytes tensor"),
        (
            lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].ravel()[:-2].view(np.float16)}),
            "is F16 .* needs \\d+ of F16",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(saved, tmp_path, change, message):
    directory = shutil.copytree(saved["nf4"][0], tmp_path / "x")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        load_model(directory)
    assert "\n" not in str(error.value)


def test_other_quantization_methods_are_refused(saved, tmp_path):
    directory = shutil.copytree(saved["nf4"][0], tmp_path / "x")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized by 'gptq'"):
        load_model(directory)
