"""`paligemma-jax parity`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from paligemma_jax.commands.against import compare_with_engine, compare_with_file, fail
from paligemma_jax.commands.options import (
    Attention,
    Count,
    Depth,
    File,
    Name,
    Numerics,
    dumps,
    flag,
    require_parent,
)

if TYPE_CHECKING:
    from paligemma_jax.parity.training.case import TrainingCase

# Flags without meaning beside --train.
TRAINS_WITHOUT = ("--image", "--prompt", "--suffix", "--gradients", "--attention")
EMBEDDED = "(default: embedded)"
Images = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint=EMBEDDED)
]
Texts = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint=EMBEDDED)
]

Trained = Annotated[str | None, flag("DIR", "none")]
Against = Annotated[str | None, flag("DIR, FILE or NAME==VERSION", "MODEL itself")]


def parity(
    model: Name = "tiny",
    dtype: Literal["float32", "bfloat16"] = "float32",
    numerics: Numerics = None,
    image: Images = (),
    prompt: Texts = (),
    suffix: Texts = (),
    new: int = 16,
    gradients: bool = False,
    depth: Depth = None,
    against: Against = None,
    python: File = None,
    identify: File = None,
    attention: Attention = None,
    float64: bool = False,
    train: Count = None,
    run: Trained = None,
    data: File = None,
    lora: bool = False,
    html: File = None,
    json: bool = False,
) -> None:
    """Compare with transformers stage by stage on the same inputs.

    Example: paligemma-jax parity --html parity.html

    transformers, peft and bitsandbytes read the directory by themselves.

    Exits with 1 if a stage is outside its tolerance, with 2 if nothing is compared.

    Args:
        model: Checkpoint as for generate, or a preset with random weights (3b-224, 10b-448,
            28b-896, pg1-3b-224, ...).
        dtype: float32, or bfloat16 to compare the errors of both models against float32.
        numerics: transformers or big_vision. For big_vision, transformers is adapted as the
            report describes. With --against FILE, any profile.
        image: Image files: one for each prompt, or one for all of them.
        prompt: Prompts.
        suffix: Answers to compute the logits of, one for each prompt.
        new: Greedy tokens to generate and compare. With 0, this model is loaded one layer at a
            time.
        gradients: Compare the gradient of every parameter too. Both models must fit in memory.
        depth: Number of layers of each tower, for a preset.
        against: Hugging Face directory or adapter for transformers to load in place of MODEL, such
            as the original of a converted or fine-tuned copy. Or another program, as
            transformers==4.57.1, keras-hub==0.32.0 or big_vision=CHECKOUT, which is run in an
            environment of its own. Or a .npz of logits and inputs, to compare with in its dtype.
        python: Python of an environment that has the program of --against.
        identify: A .npz of logits and inputs: name the program that computed them from MODEL.
        attention: Form of attention: fused (scores stay on the chip; on TPUs and GPUs) or plain.
            Attention weights are compared in the plain form only.
        float64: Run this model in float64 too, on a CPU, and show how far both models are from it.
            With --train, train both models in float64 too.
        train: Train both models for this many steps on the same rows, and compare every step.
        run: Directory of a fine-tuning run, whose model, rows and settings --train repeats.
        data: Rows that --train trains on, JSONL; 512 are used. By default, for tiny, boxes of
            held-out digits.
        lora: With --train, train LoRA instead of all parameters.
        html: Write a report with figures to this file.
        json: Print one JSON object instead of the table.
    """
    given = {
        "--image": image,
        "--prompt": prompt,
        "--suffix": suffix,
        "--depth": depth,
        "--numerics": numerics,
        "--gradients": gradients,
        "--attention": attention,
        "--float64": float64,
        "--html": html,
    }
    if identify:
        refused = given | {"--against": against, "--python": python, "--train": train}
        refused |= {"--dtype": dtype != "float32", "--new": new != 16}
        _refuse("--identify", refused)
        return _identify(model, identify, json)
    if train is not None:
        refused = {name: given[name] for name in TRAINS_WITHOUT} | {"--new": new != 16}
        _refuse("--train", refused | {"--against": against, "--python": python})
        if train < 1:
            raise ValueError(f"--train must be at least 1, got {train}")
        require_parent("--html", html)
        case = _training_case(model, numerics, train, run, data, lora, depth)
        return _train(case, dtype, float64, html, json)
    if run or data or lora:
        raise ValueError("--run, --data and --lora need --train STEPS")
    if against and against.endswith(".npz"):
        refused = {name: given[name] for name in given if name not in ("--numerics", "--html")}
        refused |= {"--python": python, "--dtype": dtype != "float32", "--new": new != 16}
        _refuse(f"--against {against}", refused)
        require_parent("--html", html)
        return compare_with_file(model, against, numerics, html, json)
    if against and "=" in against and not Path(against).exists():
        taken = ("--image", "--prompt", "--suffix", "--depth", "--html")
        _refuse(f"--against {against}", {name: given[name] for name in given if name not in taken})
        require_parent("--html", html)
        case = (model, None, image, prompt, suffix, depth)
        return compare_with_engine(case, against, dtype, new, python, html, json)
    if python:
        raise ValueError("--python needs --against NAME==VERSION or big_vision=CHECKOUT")
    require_parent("--html", html)
    from paligemma_jax.parity.html import write_html
    from paligemma_jax.parity.report import as_dict, format_report, verdict
    from paligemma_jax.parity.run import ParityConfig
    from paligemma_jax.parity.run import run as compare

    config = ParityConfig(
        *(model, dtype, numerics, image, prompt, suffix, new, gradients, depth, against),
        *(attention, float64),
    )
    report = compare(config)
    print(dumps(as_dict(report)) if json else format_report(report))
    if html:
        write_html(report, html)
    if report.first_divergence is not None:
        fail(verdict(report).splitlines()[0])


def _refuse(flag: str, others: Mapping[str, object]) -> None:
    """Raise ValueError if a flag is given that has no meaning beside `flag`."""
    given = [name for name, value in others.items() if value]
    if given:
        raise ValueError(f"{flag} cannot be combined with {', '.join(given)}")


def _identify(model: str, file: str, json: bool) -> None:
    from paligemma_jax.parity.engines import identify

    found = identify.identify(model, file)
    print(dumps(identify.as_dict(found)) if json else identify.format_identified(found))
    if not found.found:
        fail(identify.verdict(found))


def _train(
    named_case: tuple[str, TrainingCase], dtype: str, float64: bool, html: str | None, json: bool
) -> None:
    from paligemma_jax.parity.training import report as text
    from paligemma_jax.parity.training.html import write_html
    from paligemma_jax.parity.training.run import compare

    report = compare(*named_case, dtype, float64)
    print(dumps(text.as_dict(report)) if json else text.format_report(report))
    if html:
        write_html(report, html)
    if not text.passed(report):
        fail(text.verdict(report).splitlines()[0])


def _training_case(
    model: str,
    numerics: str | None,
    steps: int,
    run: str | None,
    data: str | None,
    lora: bool,
    depth: int | None,
) -> tuple[str, TrainingCase]:
    """The name of the model, and the case that the flags describe."""
    from paligemma_jax.parity.training.case import DEFAULTS, load_training_case
    from paligemma_jax.tiny.dataset import write_digits
    from paligemma_jax.training.runs import load_config

    if run:
        others = {"--model": model != "tiny", "--numerics": numerics, "--lora": lora}
        _refuse("--run", others | {"--depth": depth})
        config = load_config(run)
        return config.model, load_training_case(config.model, config, steps, data or config.data)
    config = replace(DEFAULTS, train="lora" if lora else "all", numerics=numerics, steps=steps)
    if model != "tiny" or data:
        return model, load_training_case(model, config, steps, data, depth)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_digits(folder, ("detect",), 512) / "detect.jsonl"
        return model, load_training_case(model, config, steps, str(rows), depth)
