"""Code blocks of the pages, and how they run."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"(?:<!-- (not run|slow|needs (\w+))[^>]*-->\n)?"  # mark
    r"^```(\w*)\n(.*?)^```$"  # language and code
    r"(?:\n\n```\n(.*?)^```$)?",  # output
    re.DOTALL | re.MULTILINE,
)
IN_PROCESS = re.compile(r"(paligemma-jax|python -m (paligemma_jax|convert)) ")


@dataclass(frozen=True)
class Block:
    mark: str
    needs: str
    language: str
    code: str
    output: str

    @property
    def runs(self) -> bool:
        if self.language not in ("bash", "python") or self.mark == "not run":
            return False
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in match)) for match in BLOCK.findall(page.read_text())]


def run_commands(code: str, capfd, monkeypatch) -> str:
    """Return the output of commands.

    Commands of this project run in this process, where jax is imported already; bash runs a block
    with any others.
    """
    lines = [
        line
        for line in code.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    capfd.readouterr()
    if not all(IN_PROCESS.match(line) and not re.search(r"\||> ", line) for line in lines):
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        return capfd.readouterr().out
    for line in lines:
        words = shlex.split(line, comments=True)
        is_script = words[0] == "paligemma-jax"
        module, arguments = ("paligemma_jax", words[1:]) if is_script else (words[2], words[3:])
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as stop:
            assert not stop.code, f"{line}: exit code {stop.code}: {capfd.readouterr().err}"
    return capfd.readouterr().out


def run_python(code: str, names: dict[str, object]) -> None:
    exec(compile(code, "block", "exec"), names)
    for call, result in re.findall(r"^(\w[\w.]*\(.*?\))  # (\[.*\])$", code, re.MULTILINE):
        assert eval(call, names) == eval(result), call
