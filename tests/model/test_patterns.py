"""Patterns of paths select the same parameters in both layer forms."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.patterns import alternatives, matches, unmatched
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters

STACKED = jax.ShapeDtypeStruct((4, 8), np.float32)


@pytest.mark.parametrize(
    "pattern, path, value, expected",
    [
        ("projector/.*", "projector/kernel", STACKED, True),
        ("decoder/layers/3/.*", "decoder/layers/3/mlp/up", None, True),
        ("decoder/layers/3/.*", "decoder/layers/2/mlp/up", None, False),
        ("decoder/layers/mlp/.*", "decoder/layers/2/mlp/up", None, True),
        ("decoder/layers/mlp/.*", "decoder/layers/mlp/up", STACKED, True),
        (r"decoder/layers/\d/mlp/.*", "decoder/layers/mlp/up", STACKED, True),
        ("decoder/layers/9/.*", "decoder/layers/mlp/up", STACKED, False),
        # Without its number, layer 3 would match.
        ("(?!decoder/layers/3/).*", "decoder/layers/3/mlp/up", None, False),
        ("(?!decoder/layers/3/).*", "decoder/layers/2/mlp/up", None, True),
    ],
)
def test_number_of_a_layer_may_be_left_out(pattern, path, value, expected):
    assert matches(pattern, path, value) is expected


@pytest.mark.parametrize(
    "pattern, layers",
    [("decoder/layers/[12]/.*|decoder/norm/scale", "1, 2"), ("(?!.*/3/).*", "0, 1, 2")],
)
def test_some_layers_of_a_stack_are_refused(pattern, layers):
    with pytest.raises(ValueError, match=rf"all 4 layers .*, got layers {layers}: add --layers"):
        matches(pattern, "decoder/layers/mlp/up/kernel", STACKED)


@pytest.mark.parametrize(
    "pattern",
    [".*", r".*/layers/\d+/attention/.*", ".*/layers/attention/q/kernel", "vision/layers/mlp/.*"],
)
def test_both_forms_select_the_same_parameters(pattern):
    model = load_model("tiny")
    names = []
    for form in (model, stack_model(model, delete=False)):
        chosen = [p for p, x in parameters(form).items() if matches(pattern, p, x)]
        names.append({"/".join(x for x in path.split("/") if not x.isdigit()) for path in chosen})
    assert names[0] == names[1] != set()


@pytest.mark.parametrize(
    "pattern, parts",
    [
        ("a|b/.*", ["a", "b/.*"]),
        ("(a|b)/c", ["(a|b)/c"]),
        ("(?!x|y).*|b", ["(?!x|y).*", "b"]),
        (r"a\|b|c\(|d", [r"a\|b", r"c\(", "d"]),
        ("[|(]a|[]|]b|[^]|]c", ["[|(]a", "[]|]b", "[^]|]c"]),
        ("(?i)a|b", ["(?i)a", "(?i)b"]),
        (r"(a)b|(?:c\1)", [r"(a)b|(?:c\1)"]),
        ("", [""]),
    ],
)
def test_alternatives_of_a_pattern(pattern, parts):
    assert alternatives(pattern) == parts


@pytest.mark.parametrize("form", ["list", "stack"])
def test_alternatives_that_match_nothing(form):
    """Tiny has four layers in each tower."""
    model = load_model("tiny")
    values = parameters(stack_model(model) if form == "stack" else model)
    assert unmatched("decoder/layers/9/.*|decoder/norm/scale", values) == ["decoder/layers/9/.*"]
    assert unmatched("decoder/layers/[19]/.*|vision/layers/mlp/.*|projector/.*", values) == []
    assert unmatched("decoder/layers/[01]/.*|decoder/layers/[23]/.*", values) == []
    assert unmatched("(decoder|no)/norm/.*|head|no/.*", values) == ["head", "no/.*"]
