"""Imports run downward through the rooms, and no two files import each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from support.paths import ROOT

# Each room may import from the rooms before it.
ROOMS = [
    "model",
    "convert",
    "sharding",
    "quantization",
    "lora",
    "processing",
    "data",
    "checkpoints",
    "metrics",
    "inference",
    "training",
    "evaluation",
    "parity",
    "bench",
    "planning",
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


def room(module: str) -> str:
    package, *rest = module.split(".")
    return "convert" if package == "convert" else rest[0] if rest else "__init__"


def imports(module: str) -> set[str]:
    """The project's modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & FILES.keys()) - {module}


GRAPH = {module: imports(module) for module in FILES}


def test_imports_run_downward():
    upward = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(module)) and module != "convert.__main__"
    ]
    assert not upward


def test_no_files_import_each_other():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_convert_imports_only_the_model():
    for module in FILES:
        if room(module) == "convert" and module != "convert.__main__":
            assert {room(other) for other in GRAPH[module]} <= {"convert", "model"}, module


def test_only_the_door_is_at_the_top():
    loose = {file.stem for file in (ROOT / "paligemma_jax").glob("*.py")}
    assert loose == {"__init__", "__main__", "cli", "errors", "lora"}
