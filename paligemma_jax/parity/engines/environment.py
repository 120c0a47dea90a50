"""Environments of other programs, each with its own releases, beside this one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from paligemma_jax.parity.engines.releases import profile_of

RUNNERS = {
    "transformers": "run_transformers.py",
    "keras-hub": "run_keras_hub.py",
    "big_vision": "run_big_vision.py",
}
TIMEOUT = 900  # seconds for an installation
BIG_VISION = "https://github.com/google-research/big_vision"
WITHOUT_TENSORFLOW = (0, 32)  # the first keras-hub that can be imported without
MODEL = Path("big_vision/models/proj/paligemma/paligemma.py")  # in a checkout


@dataclass(frozen=True)
class Engine:
    """A program: a release on PyPI, or for big_vision, which has none, its checkout."""

    name: str
    version: str = ""
    directory: Path | None = None

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name

    @property
    def profile(self) -> str:
        """The profile that computes the same. ValueError for a release without PaliGemma 2."""
        if self.name == "transformers":
            return profile_of(self.version)
        return {"keras-hub": "keras", "big_vision": "big_vision"}[self.name]

    @property
    def knows_image_tokens(self) -> bool:
        """Whether images can be anywhere in a row, and pads at either end."""
        return self.name == "transformers"

    @property
    def requirements(self) -> list[list[str]]:
        """Arguments of calls of pip. What else is needed is in the environment of this project."""
        if self.name == "keras-hub":  # of its requirements, tensorflow-text is not needed
            before = [] if _numbers(self.version) >= WITHOUT_TENSORFLOW else [["tensorflow-cpu"]]
            return [*before, ["--no-deps", str(self), "keras", "optree"]]
        if self.name == "big_vision":  # tensorflow, since it opens files with it
            return [["tensorflow-cpu"], ["--no-deps", "einops", "ml_collections"]]
        return [[str(self)]]


def parse_engine(reference: str) -> Engine:
    """The engine of "transformers==4.57.1" or "big_vision=DIR". ValueError for others."""
    name, _, directory = reference.partition("=")
    if name == "big_vision" and not directory.startswith("="):
        if not Path(directory, MODEL).is_file():
            raise ValueError(
                f"--against big_vision=DIR must be a checkout of big_vision with {MODEL}, got "
                f"{directory!r}: git clone {BIG_VISION}"
            )
        return Engine(name, directory=Path(directory).resolve())
    name, _, version = reference.partition("==")
    if name not in RUNNERS or not re.fullmatch(r"\d+\.\d+(\.\d+)?", version):
        known = "transformers==VERSION, keras-hub==VERSION or big_vision=DIR"
        raise ValueError(f"--against must be a directory, {known}, got {reference!r}")
    return Engine(name, version)


def python_of(engine: Engine, interpreter: str | None = None) -> str:
    """The Python of an environment with an engine, which is created if there is none.

    The environment has the release and what it requires; everything else, such as torch, is shared
    with this one through a .pth file. It is kept in `$XDG_CACHE_HOME/paligemma-jax/engines`.

    Args:
        interpreter: Python of an environment that already has the engine.

    Raises:
        ValueError: The release cannot be installed, or the environment has another one.
    """
    if interpreter is None:
        name = "-".join(filter(None, [engine.name, engine.version]))
        folder = _cache() / f"{name}-py{sysconfig.get_python_version()}"
        interpreter = str(folder / "bin" / "python")
        if not (folder / "complete").exists():
            try:
                _create(folder, interpreter, engine)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    installed = _installed(interpreter, engine.name) if engine.version else ""
    if installed != engine.version:
        raise ValueError(f"{interpreter} must have {engine}, got {installed or 'none'}")
    return interpreter


def run(interpreter: str, engine: Engine, job: Path) -> None:
    """Run a job on the CPU. ValueError with the last line of its errors if it fails."""
    script = Path(__file__).with_name(RUNNERS[engine.name])
    command = [interpreter, str(script), str(job)]
    try:
        # Files beside the script must not stand for modules that the engine imports.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError:
        raise ValueError(f"{interpreter} is not a Python interpreter") from None
    if done.returncode:
        message = _last_line(done.stderr)
        if "ModuleNotFoundError" in message:
            message += f"; {interpreter} must have all that {engine.name} imports"
        raise ValueError(f"{engine.name} failed: {message}")


def _create(folder: Path, interpreter: str, engine: Engine) -> None:
    print(f"installing {engine} in {folder}, once", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "venv", "--clear", str(folder)], engine)
    packages = _call([interpreter, "-c", _PATH.format("purelib")], engine)
    # Installed first: pip would take packages of the shared environment for its own.
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for requirements in engine.requirements:
        _call([*pip, *requirements], engine)
    shared = sysconfig.get_path("purelib")
    Path(packages.strip(), "shared_environment.pth").write_text(f"{shared}\n")
    (folder / "complete").touch()


_PATH = "import sysconfig; print(sysconfig.get_path('{}'))"
_VERSION = "from importlib.metadata import version; print(version({!r}))"


def _call(command: list[str], engine: Engine) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{engine} was not installed in {TIMEOUT} s: try again") from None
    if done.returncode:
        raise ValueError(f"{engine} cannot be installed: {_last_line(done.stderr)}")
    return done.stdout


def _installed(interpreter: str, package: str) -> str:
    try:
        command = [interpreter, "-c", _VERSION.format(package)]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        raise ValueError(f"{interpreter} is not a Python interpreter") from None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "paligemma-jax", "engines")
