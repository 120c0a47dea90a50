"""The page: what is where. What a click does: `clicks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from paligemma_jax.demo import html
from paligemma_jax.demo.ask import EXAMPLES, METHODS, PICTURE, TASKS, Settings
from paligemma_jax.demo.clicks import QUIET, Panel, Parts, wire
from paligemma_jax.demo.limits import Limits
from paligemma_jax.inference.predictor import Predictor


def picture(**options: Any) -> gr.Image:
    """An upload as the path of its file: nothing is decoded before `Limits` has seen it, and nothing is fetched from the network.

    (Methods of the object, not of a class: for a class Gradio writes a .pyi file beside its module.)
    """
    one: Any = gr.Image(sources=["upload", "clipboard", "webcam"], buttons=["fullscreen"], type="filepath", **options)
    keep = one.async_move_resource_to_block_cache

    async def uploaded(place: str | Path | None) -> str | None:
        if "://" in str(place):
            raise gr.Error("Only uploaded pictures are read, no addresses.")
        return await keep(place)

    one.async_move_resource_to_block_cache = uploaded
    one.preprocess = lambda payload: payload.path if payload else None
    return one


def build(predictors: dict[str, Predictor], limits: Limits, users: int) -> gr.Blocks:
    """The page that asks these models, by the names that it shows, of so many visitors at a time."""
    with gr.Blocks(title="PaliGemma 2", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        gr.HTML(html.header(list(predictors)))
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=320):
                first, examples = _first_picture()
                tasks, prompt, run, stop = _question()
                settings = _settings(limits)
                pictures = [first, *_more_pictures(limits.images - 1)]
            with gr.Column(scale=6, min_width=320, elem_id="answers"):
                panels = _panels(list(predictors))
                sure = gr.Button("Token probabilities", size="sm", visible=False, elem_id="sure")
        parts = Parts(pictures, prompt, settings, panels, run, stop, sure, tasks, examples, gr.State())
        wire(parts, list(predictors.values()), limits, users)
    return page


def _first_picture() -> tuple[gr.Image, list[gr.Button]]:
    first = picture(value=str(PICTURE), label="Picture", show_label=False, height=340, elem_id="picture")
    with gr.Row(elem_id="examples"):
        gr.HTML("<span>Try</span>")
        return first, [gr.Button(text, size="sm", min_width=0) for text in EXAMPLES]


def _more_pictures(count: int) -> list[gr.Image]:
    """For questions about several pictures, which the prompt follows."""
    with gr.Accordion("More pictures", open=False, visible=count > 0), gr.Row():
        return [picture(label=f"Picture {n + 2}", height=150, min_width=140) for n in range(count)]


def _question() -> tuple[list[gr.Button], gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(elem_id="tasks"):
        tasks = [gr.Button(task, size="md", min_width=0) for task in TASKS]
    with gr.Row(elem_id="question"):
        prompt = gr.Textbox("caption en", show_label=False, placeholder="Ask something", max_lines=4, elem_id="prompt", scale=5, container=False)
        run = gr.Button("Run", variant="primary", min_width=90, scale=1, elem_id="run")
        stop = gr.Button("Stop", variant="stop", min_width=90, scale=1, visible=False, elem_id="stop")
    return tasks, prompt, run, stop


def _settings(limits: Limits) -> list[Any]:
    """The inputs of the fields of `Settings`, in their order."""
    given = Settings()
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        method = gr.Radio(METHODS, value=given.method, label="Next token", container=False)
        with gr.Row(visible=False) as sampling:
            temperature = gr.Slider(0.1, 2, given.temperature, step=0.1, label="Temperature", min_width=140)
            top_k = gr.Slider(0, 100, given.top_k, step=1, label="Top-k (0: off)", min_width=140)
            top_p = gr.Slider(0.05, 1, given.top_p, step=0.05, label="Top-p (1: off)", min_width=140)
        with gr.Row(visible=False) as beaming:
            beams = gr.Slider(1, limits.beams, min(given.beams, limits.beams), step=1, label="Beams", min_width=140)
        with gr.Row():
            new = gr.Slider(1, limits.new_tokens, min(given.max_new_tokens, limits.new_tokens), step=1, label="Longest answer, tokens", min_width=140)
            seed = gr.Number(given.seed, label="Seed", precision=0, min_width=100)
        choose = lambda name: (gr.update(visible=name == "Sample"), gr.update(visible=name == "Beam"))
        method.change(choose, method, [sampling, beaming], **QUIET)
    return [method, temperature, top_k, top_p, beams, new, seed]


def _panels(names: Sequence[str]) -> list[Panel]:
    """Where each model's answer goes."""
    panels = []
    with gr.Row():
        for n, name in enumerate(names):
            with gr.Column(min_width=280, elem_id=f"model-{n}"):
                if len(names) > 1:
                    gr.HTML(html.name(name))
                drawn = gr.Image(interactive=False, show_label=False, visible=False, buttons=["download", "fullscreen"], elem_classes="drawn")
                panels.append(Panel(drawn, gr.HTML(html.NOTHING, elem_id=f"answer-{n}"), gr.HTML(elem_id=f"tokens-{n}")))
    return panels
