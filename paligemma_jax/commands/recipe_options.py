"""The flags of `evaluate` that name a published task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from paligemma_jax.commands.options import flag
from paligemma_jax.commands.recipe import find_recipe, scored_metrics

if TYPE_CHECKING:
    from paligemma_jax.evaluation.published import PublishedTask
    from paligemma_jax.model.config import PaliGemmaConfig

Task = Annotated[str | None, flag("TASK", "none")]
Split = Annotated[str | None, flag("NAME", "the only one")]
Size = Annotated[Literal["3b", "10b", "28b", "pg1-3b"] | None, flag("SIZE", "the model's")]
Pixels = Annotated[int | None, flag("N", "the model's")]


@dataclass(frozen=True)
class RecipeOptions:
    """Which published task to evaluate, and which of its results to compare with."""

    recipe: Task = None
    """Evaluate as in this published task: its metrics, beams and longest answer, unless given as
    flags. The result is compared with the published one for this size of model and image.
    `paligemma-jax recipe` lists the tasks. tiny needs no --data: it makes images of held-out
    digits, and gives the figures in the documentation."""
    split: Split = None
    """Split of --data, for tasks with published results of several."""
    size: Size = None
    """Size of the model that gave --answers: 3b, 10b, 28b or pg1-3b (PaliGemma 1)."""
    resolution: Pixels = None
    """Size of its images in pixels."""

    def fill(
        self, metrics: tuple[str, ...], max_new_tokens: int | None, beams: int | None
    ) -> tuple[tuple[str, ...], int, int]:
        """Return metrics, length and beams: as given, else the recipe's, else 128 and 1.

        Raises:
            ValueError: The task is unknown or none of its metrics is computed, or the split is not
                one of its own.
        """
        self._check()
        if self.recipe is not None:
            row = find_recipe(self.recipe, "--recipe")
            metrics = metrics or scored_metrics(self.recipe, row)
            max_new_tokens = row.new_tokens if max_new_tokens is None else max_new_tokens
            beams = row.beams if beams is None else beams
        length = 128 if max_new_tokens is None else max_new_tokens
        return metrics, length, 1 if beams is None else beams

    def published(self, config: PaliGemmaConfig | None) -> PublishedTask | None:
        """The published results to compare with; `config` is the model's, if it is known."""
        from paligemma_jax.evaluation.published import PublishedTask, published_model

        if self.recipe is None:
            return None
        size, resolution = published_model(config) if config else ("", 0)
        return PublishedTask(
            self.recipe, self.size or size, self.resolution or resolution, self.split
        )

    def _check(self) -> None:
        from paligemma_jax.evaluation.published import splits

        if self.recipe is None:
            for name in ("split", "size", "resolution"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} requires --recipe")
            return
        find_recipe(self.recipe, "--recipe")
        choices = splits(self.recipe)
        if self.split is not None and self.split not in choices:
            named = ", ".join(map(repr, choices)) or "left out, as no results are published"
            raise ValueError(f"--split must be one of {named}; got {self.split}")


RecipeFlags = Annotated[RecipeOptions, tyro.conf.arg(name="")]  # flags without a prefix
