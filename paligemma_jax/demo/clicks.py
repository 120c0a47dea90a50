"""What a click does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from paligemma_jax.demo import html
from paligemma_jax.demo.ask import (
    EXAMPLES,
    PICTURE,
    TASKS,
    Settings,
    Shown,
    ask,
    sentence,
    with_task,
)
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.tokens import probabilities
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.processing.locations import draw

FOCUS = "() => { const box = document.querySelector('#prompt textarea'); box.focus(); box.setSelectionRange(1e6, 1e6); }"
LOOK = "() => { if (innerWidth < 800) document.querySelector('#answers').scrollIntoView({behavior: 'smooth', block: 'nearest'}); }"
QUIET: dict[str, Any] = dict(api_visibility="private", concurrency_limit=None, show_progress="hidden")


@dataclass(frozen=True)
class Panel:
    """Where one model's answer is shown."""

    drawn: gr.Image
    text: gr.HTML
    tokens: gr.HTML

    def start(self) -> list[Any]:
        return [gr.update(visible=False, value=None), html.WAITING, ""]

    def update(self, shown: Shown, before: Shown) -> list[Any]:
        """A new picture only when there is a box more on it, or masks."""
        drawn: Any = gr.skip()
        if shown.picture and shown.found and ((shown.done and not before.done) or len(shown.found) != len(before.found)):
            drawn = gr.update(visible=True, value=draw(shown.picture, shown.found))
        return [drawn, html.answer(shown), gr.skip()]


@dataclass(frozen=True)
class Parts:
    """What of the page takes part."""

    pictures: list[gr.Image]
    prompt: gr.Textbox
    settings: list[Any]  # one for every field of `Settings`
    panels: list[Panel]
    run: gr.Button
    stop: gr.Button
    sure: gr.Button
    tasks: list[gr.Button]
    examples: list[gr.Button]
    said: gr.State  # None, or what the last answer was to and what it was: (files, prompt, [text])


def wire(parts: Parts, predictors: list[Predictor], limits: Limits, users: int) -> None:
    """Connects all of it. What ends in an answer shares one queue and is ended by Stop."""
    panels = [one for panel in parts.panels for one in (panel.drawn, panel.text, panel.tokens)]
    shared: dict[str, Any] = dict(concurrency_limit=users, concurrency_id="answer", api_visibility="private")
    asking: dict[str, Any] = dict(
        fn=_answering(parts, predictors, limits),
        inputs=[*parts.pictures, parts.prompt, *parts.settings],
        outputs=[*panels, parts.run, parts.stop, parts.sure, parts.said],
        show_progress="minimal",
        show_progress_on=[panel.text for panel in parts.panels],
    )
    events: list[Any] = [gr.on([parts.run.click, parts.prompt.submit], **asking, **shared)]
    for task, button in zip(TASKS, parts.tasks):
        written = button.click(lambda text, task=task: with_task(task, text), parts.prompt, parts.prompt, **QUIET)
        if TASKS[task].endswith(" "):
            written.then(None, js=FOCUS)
        else:
            events.append(written.then(**asking, **shared))
    for text, button in zip(EXAMPLES, parts.examples):
        filled = button.click(lambda text=text: (str(PICTURE), text), None, [parts.pictures[0], parts.prompt], **QUIET)
        events.append(filled.then(**asking, **shared))
    for event in events:
        event.then(None, js=LOOK)
    parts.stop.click(lambda: _buttons(running=False), None, [parts.run, parts.stop], cancels=events, **QUIET)
    tokens = [panel.tokens for panel in parts.panels]
    parts.sure.click(_sure(predictors, limits), parts.said, tokens, show_progress="minimal", show_progress_on=tokens, **shared)


def _answering(parts: Parts, predictors: list[Predictor], limits: Limits) -> Any:
    images = len(parts.pictures)

    def answer(*given: Any) -> Iterator[list[Any]]:
        files, prompt, settings = given[:images], given[images], Settings(*given[images + 1 :])
        yield [update for panel in parts.panels for update in panel.start()] + [*_buttons(running=True), gr.update(visible=False), None]
        before = [Shown()] * len(parts.panels)
        for shown in ask(predictors, limits, files, prompt, settings):
            updates = [update for panel, *pair in zip(parts.panels, shown, before) for update in panel.update(*pair)]
            if all(one.done for one in shown):
                said = any(not one.error for one in shown)
                yield updates + [*_buttons(running=False), gr.update(visible=said), (files, prompt, [one.text for one in shown])]
            else:
                yield updates + [gr.skip()] * 4
            before = shown

    return answer


def _buttons(running: bool) -> list[Any]:
    """Run and Stop take one place."""
    return [gr.update(visible=not running), gr.update(visible=running)]


def _sure(predictors: list[Predictor], limits: Limits) -> Any:
    def show(said: tuple[tuple[str | None, ...], str, list[str]]) -> list[Any]:
        try:
            files, prompt, texts = said
            images, prompt = limits.open(files), limits.prompt(prompt)
            found = [html.tokens(probabilities(predictor, images, prompt, text)) for predictor, text in zip(predictors, texts)]
        except Exception as error:
            found = [html.answer(Shown(done=True, error=sentence(error)))] * len(predictors)
        return found

    return show
