"""Quantized checkpoints: stored, loaded again, sharded, verified, made dense; damaged ones."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from support import on_devices

import convert
from convert.__main__ import main
from paligemma_jax.checkpoints import load
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization import quantize

HOW = "nf4-32-double,embedding=int8-bf16,vision=int4"


@pytest.fixture
def smaller(tmp_path):
    """-> the directory of tiny, quantized by the command."""

    def make(how=HOW, name="smaller"):
        main([str(TINY), str(tmp_path / name), "--quantize", how, "--verify"])
        return tmp_path / name

    return make


def same(a, b):
    found, expected = parameters(a), parameters(b)
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert value.dtype == expected[path].dtype and (np.asarray(value) == np.asarray(expected[path])).all(), path


@pytest.mark.parametrize("how", ["int8", "int4-128", HOW])
def test_stored_and_loaded_bit_for_bit(smaller, how, tmp_path, capsys):
    stored, loading = load_model(smaller(how)), load_model(TINY, quantize=how)
    same(stored, loading)
    assert "verified" in capsys.readouterr().out
    save_model(tmp_path / "again", stored, like=tmp_path / "smaller")
    save_model(tmp_path / "stack", stack_model(stored, delete=False))
    for name in ("again", "stack"):
        same(load_model(tmp_path / name), stored)


def test_orbax_restores_it(smaller):
    import orbax.checkpoint as ocp

    directory = smaller()
    tree = ocp.StandardCheckpointer().restore(directory / "params")
    codes = parameters(load_model(directory))["decoder/layers/0/mlp/down/codes"]
    np.testing.assert_array_equal(tree["decoder"]["layers"]["0"]["mlp"]["down"]["codes"], codes)


def test_size_on_disk(smaller):
    """4 + 8/32 bits and what quantizes the scales, 8 bits and a bfloat16 a row, 4 + 32/64 bits; the rest in bfloat16."""
    directory = smaller()
    held = {p: v.nbytes for p, v in parameters(load_model(directory, "bfloat16")).items()}
    files = {f.parent.name.replace(".", "/"): f.stat().st_size for f in (directory / "params").glob("*/0*")}
    assert files == held
    plain = {p: v.size for p, v in parameters(load_model(TINY)).items()}
    numbers = sum(n for p, n in plain.items() if "decoder/layers" in p and p.endswith("kernel"))
    found = sum(n for p, n in held.items() if "decoder/layers" in p and "norm" not in p and "nested" not in p)
    assert found == numbers * (4 + 8 / 32) / 8


def test_made_dense_again(smaller, tmp_path, capsys):
    directory = smaller()
    main([str(directory), str(tmp_path / "dense"), "--to", "huggingface", "--verify"])
    small, plain = load_model(directory), parameters(load_model(tmp_path / "dense", "bfloat16"))
    assert (small.decoder.layers[1].mlp.down.dense("bfloat16") == plain["decoder/layers/1/mlp/down/kernel"]).all()
    assert (small.decoder.embedder.dense("bfloat16") == plain["decoder/embedder/table"]).all()
    assert convert.inspect(directory)["parameters"] == convert.inspect(TINY)["parameters"]
    main(["inspect", str(directory)])
    assert "nf4-32-double (28)" in capsys.readouterr().out
    save_model(tmp_path / "dense-too", small, to="huggingface")
    same(load_model(tmp_path / "dense-too", "bfloat16"), load_model(tmp_path / "dense", "bfloat16"))


@pytest.mark.parametrize("stored", [True, False])
def test_sharded(smaller, stored):
    """Stored, or quantized while it is read: to the bit what one device holds, with codes and scales in slices."""
    found = on_devices.call(8, "loaded", str(smaller()), None) if stored else on_devices.call(8, "loaded", str(TINY), HOW)
    assert not found["other"]
    assert {"decoder/embedder/codes", "decoder/layers/0/mlp/up/codes", "decoder/layers/0/mlp/up/scale", "vision/layers/0/mlp/up/codes"} <= {
        *found["sliced"]
    }


def test_what_blocks_do_not_divide_is_told(random_directory, tmp_path):
    """Of the random checkpoint 64 divides all projections but not the rows of the table."""
    with pytest.warns(UserWarning, match=r"left as they are, since blocks do not divide them: decoder/embedder \[1600, 56\]$"):
        model = load_model(random_directory(), quantize="nf4,embedding=nf4")
    assert len(quantize.weight_formats(model)) == 4 * 7


def test_it_stays_as_it_is(smaller):
    directory = smaller()
    same(load_model(directory, quantize="vision=int4"), load_model(directory))
    with pytest.raises(ValueError, match="is held as nf4-32-double already and cannot be made int8"):
        load_model(directory, quantize="int8")


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda q: q.update({"decoder/layers/0/mlp/down": "nf5"}), "no sound list of what is quantized: unknown quantization 'nf5'"),
        (lambda q: q.update({"decoder/layers/9/mlp/down": "nf4"}), r"decoder/layers/\*/mlp/down: no matrix of this model"),
        (lambda q: q.update({"decoder/layers/0/mlp/down": "nf4-64"}), "asks for"),
        (lambda q: q.update({"decoder/layers/0/mlp/down": "int8"}), "asks for"),
        (lambda q: q.pop("decoder/layers/0/mlp/down"), r"unknown key decoder/layers/0/mlp/down/codes"),
        (lambda q: q.update({"projector": "int8"}), "missing projector/codes"),
    ],
)
def test_lists_that_do_not_fit(smaller, change, expected):
    file = smaller() / "paligemma.json"
    described = json.loads(file.read_text())
    change(described["quantized"])
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=expected):
        load_model(file.parent)


def test_damaged_files(smaller):
    directory = smaller("nf4")
    array = directory / "params" / "decoder.layers.0.mlp.down.codes"
    whole = (array / "0.0").read_bytes()
    (array / "0.0").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        load_model(directory)
    (array / "0.0").write_bytes(whole)
    about = (array / ".zarray").read_text()
    (array / ".zarray").write_text(about.replace("|u1", "|i1"))
    with pytest.raises(ValueError, match=r"decoder/layers/0/mlp/down/codes has dtype int8, paligemma.json asks for uint8"):
        load_model(directory)


def test_no_other_form_holds_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(TINY), str(tmp_path / "x"), "--to", "huggingface", "--quantize", "nf4"])
    assert "huggingface checkpoints hold no quantized weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(TINY), str(tmp_path / "x")])
    assert "required: --to" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_dense_model_is_never_in_memory(monkeypatch):
    """Live bytes while loading: at no time more than the quantized model and two matrices."""
    plain = load_model(TINY, quantize=None)
    largest = max(value.nbytes for value in parameters(plain).values())
    del plain
    before, most = sum(array.nbytes for array in jax.live_arrays()), []
    put = load._put
    count = lambda tensor, place: (most.append(sum(a.nbytes for a in jax.live_arrays()) - before), put(tensor, place))[1]
    monkeypatch.setattr(load, "_put", count)
    small = load_model(TINY, quantize="nf4,embedding=int8,vision=int8")
    held = sum(value.nbytes for value in parameters(small).values())
    assert held < 2.5e6 and max(most) <= held + 2 * largest
