"""`paligemma-jax generate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from paligemma_jax.commands.options import (
    Decoding,
    DecodingFlags,
    File,
    ModelFlags,
    ModelOptions,
    dumps,
    flag,
    require_parent,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from paligemma_jax.inference.answer import Answer
    from paligemma_jax.inference.sampling import Strategy
    from paligemma_jax.processing.locations import Detections
    from paligemma_jax.processing.processor import Processor

Images = Annotated[tuple[str, ...], flag("FILE [FILE ...]", "text alone")]
Texts = Annotated[tuple[str, ...], flag("TEXT [TEXT ...]")]


def generate(
    prompt: Texts,
    image: Images = (),
    source: ModelFlags = ModelOptions(),
    decoding: Decoding = DecodingFlags(),
    draw: File = None,
    num_return: int = 1,
    top_log_probabilities: int = 0,
    json: bool = False,
) -> None:
    """Answer prompts about images.

    Example: paligemma-jax generate --image a.jpg --prompt "detect cat" --draw b.jpg

    Args:
        prompt: Prompts such as "caption en", "answer en where is the cat?" or "detect cat": one
            per image, or one for all images.
        image: Image files: one per prompt, or one for all prompts. To use several images in
            one prompt, write <image> into it for each.
        draw: Draw the boxes and masks of all answers about an image to this file. With several
            images, the files are boxes-1.png, boxes-2.png, ...
        num_return: Number of answers to a prompt, best first, with --beams or --best-of.
        top_log_probabilities: With --json, list this many most likely tokens in the place of each
            token, with their log-probabilities under the model.
        json: Print one JSON object per line with image, prompt and answer, instead of text.
    """
    from paligemma_jax.processing.image import load_image

    groups, prompts = _pair(list(image), list(prompt))
    drawings = _drawings(groups, draw) if draw else {}
    # Errors come before the model is loaded. Its settings decide about transparency.
    opened = {path: load_image(path, on_white=False) for path in image}
    options = replace(decoding.options(), top_log_probabilities=top_log_probabilities)
    options = replace(options, sampler=_with_num_return(options.sampler, num_return))
    if top_log_probabilities and not json:
        raise ValueError("--top-log-probabilities requires --json")
    predictor = source.load()
    answers = predictor.answers(
        [[opened[path] for path in group] for group in groups],
        prompts,
        options=options,
        seeds=range(decoding.seed, decoding.seed + len(prompts)),
    )
    for group, text, answer in zip(groups, prompts, answers, strict=True):
        images = group[0] if len(group) == 1 else group or None
        if json:
            record = {"image": images, "prompt": text, **_describe(answer, predictor.processor)}
            print(dumps(record))
            continue
        for each in (answer, *answer.alternatives):
            print(each.text)
    for path, file in drawings.items():
        detections = [
            predictor.detections(answer, opened[path])
            for group, answer in zip(groups, answers, strict=True)
            if group == [path]
        ]
        _draw(opened[path], detections, file)


def _with_num_return(sampler: Strategy, num_return: int) -> Strategy:
    from paligemma_jax.inference.sampling import Beam, BestOf

    if num_return == 1:
        return sampler
    if not isinstance(sampler, Beam | BestOf):
        raise ValueError(f"--num-return {num_return} requires --beams or --best-of")
    return replace(sampler, num_return=num_return)


def _describe(answer: Answer, processor: Processor) -> dict[str, object]:
    """An answer as JSON: its text, and what was asked for besides."""
    record: dict[str, object] = {"answer": answer.text}
    if answer.alternatives:
        others = [_describe(other, processor) for other in answer.alternatives]
        record |= {"score": answer.score, "alternatives": others}
    if answer.top is not None:
        ids, values = answer.top.ids.tolist(), answer.top.log_probabilities.tolist()
        record["top"] = [
            [
                {"id": i, "text": processor.decode([i]), "log_probability": value}
                for i, value in zip(*place, strict=True)
            ]
            for place in zip(ids, values, strict=True)
        ]
    return record


def _drawings(groups: list[list[str]], draw: str) -> dict[str, Path]:
    """Return the file to draw each image to. Raises ValueError if one is invalid."""
    from PIL import Image

    if any(len(group) != 1 for group in groups):
        raise ValueError("--draw needs one image per prompt: a box does not specify its image")
    file, paths = Path(draw), list(dict.fromkeys(path for (path,) in groups))
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw must be an image file such as boxes.png or boxes.jpg, got {draw}")
    require_parent("--draw", draw)
    if len(paths) == 1:
        return {paths[0]: file}
    return {path: file.with_stem(f"{file.stem}-{n}") for n, path in enumerate(paths, 1)}


def _draw(image: Image, answers: list[Detections], file: Path) -> None:
    """Draw all answers on one image, and report anything in them but boxes on stderr."""
    from convert.files import atomic_output
    from paligemma_jax.processing.locations import draw

    for detections in answers:
        for text in detections.skipped:
            print(f"paligemma-jax: not drawn in {file.name}: {text!r}", file=sys.stderr)
    things = [detection for detections in answers for detection in detections]
    with atomic_output(file, force=True) as temporary:
        draw(image, things).save(temporary)


def _pair(images: list[str], prompts: list[str]) -> tuple[list[list[str]], list[str]]:
    """Return the images of each prompt, and the prompts.

    A prompt takes one image per `<image>` in it, or one image without any. A single prompt or image
    is used for all of the others. Without images, prompts are text alone.
    """
    if not prompts:
        raise ValueError("no prompt: give at least one after --prompt")
    if not images and not any("<image>" in prompt for prompt in prompts):
        return [[] for _ in prompts], prompts
    counts = [max(prompt.count("<image>"), 1) for prompt in prompts]
    if set(counts) == {1}:
        prompts = prompts * len(images) if len(prompts) == 1 else prompts
        images = images * len(prompts) if len(images) == 1 else images
        counts = [1] * len(prompts)
    if sum(counts) != len(images):
        raise ValueError(
            f"got {len(images)} images for {len(prompts)} prompts, which need {sum(counts)}: give "
            "one for all prompts, one per prompt, or one for every <image> in them"
        )
    remaining = iter(images)
    return [list(islice(remaining, n)) for n in counts], prompts
