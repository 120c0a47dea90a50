"""Parts of a batch, and models under another config."""

from __future__ import annotations

from dataclasses import replace

import jax

FIELDS = ("tokens", "valid", "prefix", "targets")


def one_row(inputs, row, images):
    """Return row `row` alone, without its pads, with its images (an index into all images)."""
    keep = inputs.valid[row]
    arrays = {name: getattr(inputs, name)[row : row + 1, keep] for name in FIELDS}
    return replace(inputs, images=inputs.images[images], **arrays)


def replace_config(model, **changes):
    """The same weights with a changed config."""
    copy = jax.tree.map(lambda a: a, model)
    copy.config = replace(model.config, **changes)
    return copy
