"""PaliGemma 2 in JAX/Flax: the public door. Its names are imported when first used, so that the command's --help need not wait for jax."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma_jax.inference.answer import Answer
    from paligemma_jax.inference.loading import load
    from paligemma_jax.inference.predictor import Predictor
    from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample
    from paligemma_jax.model.config import PaliGemmaConfig
    from paligemma_jax.processing.processor import Inputs

__all__ = ["Answer", "Beam", "BestOf", "Greedy", "Inputs", "PaliGemmaConfig", "Predictor", "Sample", "load"]

_HOMES = {
    "Answer": "inference.predictor",
    "Beam": "inference.sampling",
    "BestOf": "inference.sampling",
    "Greedy": "inference.sampling",
    "Inputs": "processing.processor",
    "PaliGemmaConfig": "model.config",
    "Predictor": "inference.predictor",
    "Sample": "inference.sampling",
    "load": "inference.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
