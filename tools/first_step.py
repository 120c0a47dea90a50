"""Measure the seconds to the first training step of a model as deep as the published ones.

    python -m tools.first_step list stack

The widths are small, so that tracing and compiling take nearly all of the time. Each form of the
layers runs in a process of its own, without a cache of compiled programs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

FORMS = ("list", "stack")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def measure(form: str) -> str:
    """Run two steps of AdamW and return a line with the seconds of each."""
    import jax
    import jax.numpy as jnp
    import optax

    from paligemma_jax.bench.training import with_targets
    from paligemma_jax.checkpoints.synthetic import random_model, synthetic_inputs
    from paligemma_jax.model.config import PaliGemmaConfig
    from paligemma_jax.model.stack import stack_model
    from paligemma_jax.training.losses import answer_loss

    config = PaliGemmaConfig.preset("3b-224")  # 26 layers in the decoder, 27 in the vision tower
    vision = replace(config.vision, **SMALL, image_size=56)
    decoder = replace(config.decoder, **SMALL, num_key_value_heads=2, head_dim=16, vocab_size=512)
    config = replace(config, vision=vision, decoder=decoder, image_token_id=500, dtype="float32")
    model = random_model(config)
    model = stack_model(model) if form == "stack" else model
    inputs = jax.tree.map(jnp.asarray, with_targets(synthetic_inputs(config, 2, 16), 8))
    optimizer = optax.adamw(1e-4)

    def loss_of(model, inputs):
        total, count = answer_loss(model, inputs, jnp.ones(2), max_targets=8)
        return total / count

    @jax.jit
    def step(model, state, inputs):
        value, gradient = jax.value_and_grad(loss_of)(model, inputs)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    state, seconds, value = optimizer.init(model), [], jnp.nan
    for _ in range(2):
        start = time.perf_counter()
        model, state, value = jax.block_until_ready(step(model, state, inputs))
        seconds.append(time.perf_counter() - start)
    return f"{form}: first step {seconds[0]:.1f} s, second {seconds[1]:.2f} s, loss {value:.3f}"


def main(forms: list[str]) -> None:
    if not forms or not {*forms} <= {*FORMS}:
        sys.exit(f"forms must be among {', '.join(FORMS)}, got {' '.join(forms) or 'none'}")
    if len(forms) == 1:
        print(measure(forms[0]))
        return
    for form in forms:
        subprocess.run([sys.executable, "-m", "tools.first_step", form], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
