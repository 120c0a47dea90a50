"""Event handlers of the page. Each returns one update per output component, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
import msgspec
from gradio.components import Component

from convert.typed_json import check
from paligemma_jax.demo import html
from paligemma_jax.demo.ask import (
    EXAMPLES,
    SAMPLE_PICTURE,
    TASKS,
    Reply,
    Settings,
    ask,
    error_message,
    with_task,
)
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.tokens import token_probabilities
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.processing.locations import draw

FOCUS_PROMPT = """() => {
  const box = document.querySelector('#prompt textarea');
  box?.focus();
  box?.setSelectionRange(1e6, 1e6);
}"""
SHOW_ANSWER = """() => {
  const answers = document.querySelector('#answers');
  if (innerWidth < 800) answers?.scrollIntoView({behavior: 'smooth', block: 'nearest'});
}"""

Options = dict[str, Any]  # Any: keyword arguments of Gradio's event listeners
Updates = list[object]

HIDDEN: Options = dict(api_visibility="private", concurrency_limit=None, show_progress="hidden")


class Upload(msgspec.Struct):
    """The value of an image input. `Gate` lets only paths of uploads through."""

    path: str


class Question(msgspec.Struct):
    """The inputs of a run, as the browser sends them."""

    pictures: list[Upload | None]
    prompt: str
    settings: Settings

    @classmethod
    def decode(cls, inputs: Sequence[object], pictures: int) -> Question:
        """Check the pictures, the prompt and the settings. Raises gr.Error for another type."""
        settings = dict(zip(Settings.__annotations__, inputs[pictures + 1 :], strict=True))
        fields = dict(pictures=inputs[:pictures], prompt=inputs[pictures], settings=settings)
        try:
            return check(fields, cls)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None


@dataclass(frozen=True)
class Panel:
    """The output components of one model."""

    drawing: gr.Image
    text: gr.HTML
    tokens: gr.HTML

    def outputs(self) -> list[Component]:
        return [self.drawing, self.text, self.tokens]

    def reset(self, text: str) -> Updates:
        return [gr.update(visible=False, value=None), text, ""]

    def update(self, reply: Reply, previous: Reply) -> Updates:
        """Draw only when a box was added, or at the end, when scores and masks are known."""
        drawing: object = gr.skip()
        finished = reply.done and not previous.done
        if reply.detections and (finished or len(reply.detections) != len(previous.detections)):
            assert reply.picture is not None
            drawing = gr.update(visible=True, value=draw(reply.picture, reply.detections))
        return [drawing, html.answer(reply), gr.skip()]


@dataclass(frozen=True)
class Answered:
    """The last request and its answers, for their token probabilities."""

    files: list[str | None]
    prompt: str
    texts: list[str]


@dataclass(frozen=True)
class Parts:
    """The components of the page that take part in events."""

    pictures: list[gr.Image]
    prompt: gr.Textbox
    settings: list[Component]  # one per field of `Settings`
    panels: list[Panel]
    invitation: gr.Column
    run: gr.Button
    stop: gr.Button
    probabilities: gr.Button
    tasks: list[gr.Button]
    examples: list[gr.Button]
    answered: gr.State  # Answered, or None

    def outputs(self) -> list[Any]:  # Any: components and layouts
        panels = [component for panel in self.panels for component in panel.outputs()]
        controls = [self.run, self.stop, self.probabilities, self.invitation, self.answered]
        return [*panels, *controls]

    def reset(self, text: str = "", running: bool = False) -> Updates:
        """Clear the answers; show `text` in their place, or the invitation."""
        panels = [update for panel in self.panels for update in panel.reset(text)]
        return [*panels, *_controls(running=running, invite=not running), None]

    def update(self, replies: Sequence[Reply], previous: Sequence[Reply]) -> Updates:
        """Show the replies while they are running."""
        panels = [
            update
            for panel, reply, before in zip(self.panels, replies, previous, strict=True)
            for update in panel.update(reply, before)
        ]
        return [*panels, *[gr.skip()] * 5]


def _controls(running: bool = False, answered: bool = False, invite: bool = False) -> Updates:
    """Updates of Run, Stop (in the same place), the probabilities button and the invitation."""
    return [gr.update(visible=shown) for shown in (not running, running, answered, invite)]


def queue_options(users: int) -> Options:
    """Options of the events that compute, all of which share one queue."""
    return dict(concurrency_limit=users, concurrency_id="answer", api_visibility="private")


def connect(parts: Parts, predictors: list[Predictor], limits: Limits, users: int) -> None:
    """Attach the handlers. Those that compute share one queue; Stop cancels the answers in it."""
    queue = queue_options(users)
    run: Options = dict(
        fn=partial(_answer, parts, predictors, limits),
        inputs=[*parts.pictures, parts.prompt, *parts.settings],
        outputs=parts.outputs(),
        preprocess=False,  # `gr.Image` would decode the pictures before they are checked
        show_progress="minimal",
        show_progress_on=[panel.text for panel in parts.panels],
        **queue,
    )
    runs: list[Any] = [gr.on([parts.run.click, parts.prompt.submit], **run)]
    runs += _connect_choices(parts, run)
    for event in runs:
        event.then(None, js=SHOW_ANSWER)
    parts.stop.click(_stopped, None, [parts.run, parts.stop], cancels=runs, **HIDDEN)
    changes = [change for image in parts.pictures for change in (image.upload, image.clear)]
    gr.on(changes, parts.reset, None, parts.outputs(), cancels=runs, **HIDDEN)
    tokens = [panel.tokens for panel in parts.panels]
    parts.probabilities.click(
        partial(_probabilities, predictors, limits),
        parts.answered,
        tokens,
        show_progress="minimal",
        show_progress_on=tokens,
        **queue,
    )


def _connect_choices(parts: Parts, run: Options) -> list[Any]:  # Any: Gradio types events as dicts
    """Let the buttons of tasks and examples fill the prompt. Returns the events that run it."""
    runs = []
    for task, button in zip(TASKS, parts.tasks, strict=True):
        chosen = button.click(partial(with_task, task), parts.prompt, parts.prompt, **HIDDEN)
        if TASKS[task].endswith(" "):  # the visitor has to add an object
            chosen.then(None, js=FOCUS_PROMPT)
        else:
            runs.append(chosen.then(**run))
    for text, button in zip(EXAMPLES, parts.examples, strict=True):
        example = partial(tuple, (str(SAMPLE_PICTURE), text))
        chosen = button.click(example, None, [parts.pictures[0], parts.prompt], **HIDDEN)
        runs.append(chosen.then(**run))
    return runs


def _stopped() -> Updates:
    return _controls()[:2]


def _answer(
    parts: Parts, predictors: list[Predictor], limits: Limits, *inputs: object
) -> Iterator[Updates]:
    """Run the prompt. The inputs are the pictures, the prompt and the settings."""
    question = Question.decode(inputs, len(parts.pictures))
    files, prompt = [picture and picture.path for picture in question.pictures], question.prompt
    yield parts.reset(html.WAITING, running=True)
    previous = [Reply()] * len(parts.panels)
    for replies in ask(predictors, limits, files, prompt, question.settings):
        updates = parts.update(replies, previous)
        if all(reply.done for reply in replies):
            answered = any(not reply.error for reply in replies)
            last = Answered(files, prompt, [reply.text for reply in replies])
            updates[-5:] = [*_controls(answered=answered, invite=not answered), last]
        yield updates
        previous = replies


def _probabilities(predictors: list[Predictor], limits: Limits, answered: Answered) -> list[str]:
    """Return the token probabilities of every answer, as HTML."""
    try:
        images, prompt = limits.open_images(answered.files), limits.check_prompt(answered.prompt)
        return [
            html.tokens(token_probabilities(predictor, images, prompt, text))
            for predictor, text in zip(predictors, answered.texts, strict=True)
        ]
    except Exception as error:
        reply = Reply(done=True, error=error_message(error))
        return [html.answer(reply)] * len(predictors)
