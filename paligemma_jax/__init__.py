"""PaliGemma 2 in JAX/Flax: the public door."""

from paligemma_jax.inference.predictor import Predictor, load
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.processing.processor import Inputs

__all__ = ["Greedy", "Inputs", "PaliGemmaConfig", "Predictor", "Sample", "load"]
