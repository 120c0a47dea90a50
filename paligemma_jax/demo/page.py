"""The layout of the page. Event handlers are in `events.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component

from paligemma_jax.demo import html
from paligemma_jax.demo.ask import EXAMPLES, METHODS, SAMPLE_PICTURE, TASKS, Settings
from paligemma_jax.demo.events import HIDDEN, Panel, Parts, connect, queue_options
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.search import Searcher
from paligemma_jax.demo.search_tab import search_tab
from paligemma_jax.inference.predictor import Predictor


def build(
    predictors: dict[str, Predictor], limits: Limits, users: int, searcher: Searcher | None = None
) -> gr.Blocks:
    """Return the page for these models, by display name, with `users` concurrent requests; with a
    second tab to search pages if there is a searcher."""
    with gr.Blocks(
        title="PaliGemma 2", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(html.header(list(predictors)))
        if searcher is None:
            _ask_tab(predictors, limits, users)
        else:
            with gr.Tab("Ask"):
                _ask_tab(predictors, limits, users)
            with gr.Tab("Search pages", elem_id="search-tab"):
                search_tab(searcher, limits, queue_options(users))
    return page


def _ask_tab(predictors: dict[str, Predictor], limits: Limits, users: int) -> None:
    """Lay out the prompt, the answers and the settings, and connect them."""
    with gr.Row(elem_id="columns"):
        with gr.Column(elem_id="question"):
            picture = upload(
                value=str(SAMPLE_PICTURE), show_label=False, height=340, elem_id="picture"
            )
            tasks, prompt, run, stop = _prompt()
        with gr.Column(elem_id="answers"):
            panels = _panels(list(predictors))
            probabilities = gr.Button(
                "Token probabilities", size="sm", visible=False, elem_id="probabilities"
            )
            invitation, examples = _invitation()
        with gr.Column(elem_id="options"):
            settings = _settings(limits)
            pictures = [picture, *_more_pictures(limits.images - 1)]
    controls = (run, stop, probabilities, tasks, examples, gr.State())
    parts = Parts(pictures, prompt, settings, panels, invitation, *controls)
    connect(parts, list(predictors.values()), limits, users)


def upload(**options: Any) -> gr.Image:  # Any: passed on to gr.Image
    """Return an image input. Events that read it leave the decoding to `Limits`."""
    options |= dict(sources=["upload", "clipboard", "webcam"], buttons=["fullscreen"])
    return gr.Image(**options)


def _more_pictures(count: int) -> list[gr.Image]:
    """Return inputs for the pictures after the first."""
    with gr.Accordion("More pictures", open=False, visible=count > 0), gr.Row():
        return [upload(label=f"Picture {n + 2}", height=150, min_width=140) for n in range(count)]


def _prompt() -> tuple[list[gr.Button], gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(elem_id="tasks"):
        tasks = [gr.Button(task, size="md", min_width=0) for task in TASKS]
    with gr.Row(elem_id="prompt-row"):
        prompt = gr.Textbox(
            "caption en",
            show_label=False,
            placeholder="Write a prompt",
            max_lines=4,
            elem_id="prompt",
            scale=5,
            container=False,
        )
        run = gr.Button("Run", variant="primary", min_width=90, elem_id="run")
        stop = gr.Button("Stop", variant="stop", min_width=90, visible=False, elem_id="stop")
    return tasks, prompt, run, stop


def _panels(names: Sequence[str]) -> list[Panel]:
    """Return one panel per model for its answers."""
    panels = []
    with gr.Row():
        for n, name in enumerate(names):
            with gr.Column(min_width=280, elem_id=f"model-{n}"):
                if len(names) > 1:
                    gr.HTML(html.model_name(name))
                drawing = gr.Image(
                    interactive=False,
                    show_label=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    elem_classes="drawing",
                )
                text, tokens = gr.HTML(elem_id=f"answer-{n}"), gr.HTML(elem_id=f"tokens-{n}")
                panels.append(Panel(drawing, text, tokens))
    return panels


def _invitation() -> tuple[gr.Column, list[gr.Button]]:
    """Return the placeholder shown before the first answer."""
    with gr.Column(elem_id="invitation") as invitation:
        gr.HTML(html.INVITATION)
        with gr.Row(elem_id="examples"):
            examples = [gr.Button(text, size="sm", min_width=0) for text in EXAMPLES]
    return invitation, examples


def _settings(limits: Limits) -> list[Component]:
    """Return one input per field of `Settings`, in the same order."""
    default = Settings()
    beams = min(default.beams, limits.beams)
    new_tokens = min(default.max_new_tokens, limits.new_tokens)
    slider = partial(gr.Slider, min_width=140)
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        method = gr.Radio(METHODS, value=default.method, label="Decoding", container=False)
        with gr.Row(visible=False) as sample_row:
            sampling = [
                slider(0.1, 2, default.temperature, step=0.1, label="Temperature"),
                slider(0, 100, default.top_k, step=1, label="Top-k (0: off)"),
                slider(0.05, 1, default.top_p, step=0.05, label="Top-p (1: off)"),
            ]
        with gr.Row(visible=False) as beam_row:
            width = slider(1, limits.beams, beams, step=1, label="Beams")
        with gr.Row():
            length = slider(1, limits.new_tokens, new_tokens, step=1, label="Max new tokens")
            seed = gr.Number(default.seed, label="Seed", precision=0, min_width=100)
        method.change(
            lambda name: (gr.update(visible=name == "Sample"), gr.update(visible=name == "Beam")),
            method,
            [sample_row, beam_row],
            **HIDDEN,
        )
    return [method, *sampling, width, length, seed]
