"""The names of a model's stages, and the patterns that match them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from re import fullmatch

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.model.edits import Edits, check_pattern
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import collect_stages

TEXT = 8  # tokens of the row whose stages are listed


def stage_shapes(model: PaliGemma, images: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """Every stage of a teacher-forced pass, in order of computation, without running it.

    Returns:
        The shape and dtype of each for one row of one image and 8 tokens; without `images`, of
        text alone.
    """
    vision = model.config.vision
    count = TEXT + vision.num_patches * images
    tokens = jnp.full((1, count), model.config.image_token_id if images else 0, jnp.int32)
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, 3)) if images else None

    def run(model: PaliGemma, tokens: jax.Array, pixels: jax.Array | None) -> dict[str, jax.Array]:
        with collect_stages(only=[".*"]) as stages:
            model(tokens, pixels, jnp.ones_like(tokens, bool), jnp.ones_like(tokens, bool))
        return stages

    return jax.eval_shape(run, model, tokens, pixels)


def check_names(owner: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError unless each pattern matches a name."""
    names = list(names)
    for pattern in patterns:
        check_pattern(owner, pattern)
        if not any(fullmatch(pattern, name) for name in names):
            near = get_close_matches(pattern, names) or names[:3]
            raise ValueError(
                f"{owner} must name stages of the model, got {pattern!r}; "
                f"near it: {', '.join(near)}"
            )


def check_edits(
    model: PaliGemma,
    edits: Edits,
    images: bool = True,
    by_row: bool = False,
    computes_logits: bool = True,
) -> None:
    """Check edits before a program is compiled.

    Args:
        images: Whether the rows have images.
        by_row: Whether a change may have other values for each row. Where prompts are sorted and
            padded, it may not.
        computes_logits: Whether the pass has the stage `logits`. Scores of answers never compute
            all of them.

    Raises:
        ValueError: A pattern matches no stage, or a value has a row axis.
    """
    if not edits.order:
        return
    shapes = stage_shapes(model, images)
    if not computes_logits:
        del shapes["logits"]
    check_names("edit", edits.order, shapes)
    if by_row:
        return
    for pattern, value in zip(edits.order, edits.values, strict=True):
        ndim = min(len(shape.shape) for name, shape in shapes.items() if fullmatch(pattern, name))
        for array in jax.tree.leaves(value):
            if np.ndim(array) >= ndim and np.shape(array)[0] != 1:
                raise ValueError(
                    f"the edit of {pattern} must be the same for all rows here, "
                    f"got {list(np.shape(array))}: prompts are sorted and padded"
                )


def chosen(only: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """`only` as a tuple of patterns."""
    return None if only is None else (only,) if isinstance(only, str) else tuple(only)
