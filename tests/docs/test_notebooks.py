"""The notebooks run in an empty directory, and are saved with their outputs.

Those that train run with fewer steps than as saved; `pytest -m slow` runs them as saved.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
from support.paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEED_TORCH = {"parity"}  # others use it where it is installed
# Their training runs three times as fast with the optimizations that conftest.py turns off.
OPTIMIZED = {"action_expert", "reinforcement", "surgery"}
# (as saved, in the quick test): what they learn is checked with the number of steps.
SHORTER = {
    "lora": [("STEPS = 60\n", "STEPS = 4\n")],
    "own_loop": [("PARTS = 60,", "PARTS = 15,")],
    "retrieval": [("range(120)", "range(10)")],
}
# They train, or start other processes: minutes in all.
LONG = {"action_expert", "own_loop", "reinforcement", "retrieval", "sharding", "surgery"}
MODEL_LINE = 'MODEL = "tiny"  # change this line: '


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def count_images(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def printed(notebook) -> str:
    """Return all printed and returned text."""
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook)
    )


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_saved_with_outputs(file):
    """A notebook has an image, no errors and no paths of a machine; it is short, and one line names
    the model."""
    notebook = nbformat.read(file, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(MODEL_LINE in cell.source for cell in code) == 1
    assert len(code) <= 12 and file.stat().st_size < 500_000
    assert count_images(notebook) and all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert not re.search(r"/(work|home|root|tmp)/", printed(notebook))


def run(notebook, folder) -> None:
    """Run a notebook in a directory. It makes as many images as are saved."""
    saved = count_images(notebook)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=resources
    )
    client.execute()
    assert count_images(notebook) == saved


def optimize(monkeypatch) -> None:
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def shorten(notebook, changes) -> None:
    """Make each change in the one cell that has its text."""
    for saved, shorter in changes:
        (cell,) = (cell for cell in notebook.cells if saved in cell.source)
        cell.source = cell.source.replace(saved, shorter)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if file.stem in LONG else [])
        for file in NOTEBOOKS
    ],
)
def test_it_runs(file, tmp_path, monkeypatch):
    if file.stem in NEED_TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("comparing with transformers needs torch")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if file.stem in OPTIMIZED:
        optimize(monkeypatch)
    notebook = nbformat.read(file, as_version=4)
    shorten(notebook, SHORTER.get(file.stem, []))
    run(notebook, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stem", sorted(SHORTER))
def test_it_runs_as_saved(stem, tmp_path, monkeypatch):
    """The quick one is test_it_runs, with fewer steps."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    optimize(monkeypatch)
    run(nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4), tmp_path)
