"""What an adapter changes in a model, and how it is merged into a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from convert.checkpoint import Checkpoint
from convert.quantized import dequantize_checkpoint
from convert.tensor import THREADS, Tensor


@dataclass(frozen=True)
class Factors:
    """The update of one kernel: W + scale * B A. With a magnitude (DoRA, arXiv:2402.09353), the
    rows of the result are then scaled to it."""

    a: np.ndarray  # float32[R, in...]
    b: np.ndarray  # float32[out..., R]
    scale: float
    magnitude: np.ndarray | None = None  # float32[out...]

    @property
    def rank(self) -> int:
        return len(self.a)

    def merged(self, kernel: np.ndarray) -> np.ndarray:
        """The kernel [out..., in...] with the update, in float32."""
        kernel = kernel.astype(np.float32) + self.scale * np.tensordot(self.b, self.a, 1)
        if self.magnitude is None:
            return kernel
        inputs = tuple(range(self.b.ndim - 1, kernel.ndim))
        norm = np.sqrt(np.sum(kernel**2, axis=inputs, keepdims=True))
        return kernel * (self.magnitude.reshape(norm.shape) / norm)


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes in a model."""

    factors: dict[str, Factors]  # by the path of the linear layer
    parameters: dict[str, Tensor] = field(default_factory=dict)  # new values, by path
    soft_prompt: np.ndarray | None = None  # float32[N, D]: embeddings in front of each prompt
    prefix: np.ndarray | None = None  # float32[N, L, 2, K, H]: keys and values there

    @property
    def soft_tokens(self) -> int:
        vectors = self.soft_prompt if self.prefix is None else self.prefix
        return 0 if vectors is None else len(vectors)

    @property
    def soft_kind(self) -> str:
        """What gives the soft tokens their meaning, for errors."""
        return "soft prompt" if self.prefix is None else "prefix"


def replace_parameters(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the parameters that the adapter replaces, in the dtypes of the old."""
    modules = {path.rpartition("/")[0] for path in adapter.parameters}
    checkpoint = dequantize_checkpoint(checkpoint, modules)
    old = checkpoint.tensors
    new = {path: tensor.cast(old[path].dtype.name) for path, tensor in adapter.parameters.items()}
    return replace(checkpoint, tensors=old | new)


def merge(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Merge an adapter into its base. Each matrix is computed in float32 when it is read, and
    rounded once, to its own dtype. Quantized matrices are dequantized.

    Raises:
        ValueError: The adapter has a soft prompt or a prefix.
    """
    if adapter.soft_tokens:
        raise ValueError(
            f"a {adapter.soft_kind} cannot be merged into the weights: load the adapter itself"
        )
    checkpoint = replace_parameters(checkpoint, adapter)
    checkpoint = dequantize_checkpoint(checkpoint, adapter.factors)
    base = checkpoint.tensors

    @lru_cache(THREADS)  # each thread writes one matrix at a time, block by block
    def merged(module: str) -> np.ndarray:
        return adapter.factors[module].merged(base[f"{module}/kernel"].numpy())

    def merged_tensor(module: str) -> Tensor:
        return replace(base[f"{module}/kernel"], raw=lambda index: merged(module)[index])

    kernels = {f"{module}/kernel": merged_tensor(module) for module in adapter.factors}
    return replace(checkpoint, tensors=base | kernels)
