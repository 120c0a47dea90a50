"""Paths that the tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
DIGITS = ROOT / "paligemma_jax" / "assets" / "digits.jpg"
