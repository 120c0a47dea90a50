"""This project's own checkpoints: Orbax reads what is written here, what Orbax writes is read here; models in memory are saved."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import checkpoint_sources as sources

from convert import convert, orbax, read
from convert.tensor import from_array, with_rows
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.model.stack import stack_layers
from paligemma_jax.model.tree import parameters


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.huggingface(tmp_path_factory.mktemp("source") / "pg2")


@pytest.mark.parametrize("to", ["jax", "huggingface", "big_vision"])
def test_a_stacked_model_is_written_layer_by_layer(source, tmp_path, to):
    """What training works on, a model whose layers are stacked: the same file as from the list."""
    model = load_model(source)
    save_model(tmp_path / "list", model, to=to)
    model.vision.layers, model.decoder.layers = stack_layers(model.vision.layers), stack_layers(model.decoder.layers)
    save_model(tmp_path / "stacked", model, to=to)
    assert model.decoder.layers.attention.q.kernel.shape[0] == 3
    found, expected = (read(tmp_path / name, read(source).config).tensors for name in ("stacked", "list"))
    assert sources.same({path: t.read() for path, t in found.items()}, {path: t.read() for path, t in expected.items()})


def test_orbax_reads_what_is_written(source, tmp_path):
    convert(source, tmp_path / "jax", "jax")
    with ocp.StandardCheckpointer() as orbax_checkpointer:
        tree = orbax_checkpointer.restore(tmp_path / "jax" / "params")
    for path, tensor in read(source).tensors.items():
        leaf = tree
        for key in path.split("/"):
            leaf = leaf[key]
        np.testing.assert_array_equal(leaf, tensor.read())


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_what_orbax_writes_is_read(source, tmp_path, options):
    """A checkpoint whose params/ Orbax saved itself, in any of its forms: read, converted, loaded."""
    base = read(source).with_dtype("bfloat16")
    tree: dict = {}
    for path, tensor in base.tensors.items():
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = jnp.asarray(tensor.load())
    (tmp_path / "jax").mkdir()
    with ocp.PyTreeCheckpointer(**options) as saver:
        saver.save(tmp_path / "jax" / "params", tree)
    orbax.describe(tmp_path / "jax", base)
    convert(tmp_path / "jax", tmp_path / "hf", "huggingface", verify=True)
    found = {path: tensor.read() for path, tensor in read(tmp_path / "hf").tensors.items()}
    assert sources.same(found, {path: tensor.read() for path, tensor in base.tensors.items()})
    model = parameters(load_model(tmp_path / "jax", "bfloat16"))
    assert sources.same({path: np.asarray(value) for path, value in model.items()}, found)


def test_rows_that_a_table_lacks():
    """Any slice of a filled up table is that slice of the whole: the rows there are, then their mean."""
    table = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    whole = np.concatenate([table, np.broadcast_to(table.astype(np.float64).mean(0).astype(np.float32), (4, 6))])
    filled = with_rows(from_array(table), 14)
    for rows in (slice(None), slice(0, 7), slice(7, 14), slice(12, 14), slice(10, 14), slice(9, None)):
        for columns in (slice(None), slice(2, 5)):
            np.testing.assert_array_equal(filled.load((rows, columns)), whole[rows, columns])
    np.testing.assert_array_equal(with_rows(from_array(table), 4).load((slice(1, 9),)), table[1:4])
