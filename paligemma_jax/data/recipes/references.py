"""Recipes of expressions that refer to an object: its box or its mask."""

from __future__ import annotations

from dataclasses import replace

from paligemma_jax.data.recipes.recipe import Recipe, Source, rates, transfer_sources

REFCOCO = Recipe(
    about="the mask of the object that an expression refers to (RefCOCO, RefCOCO+, RefCOCOg)",
    metrics=("mask_iou", "box_accuracy"),
    new_tokens=48,
    epochs=100,
    learning_rate=rates(10, 3, 1),
    sources=transfer_sources("refcoco_seg"),
    label_smoothing=0.3,
    answers=7,  # RefCOCO's 16,994 training images have 120,624 expressions
    overrides={224: {"dropout": 0.1}, 896: {"batch_size": 64}},
)

REFERENCES = {
    "refcoco-detect": replace(
        REFCOCO,
        about="the box of the object that an expression refers to (RefCOCO, RefCOCO+, RefCOCOg)",
        prompt="detect {}",
        metrics=("box_accuracy", "box_iou"),
        sources=(
            Source(
                "training", "chosen here: as refcoco-segment, which trains on box and mask at once"
            ),
            Source("prompt", "report 1, 3.2.5: the prompt of pretraining"),
        ),
    ),
    "refcoco-segment": REFCOCO,
}
