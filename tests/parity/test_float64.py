"""`paligemma-jax parity --float64`: how far both models are from float64, and whose error it is."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
import torch  # noqa: F401, so that this file is left out without it
from support.paths import GOLDEN

from paligemma_jax.parity import float64_report, html, jax_model
from paligemma_jax.parity.float64 import float64_stages
from paligemma_jax.parity.reference import compute_reference
from paligemma_jax.parity.report import as_dict, format_report
from paligemma_jax.parity.run import ParityConfig, run
from paligemma_jax.parity.stage_errors import stage_errors


@pytest.fixture(scope="module")
def report():
    inputs = dict(images=(str(GOLDEN / "image.png"),), prompts=("caption en",), suffixes=("a cat",))
    return run(ParityConfig(str(GOLDEN / "pg2"), **inputs, new=0, float64=True))


def test_every_stage_has_both_distances(report, monkeypatch):
    for row in as_dict(report)["stages"]:
        names = "ours_from_float64", "transformers_from_float64"
        ours, theirs = (row[name] and row[name]["relative"] for name in names)
        if row["stage"] in ("pixels", "ids", "valid", "targets"):
            assert ours is theirs is None
        else:
            assert 0 < ours < 1e-5 and 0 < theirs < 1e-5, row
    closing = as_dict(report)["float64_verdict"]
    assert closing.startswith("logits: ours is ")
    above, below, *lines = format_report(report).split("\n\n")[1].splitlines()
    assert above.split() == ["ours", "transformers"] and below.count("from float64") == 2
    logits = next(line.split() for line in lines if line.startswith("logits"))
    assert all(0 < float(number) < 1e-5 for number in logits[-2:])
    assert max(map(len, [above, below, *lines])) <= 120
    assert format_report(report).splitlines()[-1] == closing
    monkeypatch.setattr(html, "FIGURES", {})
    page = html.render_page(report)
    assert closing in page and all(f"<th>{title}" in page for title in float64_report.COLUMNS)


def test_the_model_that_rounds_is_farther_from_float64(report):
    """The weights of one MLP are rounded to 8 bits in this model alone."""
    case = report.case
    model, read = jax_model.build_model(case.checkpoint, "float32")

    def rounded(path):
        value = read(path)
        is_rounded = path.startswith("decoder/layers/2/mlp")
        return value.astype(jnp.float8_e4m3fn).astype(jnp.float32) if is_rounded else value

    stages = jax_model.compute_stages(model, rounded, case.inputs, True)
    float64, reference = float64_stages(case, True), compute_reference(case)
    rows = {row.stage: row for row in stage_errors(case, stages, stages, reference, False, float64)}
    assert rows["decoder/layers/1"].float64_ratio < 3
    assert rows["decoder/layers/2/mlp/output"].float64_ratio > 100
    assert rows["logits"].float64_ratio > 100
