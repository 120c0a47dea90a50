"""Results of a small model in a process of its own: `python tests/support/determinism.py FILE`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from support.paths import ROOT, TESTS

Results = dict[str, np.ndarray]


def in_process(file: Path, **environment: str) -> Results:
    """Compute the results anew, without programs on disk, as users compile."""
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "XLA_FLAGS": ""}
    own |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, __file__, str(file)]
    subprocess.run(command, env=os.environ | own | environment, check=True)
    with np.load(file) as arrays:
        return dict(arrays)


def compute() -> Results:
    """Logits in two dtypes, and the gradient of the loss in float32."""
    import jax
    import jax.numpy as jnp

    from paligemma_jax.bench.training import with_targets
    from paligemma_jax.checkpoints.synthetic import SMALL_CONFIG, random_model, synthetic_inputs
    from paligemma_jax.inference import scoring
    from paligemma_jax.model.paligemma import PaliGemma
    from paligemma_jax.model.stack import stack_model
    from paligemma_jax.training.losses import answer_loss

    inputs, results = with_targets(synthetic_inputs(SMALL_CONFIG, 4, 16), 8), {}
    arrays = jax.tree.map(jnp.asarray, inputs)
    for dtype in ("bfloat16", "float32"):
        model = stack_model(random_model(replace(SMALL_CONFIG, dtype=dtype)))
        results[dtype] = np.asarray(scoring.forward(model, inputs), np.float32)

    def loss(model: PaliGemma) -> jax.Array:
        return answer_loss(model, arrays, jnp.ones(4), 8)[0]

    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    return results | {"gradient": np.concatenate([np.asarray(x).ravel() for x in leaves])}


if __name__ == "__main__":
    np.savez(sys.argv[1], **compute())  # type: ignore[arg-type]
