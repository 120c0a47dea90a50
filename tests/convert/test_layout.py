"""`convert.layout` on random shapes against einsum, and the weight tables against the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.config import config_from_json, config_to_json
from convert.layout import layout_shape, reorder
from convert.match import file_shapes, weights
from convert.table import BIG_VISION, HUGGINGFACE, JAX
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.model.config import PRESETS
from paligemma_jax.model.tree import parameters
from paligemma_jax.sharding.rules import axis_letters

LETTERS = "DNHKFV"


def join(letters: list[str], cuts: list[bool], ones: int) -> str:
    """A layout of these letters, with a space at every cut, and `ones` axes of size 1 in front."""
    rest = "".join(
        " " * cut + letter
        for letter, cut in zip(letters[1:], cuts[: len(letters) - 1], strict=True)
    )
    return "1 " * ones + letters[0] + rest


@st.composite
def layouts(draw):
    letters = draw(st.permutations(LETTERS[: draw(st.integers(1, 5))]))
    cuts = st.lists(st.booleans(), min_size=5, max_size=5)
    source = join(letters, draw(cuts), draw(st.integers(0, 1)))
    target = join(draw(st.permutations(letters)), draw(cuts), draw(st.integers(0, 1)))
    return source, target, {letter: draw(st.integers(1, 5)) for letter in letters}


@settings(deadline=None, max_examples=300)
@given(layouts(), st.sampled_from([np.float32, np.float16, np.int8]))
def test_reorder(case, dtype):
    """A round trip is the identity, and one way matches einsum with all axes split."""
    source, target, sizes = case
    letters, new_letters = (layout.replace(" ", "").replace("1", "") for layout in (source, target))
    shape = [sizes[letter] for letter in letters]
    split = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    array = split.reshape(layout_shape(source, sizes))
    reordered = reorder(array, source, target, sizes)
    expected = np.einsum(f"{letters}->{new_letters}", split)
    np.testing.assert_array_equal(reordered, expected.reshape(layout_shape(target, sizes)))
    np.testing.assert_array_equal(reorder(reordered, target, source, sizes), array)


@settings(deadline=None, max_examples=100)
@given(layouts())
def test_reorder_to_the_same_layout_does_not_copy(case):
    source, _, sizes = case
    array = np.zeros(layout_shape(source, sizes))
    assert reorder(array, source, source, sizes) is array


def test_known_layouts():
    """The three layouts in which a mistake would be hard to see, written out."""
    sizes = {"N": 2, "H": 3, "D": 4, "W": 5, "C": 3, "h": 2, "w": 2, "P": 6}
    query = np.arange(24.0).reshape(6, 4)  # torch: [out, in], out = heads x head size
    reordered = reorder(query, "NH D", "D N H", sizes)
    np.testing.assert_array_equal(reordered, query.T.reshape(4, 2, 3))
    output = np.arange(24.0).reshape(4, 6)
    reordered = reorder(output, "D NH", "N H D", sizes)
    np.testing.assert_array_equal(reordered, output.T.reshape(2, 3, 4))
    patch = np.arange(60.0).reshape(5, 3, 2, 2)
    expected = np.moveaxis(patch, (0, 1), (3, 2)).reshape(12, 5)
    np.testing.assert_array_equal(reorder(patch, "W C h w", "hwC W", sizes), expected)


@pytest.mark.parametrize("preset", ["3b-224", "28b-448", "pg1-3b-896", "tiny"])
def test_tables_fill_the_model(preset):
    """Every table has every parameter of every preset once, in its shape; config.json gives the
    same config back."""
    config = PRESETS[preset]
    model = {path: leaf.shape for path, leaf in parameters(abstract_model(config)).items()}
    numbers = sum(int(np.prod(shape)) for shape in model.values())
    for table in (HUGGINGFACE, BIG_VISION, JAX):
        rows = weights(table[config.decoder.model_type], config)
        assert {weight.path: weight.model_shape for weight in rows} == model
        assert len(rows) == len(model)
        assert sum(int(np.prod(shape)) for shape in file_shapes(rows).values()) == numbers
    generation = {"eos_token_id": list(config.eos_token_ids)}
    assert config_from_json(config_to_json(config, "float32"), generation) == config


def test_sharding_rules_have_the_axes_of_the_layouts():
    """The axis letters of `sharding.rules` are those of the weight table; those of vectors too,
    where they have a rule."""
    for row in (row for rows in HUGGINGFACE.values() for row in rows):
        path, axes = row.path.replace("*", "0"), row.model_layout.replace("hwC", "U").split()
        letters = axis_letters(path, len(axes))
        assert letters == axes if len(axes) > 1 else not {*letters} - {*axes}, path
