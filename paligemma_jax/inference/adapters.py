"""LoRA adapters that share a base: read and checked, and chosen by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import peft
from convert.adapter import Adapter, Factors
from paligemma_jax.checkpoints.source import find_adapter
from paligemma_jax.inference.row_adapters import FlattenedForRows, add_adapters
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.sharding.compiled import Flattened

# A directory or hub id of an adapter, or its factors by the path of each layer.
AdapterSource = str | Path | Mapping[str, Factors]


def open_adapters(
    adapters: Mapping[str, AdapterSource], config: PaliGemmaConfig
) -> dict[str, Mapping[str, Factors]]:
    """Read the LoRA adapters of a model with this config: their factors, by name.

    Args:
        adapters: By name, a directory as `finetune` or peft writes it, a run whose result is one, a
            hub id, or factors.

    Raises:
        ValueError: There is no such adapter, or it does not fit the model; or rows of one batch
            cannot have it: it has DoRA, a soft prompt, a prefix, or trained parameters.
    """
    return {name: _open(name, source, config) for name, source in adapters.items()}


def _open(name: str, source: AdapterSource, config: PaliGemmaConfig) -> Mapping[str, Factors]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of an adapter must be a text, got {name!r}")
    is_open = isinstance(source, Mapping)
    adapter = Adapter({**source}) if is_open else peft.read(find_adapter(source), config)
    others = _more_than_lora(adapter)
    if others:
        raise ValueError(
            f"an adapter beside others must have LoRA alone, but {name!r} has {others}: load it as "
            "a model of its own, with pg.load"
        )
    return adapter.factors


def _more_than_lora(adapter: Adapter) -> str:
    """What an adapter has besides LoRA, if anything."""
    if adapter.soft_tokens:
        return f"a {adapter.soft_kind}"
    if adapter.parameters:
        return f"trained parameters ({min(adapter.parameters)})"
    has_magnitudes = any(f.magnitude is not None for f in adapter.factors.values())
    return "magnitudes (DoRA)" if has_magnitudes else ""


class Adapters:
    """A model with its adapters, flattened for programs."""

    def __init__(self, model: PaliGemma, adapters: Mapping[str, AdapterSource]):
        factors = open_adapters(adapters, model.config)
        self.config = model.config
        self.names = [None, *factors]  # by number
        self.flat: Any = Flattened.of(add_adapters(model, factors) if factors else model)
        # Those whose features of an image are not those of the base.
        self.of_images = {
            self.names.index(name)
            for name, paths in factors.items()
            if any(not path.startswith("decoder/") for path in paths)
        }

    def number(self, name: str | None) -> int:
        """The number of an adapter, 0 for the base. ValueError if there is none of the name."""
        if name in self.names:
            return self.names.index(name)
        names = ", ".join(repr(name) for name in self.names[1:])
        choices = f"None, for the base, or one of {names}" if names else "None"
        hint = "" if names else ": this engine was made without adapters"
        raise ValueError(f"adapter must be {choices}, got {name!r}{hint}")

    def select(self, numbers: int | Sequence[int]) -> Any:
        """What takes the place of the model in programs, with these adapters in the rows of their
        batch, or with one in all rows."""
        if len(self.names) == 1:
            return self.flat
        rows = np.asarray(numbers, np.int32)
        return FlattenedForRows(self.flat.leaves, self.flat.structure, rows)
