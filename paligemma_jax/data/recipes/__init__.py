"""How PaliGemma 2 was fine-tuned and evaluated on published data sets: a table of tasks.

Each task is one `Recipe`. "report 1" is arXiv:2407.07726 (PaliGemma), "report 2" is
arXiv:2412.03555 (PaliGemma 2), "big_vision" is google-research/big_vision,
configs/proj/paligemma/transfers/NAME.py at 0127fb6 (`sweep_best` where it has one).

Table 14 of report 2 has the learning rates that did best for each model size on the validation
data, swept at 224 pixels and used at every resolution. `results` has the published results.
"""

from paligemma_jax.data.recipes.captions import CAPTIONS
from paligemma_jax.data.recipes.figures import Figure, Result, results
from paligemma_jax.data.recipes.new_tasks import NEW_TASKS
from paligemma_jax.data.recipes.questions import QUESTIONS
from paligemma_jax.data.recipes.recipe import Recipe, Source
from paligemma_jax.data.recipes.references import REFERENCES
from paligemma_jax.data.recipes.zero_shot import ZERO_SHOT

RECIPES: dict[str, Recipe] = {**QUESTIONS, **CAPTIONS, **REFERENCES, **ZERO_SHOT, **NEW_TASKS}

__all__ = ["RECIPES", "Figure", "Recipe", "Result", "Source", "results"]
