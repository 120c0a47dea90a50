"""Checkpoints that transformers saved in bitsandbytes' nf4 (its scales quantized too, or not) and int8: every number, and files that are none."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is transformers on torch: install the extra test")
pytest.importorskip("bitsandbytes", reason="the reference is bitsandbytes: install the extra test")

from safetensors.numpy import load_file, save_file  # noqa: E402
from support.hf_models import random_model, save_checkpoint  # noqa: E402

from convert.__main__ import main  # noqa: E402
from paligemma_jax.checkpoints.load import load_model  # noqa: E402
from paligemma_jax.model.tree import parameters  # noqa: E402
from paligemma_jax.quantization import quantize  # noqa: E402

WEIGHT = "language_model.model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (directory that transformers wrote, the random model as it dequantizes it: path in the file -> float32)."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig, PaliGemmaForConditionalGeneration

    place = tmp_path_factory.mktemp("bitsandbytes")
    plain = save_checkpoint(random_model(), place / "plain")
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    made = {}
    for name, options in {"nf4": four, "double": four | {"bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}.items():
        config = BitsAndBytesConfig(**options)
        model = PaliGemmaForConditionalGeneration.from_pretrained(plain, quantization_config=config, dtype=torch.float32, device_map="cpu")
        model.save_pretrained(place / name)
        dense = {}
        for path, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = module.weight.quant_state
                shape, state.shape = state.shape, torch.Size([state.shape.numel()])  # flat: see tests/quantization/test_quantization.py
                dense[path] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).reshape(shape).numpy()
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                dense[path] = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).numpy()
        made[name] = (place / name, dense)
    return made


@pytest.mark.parametrize("name,format", [("nf4", "nf4-64"), ("double", "nf4-64-double"), ("int8", "int8")])
def test_every_number(saved, name, format, tmp_path):
    directory, dense = saved[name]
    model = load_model(directory)
    held = quantize.weight_formats(model)
    assert {str(one) for one in held.values()} == {format} and len(held) == len(dense) == 5 * 7 + 3 * 6 + 1
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    for where in held:
        tower, last = where.split("/")[0], where.split("/")[-1]
        last = (names | ({"o": "out_proj", "up": "fc1", "down": "fc2"} if tower == "vision" else {"o": "o_proj"})).get(last, f"{last}_proj")
        layer = f".layers.{where.split('/')[2]}." if tower != "projector" else "projector.linear"
        towers = {"vision": "vision_tower", "decoder": "language_model", "projector": "multi_modal"}
        (expected,) = [v for path, v in dense.items() if towers[tower] in path and layer in path and path.endswith((last, "linear"))]
        module = model
        for step in where.split("/"):
            module = module[int(step)] if step.isdigit() else getattr(module, step)
        found = np.asarray(module.dense("float32")).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=2e-7 if name == "int8" else 0, err_msg=where)
    main([str(directory), str(tmp_path / "ours"), "--to", "jax", "--verify"])
    for path, value in parameters(load_model(tmp_path / "ours")).items():
        np.testing.assert_array_equal(value, parameters(model)[path])
    main([str(directory), str(tmp_path / "dense"), "--to", "huggingface"])
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    weight = load_file(tmp_path / "dense" / "model.safetensors")[WEIGHT]
    np.testing.assert_array_equal(weight, model.decoder.layers[0].mlp.down.dense("float32"))


def state(**changes):
    """Changes what the JSON beside the weight says."""

    def change(tensors):
        key = WEIGHT + ".quant_state.bitsandbytes__nf4"
        tensors[key] = np.frombuffer(json.dumps(json.loads(tensors[key].tobytes()) | changes).encode(), np.uint8)

    return change


@pytest.mark.parametrize(
    "change,expected",
    [
        (state(quant_type="fp4"), "unknown quantization 'fp4'"),
        (state(blocksize=256), "no quantization nf4-256"),
        (state(blocksize=128), "blocks of 128 do not divide"),
        (state(shape=[56, 144]), "where 4032 of U8"),
        (lambda t: t.pop(WEIGHT + ".absmax"), "it lacks '.*absmax'"),
        (lambda t: t.update({WEIGHT + ".quant_map": t[WEIGHT + ".quant_map"] * 2}), "its 16 values are not those of nf4"),
        (lambda t: t.update({WEIGHT + ".quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}), "none of bitsandbytes' that can be read here"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].reshape(-1).view(np.float16)}), "is F16"),
    ],
)
def test_damaged_ones(saved, tmp_path, change, expected):
    directory = shutil.copytree(saved["nf4"][0], tmp_path / "x")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=expected) as told:
        load_model(directory)
    assert str(told.value).count("\n") == 0


def test_other_methods(saved, tmp_path):
    directory = shutil.copytree(saved["nf4"][0], tmp_path / "x")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantized by 'gptq'"):
        load_model(directory)
