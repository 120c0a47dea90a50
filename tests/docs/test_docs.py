"""The pages are true: links resolve, and code runs as written, in an empty folder.

A comment before a block marks it: `<!-- not run: reason -->`, `<!-- slow -->`,
`<!-- needs torch -->`. A block without a language after a block of commands is their output; a list
in a comment after a call in Python is its result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.pages import blocks, run_commands, run_python
from support.paths import DIGITS, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LONG_FLAG = re.compile(r"(?<=\s)--[a-z][\w-]*")
MAX_COLUMNS = 88


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(slow: bool) -> list[Path]:
    """Return the pages with slow code to run, or those with other code."""
    return [
        page
        for page in PAGES
        if any(block.runs and (block.mark == "slow") == slow for block in blocks(page))
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that a reader has: a photo, also where the README has it, and examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    Path("paligemma_jax/assets").mkdir(parents=True)
    for name in ("photo.jpg", "paligemma_jax/assets/digits.jpg"):
        shutil.copy(DIGITS, name)
    rows = [
        {"image": "photo.jpg", "prefix": "ocr", "suffix": "4 3 2 3"},
        {"image": "photo.jpg", "prefix": "answer en how many digits?", "suffix": "4"},
    ] * 4
    for name in ("train.jsonl", "val.jsonl", "in.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_page(page: Path, slow: bool, capfd, monkeypatch) -> None:
    names: dict[str, object] = {"photos": ["photo.jpg"] * 3}
    for block in blocks(page):
        if not block.runs or (block.mark == "slow" and not slow):
            continue
        if block.language == "python":
            run_python(block.code, names)
        else:
            output = run_commands(block.code, capfd, monkeypatch)
            assert not block.output or output == block.output, block.code


@pytest.mark.parametrize("page", pages_with(slow=False), ids=page_name)
def test_code_runs(page, folder, capfd, monkeypatch):
    run_page(page, False, capfd, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(slow=True), ids=page_name)
def test_slow_code_runs(page, folder, capfd, monkeypatch):
    run_page(page, True, capfd, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_is_narrow(page):
    """No block scrolls sideways on a page 1280 pixels wide."""
    fences = re.findall(r"^```.*?^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    wide = [line for fence in fences for line in fence.splitlines() if len(line) > MAX_COLUMNS]
    assert not wide


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles]
    return {title.replace(" ", "-") for title in words}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_flags_of_all_commands_exist(command):
    """Every flag is in the command's help, also of commands that are not run."""
    helps: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            lines = block.code.replace("\\\n", " ").splitlines() if block.language == "bash" else []
            for line in lines:
                line = line.split(" #")[0].replace("python -m convert ", "paligemma-jax convert ")
                match = re.search(r"paligemma-jax (\w+).*", line)
                if not match:
                    continue
                name = "convert inspect" if "convert inspect" in line else match[1]
                if name not in helps:
                    helps[name] = command(*name.split(), "--help")[1]
                missing = {flag for flag in LONG_FLAG.findall(match[0]) if flag not in helps[name]}
                assert not missing, f"{page.name}: {line}: {missing}"


def test_files_of_the_architecture_page_exist():
    names = {
        file.name for root in ("paligemma_jax", "convert") for file in (ROOT / root).rglob("*")
    }
    mentioned = re.findall(r"`(?:\w+/)?(\w+(?:\.py|/))`", (DOCS / "architecture.md").read_text())
    assert len(mentioned) > 20
    assert {name.removesuffix("/") for name in mentioned} <= names | {
        "convert",
        "paligemma_jax",
        "test_layering.py",
    }


def test_drawn_packages_import_downward_or_to_the_right():
    """Every import of a package follows the drawing in docs/images/packages.svg."""
    drawing = (DOCS / "images" / "packages.svg").read_text()
    places = {
        name: (float(y), float(x))
        for x, y, names in re.findall(r'class="package" x="([\d.]+)" y="(\d+)">([^<]+)<', drawing)
        for name in names.split(", ")
    }
    source = ROOT / "paligemma_jax"
    packages = {
        name: sorted((source / name).glob("*.py")) or [source / f"{name}.py"] for name in places
    }
    packages["convert"] = [
        file for file in (ROOT / "convert").glob("*.py") if file.stem != "__main__"
    ]
    folders = {file.parent.name for file in source.glob("*/*.py")}
    assert folders <= set(places)
    for package, files in packages.items():
        code = "\n".join(file.read_text() for file in files)
        for name in re.findall(
            r"^\s*from (?:paligemma_jax\.)?(\w+)\b.* import ", code, re.MULTILINE
        ):
            if name in places and name != package and not {name, package} <= {"cli", "commands"}:
                assert places[name] > places[package], f"{package} imports {name}"
