"""One question to one or several models at a time: settings -> strategy, pictures and prompt -> answers as they grow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from paligemma_jax.demo.limits import Limits
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.sampling import Beam, Greedy, Sample
from paligemma_jax.processing.locations import Detections, parse_detections
from paligemma_jax.processing.processor import round_up

PICTURE = Path(__file__).parents[1] / "assets" / "digits.jpg"
EXAMPLES = ("caption en", "ocr", "answer en how many digits?", "detect 4", "segment 3")  # about it
TASKS = {"Caption": "caption en", "Ask": "answer en ", "Read text": "ocr", "Detect": "detect ", "Segment": "segment "}
METHODS = ("Greedy", "Sample", "Beam")
PROGRAMS = 64  # kinds of question after which compiled programs are forgotten: a process can hold some thousand (Linux: 65,530 memory maps)
SIDE = 1600  # pixels: the longer side of the picture with boxes


@dataclass(frozen=True)
class Settings:
    """The settings of the page, as they come from the browser: `strategy` looks at them."""

    method: str = "Greedy"
    temperature: float = 1.0
    top_k: float = 0  # 0 is off
    top_p: float = 1.0
    beams: float = 4
    max_new_tokens: float = 128
    seed: float = 0

    def checked(self, limits: Limits) -> Settings:
        """Whole numbers where they are wanted. ValueError says which setting is beyond the limits."""
        whole = {}
        for name, top in (("top_k", 2**20), ("beams", limits.beams), ("max_new_tokens", limits.new_tokens), ("seed", 2**31 - 1)):
            value, least = getattr(self, name), 0 if name in ("top_k", "seed") else 1
            if not isinstance(value, int | float) or not least <= value <= top or value != int(value):
                raise ValueError(f"{name.replace('_', ' ')} is {value}: it can be a whole number from {least} to {top}.")
            whole[name] = int(value)
        return replace(self, **whole)

    def strategy(self) -> Greedy | Sample | Beam:
        """What `checked` settings ask for; rounded, because every other strategy is another program to compile."""
        if self.method == "Sample":
            return Sample(round(float(self.temperature), 1), int(self.top_k) or None, None if self.top_p == 1 else round(float(self.top_p), 2))
        if self.method == "Beam":
            return Beam(int(self.beams))
        return Greedy()


@dataclass(frozen=True)
class Shown:
    """What one model has said so far."""

    text: str = ""
    done: bool = False
    error: str | None = None
    picture: Image.Image | None = field(default=None, compare=False, repr=False)  # the first, at most SIDE wide and high
    found: Detections = field(default_factory=Detections)  # what the text points at on it; with masks when all is said


def with_task(task: str, prompt: str) -> str:
    """The prompt of a task; what was asked of another task goes along: "detect cat" becomes "segment cat"."""
    start, prompt = TASKS[task], (prompt or "").lstrip()
    about = next((prompt[len(old) :] for old in TASKS.values() if old.endswith(" ") and prompt.startswith(old)), "")
    return start + about.strip() if start.endswith(" ") else start


def ask(predictors: Sequence[Predictor], limits: Limits, files: Sequence[str | None], prompt: str, settings: Settings) -> Iterator[list[Shown]]:
    """What every model has said so far, after each piece of any of them; they take turns. An error is a sentence in `Shown`."""
    try:
        images, prompt, settings = limits.open(files), limits.prompt(prompt), settings.checked(limits)
        streams = [_stream(predictor, images, prompt, settings) for predictor in predictors]
    except Exception as error:
        yield [Shown(done=True, error=sentence(error))] * len(predictors)
        return
    picture = images[0].copy()
    picture.thumbnail((SIDE, SIDE))
    shown = [Shown(picture=picture)] * len(streams)
    while not all(one.done for one in shown):
        for n, stream in enumerate(streams):
            if not shown[n].done:
                shown[n] = _next(predictors[n], stream, shown[n], picture)
                yield list(shown)


def _next(predictor: Predictor, stream: Iterator[str], shown: Shown, picture: Image.Image) -> Shown:
    """`shown` and one piece more; boxes as soon as they are said."""
    try:
        piece = next(stream, None)
        if piece is not None:
            text = shown.text + piece
            return replace(shown, text=text, found=parse_detections(text, picture.size))
        masked = any(thing.codes for thing in shown.found)
        return replace(shown, done=True, found=predictor.detections(shown.text, picture) if masked else shown.found)
    except Exception as error:
        return replace(shown, done=True, error=sentence(error))


def _stream(predictor: Predictor, images: list[Any], prompt: str, settings: Settings) -> Iterator[str]:
    strategy, new = settings.strategy(), int(settings.max_new_tokens)
    _bound((strategy, round_up(new), len(images), round_up(len(prompt))))
    if isinstance(strategy, Beam):  # knows its first word when it knows its last
        return iter(predictor.generate([images], [prompt], new, strategy))
    return predictor.stream(images, prompt, new, strategy, seed=int(settings.seed))


_kinds: set[Any] = set()


def _bound(kind: Any) -> None:
    """Forgets all compiled programs after `PROGRAMS` kinds of question."""
    _kinds.add(kind)
    if len(_kinds) > PROGRAMS:
        _kinds.clear()
        jax.clear_caches()


def sentence(error: Exception) -> str:
    """What a visitor is told; of what is no fault of theirs the log has the rest."""
    if isinstance(error, ValueError):
        return str(error)
    logging.getLogger(__name__).exception("the demo failed to answer", exc_info=error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "The machine is out of memory: ask for a shorter answer, fewer beams or fewer pictures."
    return "Something went wrong here; whoever runs this page finds the reason in its terminal."
