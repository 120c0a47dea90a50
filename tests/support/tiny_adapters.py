"""Three random LoRA adapters of the embedded model, as directories."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from convert import peft
from convert.adapter import Factors
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import modules

# By name: rank, one less in layer 1; scale; and the layers, not all of them in all towers.
LAYERS = {
    "qv": (2, 2.0, r"decoder/layers/\d/attention/[qv]"),
    "mlp": (4, 4.0, r"decoder/layers/[1-3]/mlp/(up|down)"),
    "vision": (8, 2.0, r"projector|vision/layers/\d/(attention/q|mlp/up)|decoder/layers/2/.*/o"),
}


def random_factors(model: PaliGemma, name: str) -> dict[str, Factors]:
    """Factors that change the answers of the embedded model."""
    rank, scale, pattern = LAYERS[name]
    rng, factors = np.random.default_rng(rank), {}
    for path, module in modules(model, Linear).items():
        if re.fullmatch(pattern, path):
            R = rank - ("/1/" in path)
            outs, ins = module.shape[: -module.contracted], module.shape[-module.contracted :]
            a = rng.normal(0, np.prod(ins) ** -0.5, (R, *ins)).astype("f")
            b = rng.normal(0, 0.6 * R**-0.5, (*outs, R)).astype("f")
            factors[path] = Factors(a, b, scale)
    return factors


def save_adapters(model: PaliGemma, directory: Path) -> dict[str, Path]:
    """Save the adapters, "mlp" as rsLoRA. Returns their directories by name."""
    for name in LAYERS:
        factors = random_factors(model, name)
        peft.save_adapter(directory / name, factors, model.config, "tiny")
    file = directory / "mlp" / peft.CONFIG
    settings = json.loads(file.read_text())
    alphas = {name: 4.0 * rank**0.5 for name, rank in settings["rank_pattern"].items()}
    settings |= {"use_rslora": True, "lora_alpha": 4.0 * settings["r"] ** 0.5}
    file.write_text(json.dumps(settings | {"alpha_pattern": alphas}))
    return {name: directory / name for name in LAYERS}
