"""Quantized checkpoints: stored, loaded, sharded, verified, dequantized, and damaged ones."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from support import on_devices

import convert
from paligemma_jax.checkpoints import load
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.cli import main
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization.quantize import weight_formats

EVERY_PART = "nf4-32-double,embedding=int8-bf16,vision=int4"


@pytest.fixture
def quantized(tmp_path):
    """A function that quantizes tiny with the command, and returns the new directory."""

    def make(quantization=EVERY_PART):
        directory = tmp_path / "quantized"
        main(["convert", str(TINY), str(directory), "--quantize", quantization, "--verify"])
        return directory

    return make


def assert_same(model, expected):
    values, expected = parameters(model), parameters(expected)
    assert values.keys() == expected.keys()
    for path, value in values.items():
        assert value.dtype == expected[path].dtype, path
        assert (np.asarray(value) == np.asarray(expected[path])).all(), path


@pytest.mark.parametrize("quantization", ["w8a8,embedding=int8", "int4-128", EVERY_PART])
@pytest.mark.thorough
def test_a_stored_model_loads_bit_for_bit(quantized, quantization, tmp_path, capsys):
    stored = load_model(quantized(quantization))
    assert_same(stored, load_model(TINY, quantize=quantization))
    assert "verified" in capsys.readouterr().out
    save_model(tmp_path / "again", stored, like=tmp_path / "quantized")
    save_model(tmp_path / "stack", stack_model(stored, delete=False))
    for name in ("again", "stack"):
        assert_same(load_model(tmp_path / name), stored)


def test_orbax_restores_the_codes(quantized):
    import orbax.checkpoint as ocp

    directory = quantized()
    tree = ocp.StandardCheckpointer().restore(directory / "params")
    codes = parameters(load_model(directory))["decoder/layers/0/mlp/down/codes"]
    np.testing.assert_array_equal(tree["decoder"]["layers"]["0"]["mlp"]["down"]["codes"], codes)


def test_the_size_on_disk_is_the_size_in_memory(quantized):
    """Both match arithmetic: 4 + 8/32 bits per number in the decoder's projections."""
    directory = quantized()
    model = parameters(load_model(directory, "bfloat16"))
    memory = {path: value.nbytes for path, value in model.items()}
    files = (directory / "params").glob("*/0*")
    disk = {file.parent.name.replace(".", "/"): file.stat().st_size for file in files}
    assert disk == memory
    numbers = sum(
        value.size
        for path, value in parameters(load_model(TINY)).items()
        if "decoder/layers" in path and path.endswith("kernel")
    )
    nbytes = sum(
        size
        for path, size in memory.items()
        if "decoder/layers" in path and "norm" not in path and "nested" not in path
    )
    assert nbytes == numbers * (4 + 8 / 32) / 8


def test_a_quantized_checkpoint_can_be_dequantized(quantized, tmp_path, capsys):
    directory = quantized()
    main(["convert", str(directory), str(tmp_path / "dense"), "--to", "huggingface", "--verify"])
    model, dense = load_model(directory), parameters(load_model(tmp_path / "dense", "bfloat16"))
    kernel, table = model.decoder.layers[1].mlp.down, model.decoder.embedder
    assert (kernel.dense("bfloat16") == dense["decoder/layers/1/mlp/down/kernel"]).all()
    assert (table.dense("bfloat16") == dense["decoder/embedder/table"]).all()
    assert convert.inspect(directory)["parameters"] == convert.inspect(TINY)["parameters"]
    main(["convert", "inspect", str(directory)])
    assert "nf4-32-double (28)" in capsys.readouterr().out
    save_model(tmp_path / "exported", model, to="huggingface")
    exported = load_model(tmp_path / "exported", "bfloat16")
    assert_same(exported, load_model(tmp_path / "dense", "bfloat16"))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "quantized while loading"])
@pytest.mark.thorough
def test_codes_and_scales_are_sharded(quantized, stored):
    """The values equal those on one device bit for bit."""
    source = (str(quantized()), None) if stored else (str(TINY), EVERY_PART)
    result = on_devices.call(8, "compare_loading", *source)
    assert not result["different"]
    up = "layers/0/mlp/up"
    expected = {"decoder/embedder/codes", f"decoder/{up}/codes", f"decoder/{up}/scale"}
    assert expected | {f"vision/{up}/codes"} <= set(result["sharded"])


def test_a_warning_lists_matrices_that_blocks_do_not_divide(random_directory):
    """In the random checkpoint 64 divides all projections, but not the rows of the table."""
    message = (
        r"not quantized, because they cannot be divided into blocks: decoder/embedder \[1600, 56\]$"
    )
    with pytest.warns(UserWarning, match=message):
        model = load_model(random_directory(), quantize="nf4,embedding=nf4")
    assert len(weight_formats(model)) == 4 * 7


def test_a_quantized_matrix_keeps_its_format(quantized):
    directory = quantized()
    assert_same(load_model(directory, quantize="vision=int4"), load_model(directory))
    message = "is already nf4-32-double and cannot be quantized to int8"
    with pytest.raises(ValueError, match=message):
        load_model(directory, quantize="int8")


def test_int8_and_w8a8_have_the_same_codes_and_scales(quantized):
    directory = quantized("int8,embedding=int8")
    loaded = load_model(directory, quantize="w8a8")
    assert_same(loaded, load_model(directory))
    formats = weight_formats(loaded)
    assert str(formats["decoder/layers/0/mlp/up"]) == "w8a8"
    assert str(formats["decoder/embedder"]) == "int8"
    assert formats == weight_formats(load_model(TINY, quantize="w8a8,embedding=int8"))


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"decoder/layers/0/mlp/down": "nf5"},
            "an invalid list of quantized matrices: quantization must be one of int8, w8a8, "
            "int4, nf4, fp4, got 'nf5'",
        ),
        (
            {"decoder/layers/9/mlp/down": "nf4"},
            r"the model has no matrix decoder/layers/\*/mlp/down",
        ),
        ({"decoder/layers/0/mlp/down": "nf4-64"}, "requires"),
        ({"decoder/layers/0/mlp/down": "int8"}, "requires"),
        ({"decoder/layers/0/mlp/down": None}, r"unknown key decoder/layers/0/mlp/down/codes"),
        ({"projector": "int8"}, "missing projector/codes"),
    ],
)
def test_a_list_of_formats_that_does_not_fit_is_refused(quantized, change, message):
    file = quantized() / "paligemma.json"
    content = json.loads(file.read_text())
    formats = content["quantized"] | change
    content["quantized"] = {path: format for path, format in formats.items() if format}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_model(file.parent)


def test_damaged_codes_are_refused(quantized):
    directory = quantized("nf4")
    array = directory / "params" / "decoder.layers.0.mlp.down.codes"
    content = (array / "0.0").read_bytes()
    (array / "0.0").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        load_model(directory)
    (array / "0.0").write_bytes(content)
    metadata = (array / ".zarray").read_text()
    (array / ".zarray").write_text(metadata.replace("|u1", "|i1"))
    message = "layers/0/mlp/down/codes has dtype int8, but paligemma.json requires uint8"
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_only_the_jax_format_can_be_quantized(tmp_path, capsys):
    paths = [str(TINY), str(tmp_path / "x")]
    with pytest.raises(SystemExit):
        main(["convert", *paths, "--to", "huggingface", "--quantize", "nf4"])
    assert "huggingface checkpoints cannot be quantized" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", *paths])
    assert "--to is required" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_dense_model_is_never_in_memory(monkeypatch):
    """While loading, live bytes never exceed the quantized model and two matrices."""
    dense = load_model(TINY, quantize=None)
    largest = max(value.nbytes for value in parameters(dense).values())
    del dense

    def live_bytes():
        return sum(array.nbytes for array in jax.live_arrays())

    before, measured, put = live_bytes(), [], load._put

    def measure(tensor, sharding):
        measured.append(live_bytes() - before)
        return put(tensor, sharding)

    monkeypatch.setattr(load, "_put", measure)
    model = load_model(TINY, quantize="nf4,embedding=int8,vision=int8")
    nbytes = sum(value.nbytes for value in parameters(model).values())
    assert nbytes < 2.5e6 and max(measured) <= nbytes + 2 * largest
