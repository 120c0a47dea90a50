"""Imports run downward through the layers, and no two files import each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from support.paths import ROOT

# Each layer may import from the layers before it.
LAYERS = [
    "kernels",
    "model",
    "convert",
    "sharding",
    "quantization",
    "lora",
    "losses",
    "processing",
    "data",
    "checkpoints",
    "metrics",
    "interpretability",
    "grammars",
    "inference",
    "training",
    "retrieval",
    "reinforcement",
    "evaluation",
    "parity",
    "bench",
    "planning",
    "serving",
    "demo",
    "errors",
    "tiny",
    "__init__",
    "commands",
    "cli",
    "__main__",
]


def module_name(file) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


FILES = {module_name(f): f for d in ("paligemma_jax", "convert") for f in (ROOT / d).rglob("*.py")}


def layer(module: str) -> str:
    package, *rest = module.split(".")
    return "convert" if package == "convert" else rest[0] if rest else "__init__"


def imports(module: str) -> set[str]:
    """Return the project's modules that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return (modules & FILES.keys()) - {module}


GRAPH = {module: imports(module) for module in FILES}


def test_imports_run_downward():
    upward = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if LAYERS.index(layer(other)) > LAYERS.index(layer(module)) and module != "convert.__main__"
    ]
    assert not upward


def test_no_files_import_each_other():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' -> '.join(error.args[1])}")


def test_convert_imports_only_the_model():
    for module in FILES:
        if layer(module) == "convert" and module != "convert.__main__":
            assert {layer(other) for other in GRAPH[module]} <= {"convert", "model"}, module


def test_only_entry_points_and_shared_modules_are_at_the_top():
    top_level = {file.stem for file in (ROOT / "paligemma_jax").glob("*.py")}
    assert top_level == {"__init__", "__main__", "cli", "errors", "lora"}


def test_readme_states_the_length_of_the_model():
    files = (ROOT / "paligemma_jax" / "model").glob("*.py")
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert f"about {round(lines, -2):,} lines" in (ROOT / "README.md").read_text()
