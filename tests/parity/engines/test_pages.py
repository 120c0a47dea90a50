"""The page of a comparison with an engine."""

from __future__ import annotations

import pytest

from paligemma_jax.parity.compare import Error
from paligemma_jax.parity.engines.pages import render_engine_page
from paligemma_jax.parity.engines.report import EngineReport, EngineRow

pytest.importorskip("matplotlib", reason="figures need the extra parity")


def report(numerics, calls, relative=1e-6):
    """One stage of each call is larger than the others, by default within the limit."""
    stages = ["projector", *(f"decoder/layers/{i}" for i in range(50)), "logits"]
    errors = {stage: 1e-7 for stage in stages} | {"decoder/layers/7": relative}
    rows = [
        EngineRow(f"{call}/{stage}", Error(1, 1, error, 0), 1e-5)
        for call in calls
        for stage, error in errors.items()
    ]
    rows.append(EngineRow("prefill", Error(1, 1, 0, 0), 1e-5))
    return EngineReport("keras-hub==0.32.0", numerics, "float32", rows, 0.75)


def test_profile_changes_and_greedy_tokens():
    page = render_engine_page(report("keras", ["labels"]), "<tiny>")
    assert "<h1>&lt;tiny&gt; against keras-hub==0.32.0</h1>" in page
    assert "narrows image and prompt on both sides<" in page and "75% of the greedy" in page
    assert 'class="verdict good"' in page and "without token types" not in page
    assert page.count("data:image/png;base64,") == 1 and "http" not in page


def test_the_first_stage_that_diverges():
    page = render_engine_page(report("transformers", ["labels", "plain"], 1e-3), "tiny")
    assert "keras-hub==0.32.0: labels/decoder/layers/7 diverges first" in page
    assert page.count('class="diverges"') == 2 and "<code>plain</code>: without token types" in page
    assert "This is the default profile" in page
