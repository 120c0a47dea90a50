"""Checkpoints that many tests share, made once."""

from __future__ import annotations

import os
import tempfile
from importlib import metadata

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Nearly all programs run a few times only. Without LLVM's optimizations and XLA's newer code
    # generator for loops, a training step compiles in 1.4 s instead of 10.6, and runs half as fast.
    # tests/model/test_golden.py also runs a process with them, as users do.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if metadata.version("jaxlib").startswith("0.10."):  # 0.12 ends at a flag it does not know
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of torch that wait for a core of another worker take three times as long as one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The processes of this session share the programs they compile.
    PROGRAMS = tempfile.TemporaryDirectory(prefix="paligemma-jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import ast
import functools
import gc
import importlib.util
import shutil
import sys
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook
from support.paths import GOLDEN, TESTS
from support.typecheck import check

# Check the annotated shapes and dtypes of every call while testing; users pay nothing for them.
# Modules that check the types of their arguments themselves are left out.
INFERENCE = ["answer", "beam", "decoding", "generate", "request", "sampler", "sampling", "scoring"]
TYPED = ["paligemma_jax.model", "paligemma_jax.sharding"]
TYPED += [f"paligemma_jax.inference.{name}" for name in INFERENCE]
install_import_hook(TYPED, f"{check.__module__}.{check.__name__}")

jax.config.update("jax_default_matmul_precision", "highest")

WITHOUT_TORCH = importlib.util.find_spec("torch") is None


def _needs_torch(file: Path) -> bool:
    """Whether it imports torch or transformers at its top, itself or through tests/support."""
    modules = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    helpers = [TESTS / f"{module.replace('.', '/')}.py" for module in modules if module]
    uses_torch = {str(module).split(".")[0] for module in modules} & {"torch", "transformers"}
    return bool(uses_torch) or any(_needs_torch(helper) for helper in helpers if helper.exists())


collect_ignore = [
    str(file.relative_to(TESTS))
    for file in TESTS.rglob("test_*.py")
    if WITHOUT_TORCH and _needs_torch(file)
]


def pytest_report_header() -> str:
    return (
        f"without torch: left out {', '.join(sorted(collect_ignore))}"
        if WITHOUT_TORCH
        else "with torch: live parity"
    )


# Files of a minute or more, longest first.
LONG = ["tiny/test_tiny", "docs/test_notebooks", "docs/test_docs", "training/test_training_parity"]
LONG += ["convert/test_fuzz", "lora/test_lora", "inference/test_generation", "model/test_golden"]
LONG += ["sharding/test_sharding", "inference/test_engine", "inference/test_every_strategy"]
LONG += ["model/test_numerics", "lora/test_soft_prompt_continued", "checkpoints/test_load_on_mesh"]
LONG += ["sharding/test_hosts", "sharding/test_axes", "lora/test_soft_prompt", "lora/test_prefix"]
LONG += ["inference/test_strategies", "reinforcement/test_run", "training/test_trainer"]
LONG += ["model/test_surgery", "inference/test_batching", "training/test_finetune"]


def pytest_configure(config) -> None:
    """pytest-xdist would begin with the files that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items) -> None:
    """Begin with the longest files, so that no process is alone with one in the end."""
    places = {TESTS / f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector out of the modules that are imported by now.

    With torch and transformers they are millions of objects; walking them took 5% of the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    """Drop compiled programs after each file.

    Each of XLA's programs on a CPU keeps memory maps, of which Linux allows a process 65,530;
    beyond that it dies with a segmentation fault. tests/inference/test_generation.py alone takes
    19,000.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """Compile as users do: for tests whose tolerance is that of optimized programs."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """(kind, seed, **changes) -> (transformers model, directory in released layout, our model).

    See tests/support/hf_models.py.
    """
    from support import hf_models

    from paligemma_jax.checkpoints.load import load_model

    @functools.cache
    def make(kind: str = "pg2", seed: int = 0, numerics: str = "transformers", **changes):
        changes = {
            key: dict(value) if isinstance(value, tuple) else value
            for key, value in changes.items()
        }
        model = hf_models.random_model(kind, seed, **changes)
        directory = hf_models.save_checkpoint(model, tmp_path_factory.mktemp(kind))
        return model, directory, load_model(directory, numerics=numerics)

    return make


@pytest.fixture
def random_directory(tmp_path):
    """kind -> a fresh copy of a golden checkpoint, with tokenizer.model, to load or to break."""
    return lambda kind="pg2": Path(shutil.copytree(GOLDEN / kind, tmp_path / kind))


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit code, stdout, stderr) of `paligemma-jax`, run in this process."""
    from paligemma_jax.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paligemma-jax", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run
