"""The 3b-224 preset with random float32 weights (12 GB): transformers in one process, this model in
another, and the same numbers from both.

Run by hand: `pytest -m full_size tests/model/test_full_size.py -s`. It needs 16 GB of memory, 13 GB
of disk, and about ten minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from support.paths import TESTS

PRESET, STEPS = "3b-224", 8

SETUP = """
import json, resource, sys, time
import numpy as np
sys.path.insert(0, {tests!r})
STEPS = {steps}
directory, out, start = {directory!r}, {out!r}, time.perf_counter()
def report(**figures):
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(figures))
"""

REFERENCE = """
import torch
from transformers import PaliGemmaForConditionalGeneration
from support.hf_models import hf_inputs, hf_logits, random_inputs
model = PaliGemmaForConditionalGeneration.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager"
).eval()
loaded = time.perf_counter() - start
scored = random_inputs(model, ((1, 8, 8),))
prompts = random_inputs(model, ((1, 8, 0),))
logits = hf_logits(model, scored)[:, 240:]
result = model.generate(
    **hf_inputs(prompts), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
    return_dict_in_generate=True, output_logits=True
)
best = torch.stack(result.logits, 1).topk(2).values.numpy()
batches = {
    f"{name}_{field}": getattr(batch, field)
    for name, batch in (("scored", scored), ("prompts", prompts))
    for field in batch.__dataclass_fields__
}
tokens = result.sequences[:, prompts.tokens.shape[1]:].numpy()
np.savez(out, logits=logits, tokens=tokens, gaps=best[..., 0] - best[..., 1], **batches)
report(load_s=loaded, total_s=time.perf_counter() - start)
"""

OURS = """
from pathlib import Path
import jax
jax.config.update("jax_default_matmul_precision", "highest")
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.processing.processor import Inputs
saved = np.load(out + ".npz")
def batch(name):
    return Inputs(**{field: saved[f"{name}_{field}"] for field in Inputs.__dataclass_fields__})
start = time.perf_counter()
model = load_model(Path(directory))
loaded = time.perf_counter() - start
error = np.abs(np.asarray(scoring.forward(model, batch("scored")))[:, 240:] - saved["logits"])
allowed = np.ones(model.config.decoder.vocab_size, bool)
allowed[1] = False  # as min_new_tokens does
new = saved["tokens"].shape[1]
tokens = generate.generate(model, batch("prompts"), DecodingOptions(new, allowed=allowed)).tokens
report(load_s=loaded, total_s=time.perf_counter() - start,
       max_error=float(error.max()), mean_error=float(error.mean()),
       std=float(saved["logits"].std()), smallest_gap=float(saved["gaps"].min()),
       tokens=tokens.tolist(), expected=saved["tokens"].tolist())
"""


def _run(script: str, **names: str) -> dict:
    names = {"steps": str(STEPS), "tests": str(TESTS), **names}
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(**names) + script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.full_size
def test_3b_224_equals_transformers(tmp_path):
    from support.hf_models import write_random

    directory = write_random(tmp_path / "checkpoint", PRESET)
    names = {"directory": str(directory), "out": str(tmp_path / "reference")}
    theirs, ours = _run(REFERENCE, **names), _run(OURS, **names)
    print(json.dumps({"transformers": theirs, "ours": ours}, indent=2))
    assert 1 < ours["std"] < 8
    assert ours["max_error"] <= 2e-4 and ours["mean_error"] <= 2e-5
    assert len(np.unique(ours["tokens"])) > 1
    assert ours["tokens"] == ours["expected"]


STREAMED = """
from paligemma_jax.parity import reference, report, run
reference.available_memory = lambda: 0  # so that every layer is streamed
result = report.as_dict(run.run(run.ParityConfig(model=directory, new=0)))
print(json.dumps({
    "first": result["first_divergence"],
    "peak_gib": result["peak_bytes"] / 2**30,
    "seconds": result["seconds"],
}))
"""


@pytest.mark.full_size
def test_streamed_parity_of_3b_224(tmp_path):
    """Computes all stages of both models in less memory than one of them takes (12 GB)."""
    report = _run(STREAMED, directory=PRESET, out="")
    print(report)
    assert report["first"] is None and report["peak_gib"] < 8
