"""`paligemma-jax recipe`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import tyro

from paligemma_jax.commands.options import File, dumps

Which = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
Files = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="(default: none)")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: the recipe's)")]
Split = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: all)")]
Pixels = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the lowest that was tried)")]


def recipe(
    name: Which,
    size: Literal["3b", "10b", "28b"] = "3b",
    resolution: Pixels = None,
    files: Files = (),
    images: str = ".",
    output: File = None,
    split: Split = None,
    prompt: Text = None,
    every_answer: bool = False,
    codec: File = None,
    json: bool = False,
) -> None:
    """How a data set was learned and measured; with --files, its rows to do it with.

    Example: paligemma-jax recipe docvqa --resolution 896

    Args:
        name: textvqa, vqav2, docci, refcoco-detect, refcoco-segment, chartqa, docvqa or coco-captions.
        size: Of the model, on which the learning rate depends.
        resolution: Pixels.
        files: What the data set publishes (without, the recipe is shown), to convert into --output: as for docvqa val_v1.0_withQT.json, for vqav2 the
            questions and the annotations, for refcoco refs(unc).p and instances.json.
        images: The folder of its pictures.
        output: The JSONL to write.
        split: Only this one, where a file holds several.
        prompt: Another prompt, with {} for the question or the expression.
        every_answer: A row for each answer, to learn from all of them in turn.
        codec: vae-oid.npz, with which refcoco-segment says masks to learn.
        json: Print the recipe as one JSON object.
    """
    from paligemma_jax.data.recipes import RECIPES

    if name not in RECIPES:
        raise ValueError(f"no recipe {name}: there are {', '.join(RECIPES)}")
    found = RECIPES[name]
    if files:
        from paligemma_jax.data.datasets import convert

        if output is None:
            raise ValueError("no --output: give the JSONL to write")
        rows = convert(name, files, images, output, split, prompt, every_answer, codec)
        print(f"{rows} rows: {output}")
        return
    pixels = resolution or found.resolutions[0]
    if json:
        print(dumps({"name": name, **asdict(found), "finetune": found.finetune(size, pixels)}))
        return
    print(f"{name}: {found.about}\nprompt: {found.prompt}\nsource: {found.source}\n\n{found.commands(name, size, pixels)}")
