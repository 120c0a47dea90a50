"""`paligemma-jax generate`."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import tyro

from paligemma_jax.commands.options import Loaded, Source, dumps

Images = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")]


def generate(
    image: Images,
    prompt: Texts,
    source: Loaded = Source(),
    max_new_tokens: int = 128,
    json: bool = False,
) -> None:
    """Answer prompts about images.

    Example: paligemma-jax generate --image photo.jpg --prompt "caption en"

    Args:
        image: Image files, one for each prompt, or one for all of them. For several images in one prompt write <image> into it for each.
        prompt: What to ask: "caption en", "answer en where is the cat?", "detect cat". One for each image, or one for all of them.
        max_new_tokens: The longest answer, in tokens.
        json: Print one JSON object a line, with image, prompt and answer, instead of text.
    """
    from paligemma_jax.processing.image import load_image

    images, prompts = _pair(list(image), list(prompt))
    opened = {path: load_image(path) for path in image}  # before the model, so that a wrong path is told at once
    answers = source.load().generate([[opened[path] for path in group] for group in images], prompts, max_new_tokens)
    for shown, asked, answer in zip(images, prompts, answers):
        shown = shown[0] if len(shown) == 1 else shown
        print(dumps({"image": shown, "prompt": asked, "answer": answer}) if json else answer)


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
