"""`paligemma-jax recipe`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import tyro

from paligemma_jax.commands.options import File, dumps, flag

DataSet = Annotated[str, tyro.conf.Positional, flag("NAME")]
Files = Annotated[tuple[str, ...], flag("FILE [FILE ...]", "none")]
Prompt = Annotated[str | None, flag("TEXT", "the recipe's")]
Split = Annotated[str | None, flag("NAME", "all")]
Pixels = Annotated[int | None, flag("N", "the recipe's lowest")]


def recipe(
    name: DataSet,
    size: Literal["3b", "10b", "28b"] = "3b",
    resolution: Pixels = None,
    files: Files = (),
    images: str = ".",
    output: File = None,
    split: Split = None,
    prompt: Prompt = None,
    every_answer: bool = False,
    codec: File = None,
    json: bool = False,
) -> None:
    """Show the recipe for a published data set, or convert its files to rows.

    Example: paligemma-jax recipe docvqa --resolution 896

    Args:
        name: textvqa, vqav2, docci, refcoco-detect, refcoco-segment, chartqa, docvqa or
            coco-captions.
        size: Model size, which determines the learning rate.
        resolution: Image size in pixels.
        files: Files of the data set as published, to convert to --output: for docvqa
            val_v1.0_withQT.json, for vqav2 the questions and the annotations, for refcoco
            refs(unc).p and instances.json. Without files, the recipe is shown.
        images: Directory of the images of --files.
        output: JSONL file to write.
        split: Convert only this split, if the files contain several.
        prompt: Prompt to use instead of the recipe's; {} stands for the question or expression.
        every_answer: Write one row per answer, to train on all of them.
        codec: Mask codec (vae-oid.npz) that refcoco-segment encodes masks with.
        json: Print the recipe as one JSON object.
    """
    from paligemma_jax.data.recipes import RECIPES

    if name not in RECIPES:
        raise ValueError(f"NAME must be one of {', '.join(RECIPES)}; got {name}")
    recipe = RECIPES[name]
    if files:
        from paligemma_jax.data.datasets import convert

        if output is None:
            raise ValueError("--files requires --output, the JSONL file to write")
        rows = convert(name, files, images, output, split, prompt, every_answer, codec)
        print(f"{rows} rows: {output}")
        return
    pixels = resolution or recipe.resolutions[0]
    if json:
        finetune = recipe.finetune(size, pixels)
        print(dumps({"name": name, **asdict(recipe), "finetune": finetune}))
        return
    commands = recipe.commands(name, size, pixels)
    print(f"{name}: {recipe.about}\nprompt: {recipe.prompt}\nsource: {recipe.source}\n\n{commands}")
