"""Measure the seconds of research tasks on `tiny`: the table of docs/research.md.

    PALIGEMMA_JAX_CACHE=off python -m tools.research_times

The first call of each task traces and compiles; the second shows what a loop would pay.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.interpretability.attribution import rollout
from paligemma_jax.model.edits import Scale
from paligemma_jax.model.soft_prompt import initial_soft_prompt, with_soft_prompt
from paligemma_jax.retrieval import retriever
from paligemma_jax.training.losses import answer_loss

PHOTO, ANSWER = str(TINY.parent / "digits.jpg"), "4 3 2 3"


def make_tasks() -> dict[str, Callable[[], object]]:
    """The tasks by the name that the table gives them."""
    predictor, stacked = pg.load("tiny"), pg.load("tiny", layers="stack")
    colpali = retriever.load("tiny", size=64)
    inputs = stacked.processor([PHOTO] * 8, ["ocr"] * 8, [ANSWER] * 8, padding_side="right")
    inputs, adam = jax.tree.map(jnp.asarray, inputs), optax.adamw(1e-4)

    @jax.jit
    def train_step(model, state):
        def loss(model):
            return answer_loss(model, inputs, jnp.ones(8), max_targets=16)[0]

        value, gradient = jax.value_and_grad(loss)(model)
        updates, state = adam.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    def patch_all_layers() -> list[float]:
        stages = predictor.stages(PHOTO, "ocr", ANSWER, only=r"decoder/layers/\d+")
        inputs = predictor.processor(PHOTO, "ocr", ANSWER)
        return [
            predictor.logits(inputs, edit={name: jnp.asarray(x)})[0].max()
            for name, x in stages.items()
        ]

    def search() -> object:
        pages = colpali.embed_pages([PHOTO] * 2)
        return colpali.score(colpali.embed_queries([ANSWER]), pages)

    def soft_prompt() -> object:
        model = with_soft_prompt(predictor.model, initial_soft_prompt(predictor.model, 2))
        tokens = jnp.array([[*predictor.config.soft_tokens(2), *range(5, 35)]])
        yes = jnp.ones(tokens.shape, bool)
        return jax.jit(lambda model: model(tokens, None, yes, yes))(model)

    edit = {"decoder/layers/3/mlp/output": Scale(0.5)}
    boxes = pg.Boxes(["3", "4"], least=1)
    model = stacked.model
    return {
        "stages": lambda: predictor.stages(PHOTO, "ocr", ANSWER, attention=True),
        "intervene": lambda: predictor.generate(PHOTO, "ocr", 16, edit=edit),
        "stages of generated tokens": lambda: predictor.generation_stages(PHOTO, "ocr"),
        "activation patching": patch_all_layers,
        "logit lens": lambda: predictor.logit_lens(PHOTO, "ocr"),
        "saliency": lambda: predictor.saliency(PHOTO, "ocr"),
        "rollout": lambda: rollout(predictor.generation_stages(PHOTO, "ocr", attention=True)[1]),
        "training step of 8 examples": lambda: train_step(model, adam.init(model)),
        "soft prompt": soft_prompt,
        "text alone": lambda: predictor.generate(None, "ocr", 16),
        "ColPali": search,
        "boxes": lambda: predictor.generate(PHOTO, "detect 4", 16, allowed=boxes),
    }


def main() -> None:
    os.chdir(tempfile.mkdtemp())
    for name, task in make_tasks().items():
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(task())
            seconds.append(time.perf_counter() - start)
        print(f"| {name} | {seconds[0]:.1f} | {seconds[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
