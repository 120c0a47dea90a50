"""This project's own checkpoints: Orbax reads what is written here, and vice versa."""

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
def test_a_stacked_model_is_saved_layer_by_layer(source, tmp_path, to):
    """Training uses stacked layers; the file is the same as from a list of layers."""
    model, config = load_model(source), read(source).config
    save_model(tmp_path / "list", model, to=to)
    model.vision.layers = stack_layers(model.vision.layers)
    model.decoder.layers = stack_layers(model.decoder.layers)
    save_model(tmp_path / "stacked", model, to=to)
    assert model.decoder.layers.attention.q.kernel.shape[0] == 3
    stacked, listed = (read(tmp_path / name, config) for name in ("stacked", "list"))
    assert sources.same(sources.arrays(stacked), sources.arrays(listed))


def test_orbax_reads_what_is_written(source, tmp_path):
    convert(source, tmp_path / "jax", "jax")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "jax" / "params")
    for path, array in sources.arrays(read(source)).items():
        leaf = tree
        for key in path.split("/"):
            leaf = leaf[key]
        np.testing.assert_array_equal(leaf, array)


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_what_orbax_writes_is_read(source, tmp_path, options):
    """A checkpoint whose params/ Orbax saved itself, in any of its forms, is read, converted and
    loaded."""
    base = read(source).with_dtype("bfloat16")
    tree: dict = {}
    for path, array in sources.arrays(base).items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(array)
    (tmp_path / "jax").mkdir()
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(tmp_path / "jax" / "params", tree)
    orbax.describe(tmp_path / "jax", base)
    convert(tmp_path / "jax", tmp_path / "hf", "huggingface", verify=True)
    converted = sources.arrays(read(tmp_path / "hf"))
    assert sources.same(converted, sources.arrays(base))
    model = parameters(load_model(tmp_path / "jax", "bfloat16"))
    assert sources.same({path: np.asarray(value) for path, value in model.items()}, converted)


def test_missing_rows_of_a_table_are_the_mean():
    """Any slice of a padded table has the stored rows, followed by their mean."""
    table = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    mean = table.astype(np.float64).mean(0).astype(np.float32)
    expected = np.concatenate([table, np.broadcast_to(mean, (4, 6))])
    padded = with_rows(from_array(table), 14)
    bounds = [(None, None), (0, 7), (7, 14), (12, 14), (10, 14), (9, None)]
    for rows in (slice(*pair) for pair in bounds):
        for columns in (slice(None), slice(2, 5)):
            np.testing.assert_array_equal(padded.load((rows, columns)), expected[rows, columns])
    cut = with_rows(from_array(table), 4)
    np.testing.assert_array_equal(cut.load((slice(1, 9),)), table[1:4])
