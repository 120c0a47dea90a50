"""What the README and the documentation tell is so: links lead somewhere, and code runs as it is written, in an empty folder.

A comment before a block says what is special about it: `<!-- not run: why -->`, `<!-- slow -->`, `<!-- needs torch -->`. A block without a language
that follows one of commands is what they print; a list behind a call in Python is what it returns.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (not run|slow|needs (\w+))[^>]*-->\n)?^```(\w*)\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
IN_PROCESS = re.compile(r"(paligemma-jax|python -m (paligemma_jax|convert)) ")


@dataclass(frozen=True)
class Block:
    mark: str
    needs: str
    language: str
    code: str
    printed: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.mark != "not run" and (not self.needs or importlib.util.find_spec(self.needs) is not None)


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in found)) for found in BLOCK.findall(page.read_text())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What a reader has: a photo, some rows of data, and the picture where the README says it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    Path("paligemma_jax/assets").mkdir(parents=True)
    for name in ("photo.jpg", "paligemma_jax/assets/digits.jpg"):
        shutil.copy(ROOT / "paligemma_jax" / "assets" / "digits.jpg", name)
    rows = [
        {"image": "photo.jpg", "prefix": "ocr", "suffix": "4 3 2 3"},
        {"image": "photo.jpg", "prefix": "answer en how many digits?", "suffix": "4"},
    ] * 4
    for name in ("train.jsonl", "val.jsonl", "in.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_commands(code: str, capfd, monkeypatch) -> str:
    """What the commands print: those of this project run in this process, for jax is loaded here already; a block with others is bash's."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    capfd.readouterr()
    if not all(IN_PROCESS.match(line) and not re.search(r"\||> ", line) for line in lines):
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        return capfd.readouterr().out
    for line in lines:
        words = shlex.split(line, comments=True)
        module, arguments = ("paligemma_jax", words[1:]) if words[0] == "paligemma-jax" else (words[2], words[3:])
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as stop:
            assert not stop.code, f"{line}: exit code {stop.code}: {capfd.readouterr().err}"
    return capfd.readouterr().out


def run_python(code: str, names: dict) -> None:
    exec(compile(code, "block", "exec"), names)
    for call, shown in re.findall(r"^(\w[\w.]*\(.*?\))  # (\[.*\])$", code, re.MULTILINE):
        assert eval(call, names) == eval(shown), call


def run(page: Path, slow: bool, capfd, monkeypatch) -> None:
    names: dict = {"photos": ["photo.jpg"] * 3}
    for block in blocks(page):
        if not block.runs or (block.mark == "slow" and not slow):
            continue
        if block.language == "python":
            run_python(block.code, names)
        else:
            out = run_commands(block.code, capfd, monkeypatch)
            assert not block.printed or out == block.printed, block.code


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs and block.mark != "slow" for block in blocks(page))], ids=lambda p: p.name)
def test_code_runs(page, folder, capfd, monkeypatch):
    run(page, False, capfd, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs and block.mark == "slow" for block in blocks(page))], ids=lambda p: p.name)
def test_slow_code_runs(page, folder, capfd, monkeypatch):
    run(page, True, capfd, monkeypatch)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in slugs(place), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_commands_that_are_not_run_have_flags_that_exist(command):
    """Every flag of every shown command stands in its help."""
    helps: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            for line in block.code.replace("\\\n", " ").splitlines() if block.language == "bash" else []:
                line = line.split(" #")[0]
                line = line.replace("python -m convert ", "paligemma-jax convert ")
                if name := re.search(r"paligemma-jax (convert inspect|\w+).*", line):
                    flags = set(re.findall(r"(?<=\s)--[a-z][\w-]*", name[0]))
                    help = helps.setdefault(name[1], command(*name[1].split(), "--help")[1])
                    assert not (missing := {flag for flag in flags if flag not in help}), f"{page.name}: {line}: {missing}"
