"""Releases of transformers, run in other processes."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest
from support.engine_checkpoint import CONFIG

from paligemma_jax.parity.case import random_case
from paligemma_jax.parity.engines import against
from paligemma_jax.parity.engines.environment import Engine, parse_engine, python_of, run

pytest.importorskip("torch")
INSTALLED = f"transformers=={version('transformers')}"
RELEASES = ["4.47.1", "4.52.4", "4.53.3", "4.57.6", "5.3.0", "5.8.1", "5.22.2"]


@pytest.fixture(scope="module")
def case():
    return random_case(CONFIG, 8, 6)


def test_the_installed_release(case):
    report = against.compare_with_engine(case, INSTALLED, "float32", 4, sys.executable)
    assert report.first_divergence is None and report.equal_tokens == 1
    stages = [row.stage for row in report.rows]
    assert {"labels/projector", "forward/decoder/layers/3", "plain/logits"} <= set(stages)
    assert stages[-2:] == ["prefill", "decode"]


def test_another_profile_diverges(case, monkeypatch):
    monkeypatch.setattr(Engine, "profile", "transformers-5.9")
    report = against.compare_with_engine(case, INSTALLED, "float32", 0, sys.executable)
    assert report.first_divergence == "labels/logits"


@pytest.mark.engines
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_release(case, release, dtype):
    report = against.compare_with_engine(case, f"transformers=={release}", dtype, 6)
    assert report.first_divergence is None and (dtype == "bfloat16" or report.equal_tokens == 1)


@pytest.mark.parametrize("reference", ["transformers==new", "torch==2.0", "keras-hub=="])
def test_other_engines_are_refused(reference):
    with pytest.raises(ValueError, match="--against must be a directory, transformers==VERSION, k"):
        parse_engine(reference)


def test_an_environment_must_have_the_release(tmp_path):
    engine = parse_engine("transformers==4.50.0")
    with pytest.raises(ValueError, match=r"must have transformers==4\.50\.0, got "):
        python_of(engine, sys.executable)
    with pytest.raises(ValueError, match="is not a Python interpreter"):
        python_of(engine, "/missing/python")


def test_a_missing_module_of_an_engine_is_named(tmp_path):
    """This environment has no keras-hub, and the job is not read before it is imported."""
    with pytest.raises(ValueError, match=r"keras-hub failed: ModuleNotFoundError.*must have all"):
        run(sys.executable, Engine("keras-hub", "0.32.0"), tmp_path)
