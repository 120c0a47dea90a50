"""Compare this model with another release of transformers, in an environment of its own."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import huggingface
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.inference.generate import encode_inputs
from paligemma_jax.inference.scoring import forward_stages
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.parity.compare import measure_error, without_padding
from paligemma_jax.parity.engines.environment import parse_engine, python_of, run
from paligemma_jax.parity.engines.releases import CALLS, Call, profile_of, visible_prefix
from paligemma_jax.parity.engines.report import EngineReport, EngineRow, logits_limit
from paligemma_jax.processing.processor import Inputs


def compare_with_engine(
    case: ParityCase, engine: str, dtype: str, new: int, python: str | None = None
) -> EngineReport:
    """Run a release of transformers on a case, and this model with the profile of that release.

    Both compute a teacher-forced pass for each kind of call, and `new` greedy tokens; the logits of
    generated tokens are compared after the same tokens.

    Args:
        engine: As "transformers==4.57.1".
        python: Interpreter of an environment that has it.

    Raises:
        ValueError: The release is not available, or cannot load the checkpoint.
    """
    if new < 0:
        raise ValueError(f"--new must be at least 0, got {new}")
    package, version = parse_engine(engine)
    numerics = profile_of(version)
    interpreter = python_of(package, version, python)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        checkpoint = _checkpoint(case, job)
        _write_job(job, case, checkpoint, dtype, new)
        run(interpreter, package, job)
        with np.load(job / "outputs.npz") as file:
            outputs = dict(file)
        model = load_model(resolve(str(checkpoint)), dtype, numerics)
    rows, equal = [], None
    with jax.default_matmul_precision("highest"):
        for call in CALLS:
            rows += _call_rows(model, case, call, outputs, dtype)
        if new:
            prefill, decode = _decode_after(model, case.prompts, outputs["tokens"])
            limit = logits_limit(model.config, dtype)
            for name, value in (("prefill", prefill), ("decode", decode)):
                rows.append(EngineRow(name, measure_error(value, outputs[name]), limit))
            steps = np.concatenate([prefill[:, None], decode], axis=1)
            steps[..., list(model.config.eos_token_ids)] = -np.inf  # as the engine is run
            equal = float((steps.argmax(axis=-1) == outputs["tokens"]).mean())
    return EngineReport(engine, numerics, dtype, rows, equal)


def _checkpoint(case: ParityCase, job: Path) -> Path:
    """The directory that the engine reads by itself, or one that is written for it."""
    source = case.source
    if source is not None and not source.adapter and not case.checkpoint.formats:
        return source.weights
    huggingface.write(job / "checkpoint", case.checkpoint)
    return job / "checkpoint"


def _write_job(job: Path, case: ParityCase, checkpoint: Path, dtype: str, new: int) -> None:
    inputs = case.inputs
    arrays = {name: getattr(inputs, name) for name in ("tokens", "valid", "targets")}
    prompts = {f"prompt_{name}": getattr(case.prompts, name) for name in arrays}
    if inputs.images is not None:
        arrays["images"] = inputs.images
    np.savez(job / "inputs.npz", **arrays, **prompts)
    settings = {"checkpoint": str(checkpoint), "dtype": dtype, "calls": list(CALLS), "new": new}
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
            ours = without_padding(name, np.asarray(value, np.float32), inputs)
            theirs = without_padding(name, expected.reshape(value.shape), inputs)
            error, limit = measure_error(ours, theirs), logits_limit(model.config, dtype)
            rows.append(EngineRow(f"{call}/{name}", error, limit))
    return rows


def _decode_after(
    model: PaliGemma, prompts: Inputs, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32[B, V] after the prompt, and [B, N - 1, V] after each of the tokens."""
    slots = prompts.tokens.shape[1] + tokens.shape[1]
    features = encode_inputs(model, prompts)
    prefill = jax.jit(type(model).prefill, static_argnames="slots")
    first, cache = prefill(
        model, prompts.tokens, features, prompts.valid, prompts.prefix, slots=slots
    )
    step, steps = jax.jit(type(model).decode_step), []
    for token in tokens.T[:-1]:
        logits, cache = step(model, jnp.asarray(token), cache)
        steps.append(np.asarray(logits))
    empty = np.zeros((len(tokens), 0, first.shape[-1]), np.float32)
    return np.array(first), np.stack(steps, axis=1) if steps else empty
