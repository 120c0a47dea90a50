"""The README's Python runs as it is written, and its commands parse."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python(monkeypatch, capsys):
    """All blocks in order, in one namespace, from the root of the repository; results that are written beside a call are true."""
    monkeypatch.chdir(ROOT)
    names = {"photos": ["paligemma_jax/assets/digits.jpg"] * 3}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
        for call, shown in re.findall(r"^(predictor\..*?)  # (\[.*\])$", block, re.MULTILINE):
            assert eval(call, names) == eval(shown)
    assert "four digits" in capsys.readouterr().out


def test_the_first_command_says_what_is_shown(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = next(line for line in blocks("bash")[0].splitlines() if "paligemma-jax generate" in line)
    arguments = re.findall(r'"[^"]*"|\S+', line.split("paligemma-jax ", 1)[1])
    code, out, _ = command(*(argument.strip('"') for argument in arguments))
    shown = re.search(r"```\n(four digits.*?)```", README, re.DOTALL)
    assert code == 0 and shown and out == shown.group(1)


def test_every_convert_option_exists():
    from convert.__main__ import parser

    options = {flag for action in parser()._actions for flag in action.option_strings}
    for block in blocks("bash"):
        for line in block.splitlines():
            if line.startswith("python -m convert") and "inspect" not in line:
                assert set(re.findall(r"--[a-z-]+", line.split("#")[0])) <= options
