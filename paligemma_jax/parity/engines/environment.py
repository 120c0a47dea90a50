"""Environments of other programs, each with its own releases, beside this one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

RUNNERS = {"transformers": "run_transformers.py"}
TIMEOUT = 900  # seconds for an installation


def parse_engine(reference: str) -> tuple[str, str]:
    """The package and version of "transformers==4.57.1". ValueError for others."""
    package, _, version = reference.partition("==")
    if package not in RUNNERS or not re.fullmatch(r"\d+\.\d+(\.\d+)?", version):
        known = " or ".join(f"{name}==VERSION" for name in RUNNERS)
        raise ValueError(f"--against must be a directory or {known}, got {reference!r}")
    return package, version


def python_of(package: str, version: str, interpreter: str | None = None) -> str:
    """The Python of an environment with a release, which is created if there is none.

    The environment has the release and what it requires; everything else, such as torch, is shared
    with this one through a .pth file. It is kept in `$XDG_CACHE_HOME/paligemma-jax/engines`.

    Args:
        interpreter: Python of an environment that already has the release.

    Raises:
        ValueError: The release cannot be installed, or the environment has another one.
    """
    if interpreter is None:
        folder = _cache() / f"{package}-{version}-py{sysconfig.get_python_version()}"
        interpreter = str(folder / "bin" / "python")
        if not (folder / "complete").exists():
            try:
                _create(folder, interpreter, f"{package}=={version}")
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    installed = _installed(interpreter, package)
    if installed != version:
        raise ValueError(f"{interpreter} must have {package} {version}, got {installed or 'none'}")
    return interpreter


def run(interpreter: str, package: str, job: Path) -> None:
    """Run a job. ValueError with the last line of its errors if it fails."""
    script = Path(__file__).with_name(RUNNERS[package])
    done = subprocess.run([interpreter, script, job], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{package} failed: {_last_line(done.stderr)}")


def _create(folder: Path, interpreter: str, requirement: str) -> None:
    print(f"installing {requirement} in {folder}, once", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "venv", "--clear", str(folder)], requirement)
    packages = _call([interpreter, "-c", _PATH.format("purelib")], requirement)
    # Installed first: pip would take packages of the shared environment for its own.
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([*pip, requirement], requirement)
    shared = sysconfig.get_path("purelib")
    Path(packages.strip(), "shared_environment.pth").write_text(f"{shared}\n")
    (folder / "complete").touch()


_PATH = "import sysconfig; print(sysconfig.get_path('{}'))"
_VERSION = "from importlib.metadata import version; print(version({!r}))"


def _call(command: list[str], requirement: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{requirement} was not installed in {TIMEOUT} s: try again") from None
    if done.returncode:
        raise ValueError(f"{requirement} cannot be installed: {_last_line(done.stderr)}")
    return done.stdout


def _installed(interpreter: str, package: str) -> str:
    try:
        command = [interpreter, "-c", _VERSION.format(package)]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        raise ValueError(f"{interpreter} is not a Python interpreter") from None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "paligemma-jax", "engines")
