"""."""

from __future__ import annotations

from dataclasses import replace

import jax


def one_row(inputs, row, images):
    """Row `row` alone, without its pads, with the images that are its own."""
    keep = inputs.valid[row]
    return replace(
        inputs, images=inputs.images[images], **{f: getattr(inputs, f)[row : row + 1, keep] for f in ("tokens", "valid", "prefix", "targets")}
    )


def replace_config(model, **changes):
    """The same weights under a changed config."""
    copy = jax.tree.map(lambda a: a, model)
    copy.config = replace(model.config, **changes)
    return copy
