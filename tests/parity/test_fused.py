"""Fused attention is within the limits of the parity report."""

from __future__ import annotations

import pytest

from paligemma_jax.parity import run
from paligemma_jax.parity.report import format_report


@pytest.mark.slow
def test_the_embedded_model_passes_with_fused_attention(monkeypatch):
    """In Pallas' interpreter, with gradients; `paligemma-jax parity` refuses that on a CPU."""
    monkeypatch.setattr(run, "choose_attention", lambda form: form)
    report = run.run(run.ParityConfig("tiny", new=4, gradients=True, attention="fused"))
    assert "fused attention" in format_report(report)
    assert report.first_divergence is None, format_report(report)
    names = [row.stage for row in report.rows]
    assert "decoder/layers/3" in names and not any("weights" in name for name in names)
