"""Fixtures: a photo, and cases about it."""

import pytest
from PIL import Image

from paligemma_jax.metrics.cases import Case


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (100, 50), "teal").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def make_cases(photo):
    """Make cases from answers; the reference is "yes". Further fields have a value per answer."""

    def make(answers, **fields):
        rows = [{"image": photo.name, "prefix": "q", "suffix": "yes", "answer": a} for a in answers]
        for name, values in fields.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        return [Case(row, photo.parent) for row in rows]

    return make
