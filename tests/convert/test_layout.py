"""`convert.layout` on random shapes against einsum, and the tables against the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.config import read_config, write_config
from convert.layout import layout_shape, reorder
from convert.match import pieces, shapes
from convert.table import BIG_VISION, HUGGINGFACE, JAX
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.model.config import PRESETS
from paligemma_jax.model.tree import parameters
from paligemma_jax.sharding.rules import axis_letters

LETTERS = "DNHKFV"


def grouped(letters: list[str], cuts: list[bool], ones: int) -> str:
    """Letters as a layout: a space where `cuts` says so, and an axis of size 1 in front if `ones`."""
    return "1 " * ones + letters[0] + "".join(" " * cut + letter for letter, cut in zip(letters[1:], cuts))


@st.composite
def layouts(draw):
    letters = draw(st.permutations(LETTERS[: draw(st.integers(1, 5))]))
    cuts = st.lists(st.booleans(), min_size=5, max_size=5)
    source = grouped(letters, draw(cuts), draw(st.integers(0, 1)))
    target = grouped(draw(st.permutations(letters)), draw(cuts), draw(st.integers(0, 1)))
    return source, target, {letter: draw(st.integers(1, 5)) for letter in letters}


@settings(deadline=None, max_examples=300)
@given(layouts(), st.sampled_from([np.float32, np.float16, np.int8]))
def test_reorder(case, dtype):
    """There and back is the identity, and each way is what einsum does with all axes apart."""
    source, target, sizes = case
    letters = source.replace(" ", "").replace("1", "")
    apart = np.arange(np.prod([sizes[letter] for letter in letters])).astype(dtype).reshape([sizes[letter] for letter in letters])
    array = apart.reshape(layout_shape(source, sizes))
    found = reorder(array, source, target, sizes)
    expected = np.einsum(f"{letters}->{target.replace(' ', '').replace('1', '')}", apart)
    np.testing.assert_array_equal(found, expected.reshape(layout_shape(target, sizes)))
    np.testing.assert_array_equal(reorder(found, target, source, sizes), array)


@settings(deadline=None, max_examples=100)
@given(layouts())
def test_reorder_of_the_same_layout_is_no_copy(case):
    source, _, sizes = case
    array = np.zeros(layout_shape(source, sizes))
    assert reorder(array, source, source, sizes) is array


def test_known_layouts():
    """The three that a mistake would hide in, written out."""
    sizes = {"N": 2, "H": 3, "D": 4, "W": 5, "C": 3, "h": 2, "w": 2, "P": 6}
    query = np.arange(24.0).reshape(6, 4)  # torch: (out, in), out = heads x head size
    np.testing.assert_array_equal(reorder(query, "NH D", "D N H", sizes), query.T.reshape(4, 2, 3))
    output = np.arange(24.0).reshape(4, 6)
    np.testing.assert_array_equal(reorder(output, "D NH", "N H D", sizes), output.T.reshape(2, 3, 4))
    patch = np.arange(60.0).reshape(5, 3, 2, 2)
    np.testing.assert_array_equal(reorder(patch, "W C h w", "hwC W", sizes), np.moveaxis(patch, (0, 1), (3, 2)).reshape(12, 5))


@pytest.mark.parametrize("preset", ["3b-224", "28b-448", "pg1-3b-896", "tiny"])
def test_tables_fill_the_model(preset):
    """Every table names every parameter of every preset once, in its shape; config.json says the same there and back."""
    config = PRESETS[preset]
    model = {path: leaf.shape for path, leaf in parameters(abstract_model(config)).items()}
    for table in (HUGGINGFACE, BIG_VISION, JAX):
        found = pieces(table[config.decoder.model_type], config)
        assert {piece.path: layout_shape(piece.target, piece.sizes) for piece in found} == model
        assert len(found) == len(model)
        assert sum(int(np.prod(s)) for s in shapes(found).values()) == sum(int(np.prod(s)) for s in model.values())
    assert read_config(write_config(config, "float32"), {"eos_token_id": list(config.eos_token_ids)}) == config


def test_sharding_rows_say_the_layout():
    """The axis letters of `scaling.sharding` are those of the weight table, those of vectors too where they have a row."""
    for path, (_, _, _, layout) in ((row[2].replace("*", "0"), row) for rows in HUGGINGFACE.values() for row in rows):
        axes = layout.replace("hwC", "U").split()
        assert axis_letters(path, len(axes)) == axes if len(axes) > 1 else not {*axis_letters(path, 1)} - {*axes}, path
