"""`paligemma-jax generate`."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from paligemma_jax.commands.options import (
    Decoded,
    DecodingFlags,
    File,
    ModelFlags,
    ModelOptions,
    dumps,
    require_parent,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from paligemma_jax.processing.locations import Detections

Images = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")]


def generate(
    image: Images,
    prompt: Texts,
    source: ModelFlags = ModelOptions(),
    max_new_tokens: int = 128,
    decoding: Decoded = DecodingFlags(),
    draw: File = None,
    json: bool = False,
) -> None:
    """Answer prompts about images.

    Example: paligemma-jax generate --image a.jpg --prompt "detect cat" --draw b.jpg

    Args:
        image: Image files, one for each prompt, or one for all of them. For several images in one prompt write <image> into it for each.
        prompt: What to ask: "caption en", "answer en where is the cat?", "detect cat". One for each image, or one for all of them.
        max_new_tokens: The longest answer, in tokens.
        draw: Draw the boxes and masks of all answers about an image into this file; of several images into boxes-1.png, boxes-2.png, ...
        json: Print one JSON object a line, with image, prompt and answer, instead of text.
    """
    from paligemma_jax.processing.image import load_image

    images, prompts = _pair(list(image), list(prompt))
    drawings = _drawings(images, draw) if draw else {}
    opened = {path: load_image(path) for path in image}  # before the model, so that a wrong path is told at once
    options, seeds = decoding.options(), range(decoding.seed, decoding.seed + len(prompts))
    predictor = source.load()
    answers = predictor.answers([[opened[path] for path in group] for group in images], prompts, max_new_tokens, seeds=seeds, **options)
    for shown, asked, answer in zip(images, prompts, answers):
        shown = shown[0] if len(shown) == 1 else shown
        print(dumps({"image": shown, "prompt": asked, "answer": answer.text}) if json else answer.text)
    for path, file in drawings.items():
        about = [predictor.detections(answer, opened[path]) for group, answer in zip(images, answers) if group == [path]]
        _draw(opened[path], about, file)


def _drawings(images: list[list[str]], draw: str) -> dict[str, Path]:
    """The file for each image. ValueError, before anything is computed, if it cannot be drawn."""
    from PIL import Image

    if any(len(group) > 1 for group in images):
        raise ValueError("--draw cannot tell which of several images in one prompt an answer points at: ask about one at a time")
    file, paths = Path(draw), list(dict.fromkeys(path for (path,) in images))
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {draw}: no picture can be written as {file.suffix or 'a file without a suffix'}; name it .png or .jpg")
    require_parent("--draw", draw)
    return {path: file if len(paths) == 1 else file.with_stem(f"{file.stem}-{n}") for n, path in enumerate(paths, 1)}


def _draw(image: Image, about: list[Detections], file: Path) -> None:
    """One picture of all; what an answer says that is no box goes to stderr."""
    from convert.files import atomic_output
    from paligemma_jax.processing.locations import draw

    for part in (part for found in about for part in found.skipped):
        print(f"paligemma-jax: {file.name} shows nothing for {part!r}", file=sys.stderr)
    with atomic_output(file, force=True) as unfinished:
        draw(image, [thing for found in about for thing in found]).save(unfinished)


def _pair(images: list[str], prompts: list[str]) -> tuple[list[list[str]], list[str]]:
    """The images of each prompt, and the prompts: as many as it has `<image>`, else one; a single prompt or image serves all of the others."""
    if missing := [name for name, given in (("image", images), ("prompt", prompts)) if not given]:
        raise ValueError(f"no {missing[0]}: give at least one after --{missing[0]}")
    wanted = [max(prompt.count("<image>"), 1) for prompt in prompts]
    if set(wanted) == {1}:
        prompts = prompts * len(images) if len(prompts) == 1 else prompts
        images = images * len(prompts) if len(images) == 1 else images
        wanted = [1] * len(prompts)
    if sum(wanted) != len(images):
        raise ValueError(
            f"{len(images)} images do not fit {len(prompts)} prompts, which take {sum(wanted)}: "
            "give one for all prompts, one for each, or one for every <image> in them"
        )
    remaining = iter(images)
    return [list(islice(remaining, n)) for n in wanted], prompts
