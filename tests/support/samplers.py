"""The samplers that docs/generation.md defines, and programs with them for `on_devices.call`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from support.paths import ROOT

if TYPE_CHECKING:
    import paligemma_jax as pg


def documented() -> dict:
    """The samplers of the page, by name."""
    import paligemma_jax as pg

    text = (ROOT / "docs/generation.md").read_text()
    names: dict = {"pg": pg}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if "@dataclass" in block:
            exec(re.split(r"^(?:ban|predictor)\b", block, flags=re.MULTILINE)[0], names)
    return names


def strategies() -> dict:
    """Samplers by name: those of the project, and of the user with a state."""
    import paligemma_jax as pg

    own = documented()
    hot = pg.Sample(temperature=1.3, top_p=0.9, repetition_penalty=1.2)
    fading = own["FadingPenalty"]()
    return {
        "greedy": pg.Greedy(),
        "sample": hot,
        "own": own["NoRepeatNgrams"](2, fading),
        "best": pg.BestOf(3, hot),
        "best of own": pg.BestOf(3, own["NoRepeatNgrams"](2, fading)),
        "beam": pg.Beam(3, length_penalty=0.6),
    }


def answers(mesh: str | None = None, quantize: str | None = None) -> dict[str, list]:
    """`answers_of` tiny, on a mesh or quantized."""
    import paligemma_jax as pg

    return answers_of(pg.load("tiny", dtype="float32", mesh=mesh, quantize=quantize))


def answers_of(predictor: pg.Predictor) -> dict[str, list]:
    """Tokens and scores of its answers to four prompts by each strategy."""
    images = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), np.uint8)
    prompts = ["ocr", "caption en", "answer en how many digits?", "ocr"]
    results = {}
    for name, sampler in strategies().items():
        options = dict(sampler=sampler, max_new_tokens=10, seeds=[3, 4, 5, 6])
        found = predictor.answers(list(images), prompts, **options)
        results[name] = [[list(map(int, answer.tokens)), float(answer.score)] for answer in found]
    return results
