"""PaliGemma 2 in JAX/Flax: the public names of the package.

They are imported when first used, so that `paligemma-jax --help` does not wait for jax.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "load": "paligemma_jax.inference.loading",
    "finetune": "paligemma_jax.training.finetune",
    "evaluate": "paligemma_jax.evaluation.evaluate",
    "convert": "convert.formats",
    "draw": "paligemma_jax.processing.locations",
    "parse_detections": "paligemma_jax.processing.locations",
    "Sampler": "paligemma_jax.inference.sampler",
    "Greedy": "paligemma_jax.inference.sampling",
    "Sample": "paligemma_jax.inference.sampling",
    "Beam": "paligemma_jax.inference.sampling",
    "BestOf": "paligemma_jax.inference.sampling",
    "DecodingOptions": "paligemma_jax.inference.options",
    "Choices": "paligemma_jax.grammars.grammar",
    "Boxes": "paligemma_jax.grammars.grammar",
    "Masks": "paligemma_jax.grammars.grammar",
    "Json": "paligemma_jax.grammars.guidance",
    "Regex": "paligemma_jax.grammars.guidance",
    "Answer": "paligemma_jax.inference.answer",
    "Detection": "paligemma_jax.processing.locations",
    "Inputs": "paligemma_jax.processing.processor",
    "Predictor": "paligemma_jax.inference.predictor",
    "PaliGemmaConfig": "paligemma_jax.model.config",
    "FinetuneConfig": "paligemma_jax.training.config",
    "Trainer": "paligemma_jax.training.trainer",
    "TrainState": "paligemma_jax.training.trainer",
    "StepEvent": "paligemma_jax.training.callbacks",
}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # the type depends on the name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
