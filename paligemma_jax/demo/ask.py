"""Send one prompt to one or several models and stream the replies."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import jax
from PIL import Image

from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.tokens import score_answer
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.sampling import Beam, Greedy, Sample
from paligemma_jax.processing.locations import Detections, parse_detections
from paligemma_jax.processing.processor import round_up

SAMPLE_PICTURE = Path(__file__).parents[1] / "assets" / "digits.jpg"
EXAMPLES = ("caption en", "ocr", "answer en how many digits?", "detect 4", "segment 3")
TASKS = {
    "Caption": "caption en",
    "Ask": "answer en ",
    "Read text": "ocr",
    "Detect": "detect ",
    "Segment": "segment ",
}
Method = Literal["Greedy", "Sample", "Beam"]
METHODS = get_args(Method)
MAX_PROGRAMS = 64  # each uses memory maps; Linux limits a process to 65,530
MAX_SIDE = 1600  # pixels of the picture that boxes are drawn on


@dataclass(frozen=True)
class Settings:
    """The settings of the page as the browser sends them; pass them through `checked`."""

    method: Method = "Greedy"
    temperature: float = 1.0
    top_k: float = 0  # 0 disables it
    top_p: float = 1.0
    beams: float = 4
    max_new_tokens: float = 128
    seed: float = 0

    def checked(self, limits: Limits) -> Settings:
        """Return the settings with integers as int. Raises ValueError for one out of range."""
        ranges = {
            "top_k": (0, 2**20),
            "beams": (1, limits.beams),
            "max_new_tokens": (1, limits.new_tokens),
            "seed": (0, 2**31 - 1),
        }
        integers = {}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high or value % 1:
                label = name.replace("_", " ")
                raise ValueError(f"{label} must be an integer from {low} to {high}, got {value}.")
            integers[name] = int(value)
        return replace(self, **integers)

    def strategy(self) -> Greedy | Sample | Beam:
        """Return the decoding strategy. Rounds values, since each new one compiles a program."""
        if self.method == "Sample":
            top_p = None if self.top_p == 1 else round(float(self.top_p), 2)
            return Sample(round(float(self.temperature), 1), int(self.top_k) or None, top_p)
        if self.method == "Beam":
            return Beam(int(self.beams))
        return Greedy()


@dataclass(frozen=True)
class Reply:
    """The reply of one model so far."""

    text: str = ""
    done: bool = False
    error: str | None = None
    picture: Image.Image | None = field(default=None, compare=False, repr=False)
    """The first picture, scaled down to `MAX_SIDE`."""
    detections: Detections = field(default_factory=Detections)
    """Boxes on `picture`; with scores and masks once the answer is complete."""


def with_task(task: str, prompt: str) -> str:
    """Switch a prompt to a task, keeping its object: "detect cat" becomes "segment cat"."""
    prefix, prompt = TASKS[task], (prompt or "").lstrip()
    if not prefix.endswith(" "):
        return prefix
    for other in TASKS.values():
        if other.endswith(" ") and prompt.startswith(other):
            return prefix + prompt.removeprefix(other).strip()
    return prefix


def ask(
    predictors: Sequence[Predictor],
    limits: Limits,
    files: Sequence[str | None],
    prompt: str,
    settings: Settings,
) -> Iterator[list[Reply]]:
    """Yield the replies of all models after each new piece of text; the models take turns.

    Exceptions do not propagate: they become `Reply.error`.
    """
    try:
        images, prompt = limits.open_images(files), limits.check_prompt(prompt)
        settings = settings.checked(limits)
        streams = [_stream(predictor, images, prompt, settings) for predictor in predictors]
    except Exception as error:
        yield [Reply(done=True, error=error_message(error))] * len(predictors)
        return
    picture = images[0].copy()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    replies = [Reply(picture=picture)] * len(streams)
    while not all(reply.done for reply in replies):
        for n, stream in enumerate(streams):
            if not replies[n].done:
                replies[n] = _advance(predictors[n], stream, replies[n], images, prompt)
                yield list(replies)


def _advance(
    predictor: Predictor,
    stream: Iterator[str],
    reply: Reply,
    images: Sequence[Image.Image],
    prompt: str,
) -> Reply:
    """Return the reply with the next piece of text, or complete it at the end of the stream."""
    assert reply.picture is not None
    try:
        piece = next(stream, None)
        if piece is not None:
            text = reply.text + piece
            return replace(reply, text=text, detections=parse_detections(text, reply.picture.size))
        if not reply.detections:
            return replace(reply, done=True)
        answer = score_answer(predictor, images, prompt, reply.text)
        return replace(reply, done=True, detections=predictor.detections(answer, reply.picture))
    except Exception as error:
        return replace(reply, done=True, error=error_message(error))


def _stream(
    predictor: Predictor, images: list[Image.Image], prompt: str, settings: Settings
) -> Iterator[str]:
    strategy, max_new_tokens = settings.strategy(), int(settings.max_new_tokens)
    _limit_programs((strategy, round_up(max_new_tokens), len(images), round_up(len(prompt))))
    if isinstance(strategy, Beam):  # no token is final before the last one
        return iter(predictor.generate([images], [prompt], max_new_tokens, strategy))
    return predictor.stream(images, prompt, max_new_tokens, strategy, seed=int(settings.seed))


_program_keys: set[Hashable] = set()


def _limit_programs(key: Hashable) -> None:
    """Clear the compilation cache of jax after `MAX_PROGRAMS` different requests."""
    _program_keys.add(key)
    if len(_program_keys) > MAX_PROGRAMS:
        _program_keys.clear()
        jax.clear_caches()


def error_message(error: Exception) -> str:
    """Return the message for the visitor. Internal errors are logged in full."""
    if isinstance(error, ValueError):
        return str(error)
    logging.getLogger(__name__).exception("the demo failed to answer", exc_info=error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "Out of memory. Use fewer new tokens, beams or pictures."
    return "Something went wrong. The server log has the details."
