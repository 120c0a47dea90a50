"""Compare this model with another program, which runs in an environment of its own."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import big_vision, huggingface
from convert.config import config_to_json
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.inference.generate import encode_inputs
from paligemma_jax.inference.scoring import forward_stages
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.parity.compare import measure_error, without_padding
from paligemma_jax.parity.engines.environment import Engine, parse_engine, python_of, run
from paligemma_jax.parity.engines.inputs import image_first
from paligemma_jax.parity.engines.releases import CALLS, Call, visible_prefix
from paligemma_jax.parity.engines.report import EngineReport, EngineRow, logits_limit
from paligemma_jax.processing.processor import Inputs


def compare_with_engine(
    case: ParityCase, reference: str, dtype: str, new: int, python: str | None = None
) -> EngineReport:
    """Run another program on a case, and this model with the profile of that program.

    Both compute a teacher-forced pass for each kind of call, and `new` greedy tokens; the logits of
    generated tokens are compared after the same tokens.

    Args:
        reference: As "transformers==4.57.1", "keras-hub==0.32.0" or "big_vision=DIR".
        python: Interpreter of an environment that has the program.

    Raises:
        ValueError: The program is not available, or cannot load the checkpoint.
    """
    if new < 0:
        raise ValueError(f"--new must be at least 0, got {new}")
    engine = parse_engine(reference)
    numerics = engine.profile
    if not engine.knows_image_tokens:
        case = image_first(case, engine.name)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, outputs = run_engine(case, engine, dtype, new, python, Path(folder))
        model = load_model(resolve(str(checkpoint)), dtype, numerics)
    rows, equal = [], None
    with jax.default_matmul_precision("highest"):
        for call in _calls(engine):
            rows += _call_rows(model, case, call, outputs, dtype)
        if new:
            prefill, decode = _decode_after(model, case.prompts, outputs)
            limit = logits_limit(model.config, dtype)
            for name, value in (("prefill", prefill), ("decode", decode)):
                rows.append(EngineRow(name, measure_error(value, outputs[name]), limit))
            steps = np.concatenate([prefill[:, None], decode], axis=1)
            steps[..., list(model.config.eos_token_ids)] = -np.inf  # as the engine is run
            equal = float((steps.argmax(axis=-1) == outputs["tokens"]).mean())
    return EngineReport(str(engine), numerics, dtype, rows, equal)


def run_engine(
    case: ParityCase, engine: Engine, dtype: str, new: int, python: str | None, job: Path
) -> tuple[Path, dict[str, np.ndarray]]:
    """Run an engine in the directory `job`. Returns the checkpoint that this model reads, and the
    outputs that the engine's script describes."""
    interpreter = python_of(engine, python)
    checkpoint = _checkpoint(case, job, engine)
    _write_job(job, case, checkpoint, engine, dtype, new)
    run(interpreter, engine, job)
    with np.load(job / "outputs.npz") as file:
        return checkpoint, dict(file)


def _calls(engine: Engine) -> list[Call]:
    """The calls that differ. Programs that know no image tokens have one."""
    return list(CALLS) if engine.knows_image_tokens else ["labels"]


def _checkpoint(case: ParityCase, job: Path, engine: Engine) -> Path:
    """The directory that this model reads, and transformers by itself. It is written if there is
    none; other programs need one with the names of the released checkpoints."""
    source = case.source
    written = source is None or source.adapter or case.checkpoint.formats
    if source is not None and not written and engine.name == "transformers":
        return source.weights
    huggingface.write(job / "checkpoint", case.checkpoint)
    if engine.name == "big_vision":
        big_vision.write(job / "checkpoint.npz", case.checkpoint)
        config = config_to_json(case.checkpoint.config, "float32")
        (job / "config.json").write_text(json.dumps(config))
    return job / "checkpoint"


def _write_job(
    job: Path, case: ParityCase, checkpoint: Path, engine: Engine, dtype: str, new: int
) -> None:
    inputs = case.inputs
    arrays = {name: getattr(inputs, name) for name in ("tokens", "valid", "targets")}
    prompts = {f"prompt_{name}": getattr(case.prompts, name) for name in arrays}
    if inputs.images is not None:
        arrays["images"] = inputs.images
    np.savez(job / "inputs.npz", **arrays, **prompts)
    settings = {
        "checkpoint": str(checkpoint),
        "directory": str(engine.directory),
        "dtype": dtype,
        "calls": _calls(engine),
        "new": new,
        "eos": list(case.checkpoint.config.eos_token_ids),
    }
    (job / "job.json").write_text(json.dumps(settings))


def _call_rows(
    model: PaliGemma, case: ParityCase, call: Call, outputs: dict[str, np.ndarray], dtype: str
) -> list[EngineRow]:
    inputs = case.inputs
    prefix = visible_prefix(model.config.profile, call, inputs.targets)
    stages = forward_stages(model, replace(inputs, prefix=prefix))
    rows = []
    for name, value in stages.items():
        expected = outputs.get(f"{call}/{name}")
        if expected is not None:
            value = np.asarray(value, np.float32)
            if name == "logits":  # other programs have no rows after the text
                value = value[..., : expected.shape[-1]]
            ours = without_padding(name, value, inputs)
            theirs = without_padding(name, expected.reshape(value.shape), inputs)
            error, limit = measure_error(ours, theirs), logits_limit(model.config, dtype)
            rows.append(EngineRow(f"{call}/{name}", error, limit))
    return rows


def _decode_after(
    model: PaliGemma, prompts: Inputs, outputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32[B, V] after the prompt, and [B, N - 1, V] after each of the engine's tokens,
    of as many rows of the vocabulary as the engine has."""
    tokens, rows = outputs["tokens"], outputs["prefill"].shape[-1]
    slots = prompts.tokens.shape[1] + tokens.shape[1]
    features = encode_inputs(model, prompts)
    prefill = jax.jit(type(model).prefill, static_argnames="slots")
    first, cache = prefill(
        model, prompts.tokens, features, prompts.valid, prompts.prefix, slots=slots
    )
    step, steps = jax.jit(type(model).decode_step), []
    for token in tokens.T[:-1]:
        logits, cache = step(model, jnp.asarray(token), cache)
        steps.append(np.asarray(logits)[:, :rows])
    empty = np.zeros((len(tokens), 0, rows), np.float32)
    return np.array(first)[:, :rows], np.stack(steps, axis=1) if steps else empty
