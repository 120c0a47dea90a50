"""Programs with soft tokens, for `on_devices.call`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np


def scores(devices: int, kind: str = "soft_prompt") -> list[float]:
    """Log-probabilities of answers of tiny with a soft prompt, or a "prefix", on that many
    devices."""
    import paligemma_jax as pg
    from paligemma_jax.model import prefix, soft_prompt
    from paligemma_jax.sharding.arrays import distribute
    from paligemma_jax.sharding.mesh import mesh_of

    mesh = f"data=2,fsdp=2,tensor={devices // 4}" if devices > 1 else None
    predictor = pg.load("tiny", dtype="float32", mesh=mesh)
    initial, place = {
        "soft_prompt": (soft_prompt.initial_soft_prompt, soft_prompt.with_soft_prompt),
        "prefix": (prefix.initial_prefix, prefix.with_prefix),
    }[kind]
    model = place(predictor.model, initial(predictor.model, 4))
    model = distribute(model, mesh_of(predictor.model))
    processor = replace(predictor.processor, soft_tokens=model.config.soft_tokens(4))
    image = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
    answers = ["4", "4 3 2", "1", "no digits"]
    values = pg.Predictor(model, processor).score([image] * 4, ["ocr"] * 4, answers)
    return [float(value) for value in values]
