"""A checkpoint for the tests of parity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.paths import GOLDEN


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A golden checkpoint with all that transformers saves beside the weights."""
    from support.hf_processor import save_processor  # imports transformers

    path = tmp_path_factory.mktemp("parity") / "original"
    shutil.copytree(GOLDEN / "pg2", path)
    return save_processor(path, 56, 14)
