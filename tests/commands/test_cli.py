"""The command: what it prints, in which order, and how soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.cli import COMMANDS

MODEL = ROOT / "tests" / "golden" / "pg2"
A = str(ROOT / "tests" / "golden" / "image.png")
NEW = 6


@pytest.fixture(scope="module")
def predictor():
    return pg.load(MODEL)


@pytest.fixture(scope="module")
def B(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("images") / "turned.png"
    Image.open(A).transpose(Image.Transpose.ROTATE_90).save(path)
    return str(path)


@pytest.fixture
def generate(command):
    """Arguments -> the lines that the subcommand prints, all of stdout; nothing may be on stderr."""

    def run(*arguments, model=MODEL, new=NEW):
        code, out, err = command("generate", "--model", model, "--max-new-tokens", new, *arguments)
        assert (code, err) == (0, "") and out.endswith("\n")
        return out[:-1].split("\n")

    return run


def test_one_image_one_prompt(generate, predictor):
    assert generate("--image", A, "--prompt", "caption en") == predictor.generate(A, "caption en", NEW)


def test_pairs(generate, predictor, B):
    """One image for each prompt, one for all prompts, one prompt for all images: in the order given."""
    prompts = ["caption en", "what color is this"]
    assert generate("--image", A, B, "--prompt", *prompts) == predictor.generate([A, B], prompts, NEW)
    assert generate("--image", A, "--prompt", *prompts) == predictor.generate([A, A], prompts, NEW)
    assert generate("--image", A, B, "--prompt", prompts[0]) == predictor.generate([A, B], prompts[:1] * 2, NEW)


def test_placeholders(generate, predictor, B):
    both = ["<image>the cat<image> and the dog", "<image>the car"]
    assert generate("--image", A, B, A, "--prompt", *both) == predictor.generate([A, B, A], both, NEW)
    spaced = "<image> caption en"  # one placeholder is still one image a prompt
    assert generate("--image", A, B, "--prompt", spaced) == predictor.generate([A, B], [spaced] * 2, NEW)


def test_json(generate, predictor, B):
    """One object a line, in the order of the prompts; the image is a list where there are several. Newlines and quotes stay inside."""
    prompts = ['"caption"\nen', "<image>", "cat 😀"]
    rows = [json.loads(line) for line in generate("--json", "--image", A, B, A, "--prompt", prompts[0], prompts[2], prompts[0])]
    answers = predictor.generate([A, B, A], [prompts[0], prompts[2], prompts[0]], NEW)
    assert rows == [
        {"image": A, "prompt": prompts[0], "answer": answers[0]},
        {"image": B, "prompt": prompts[2], "answer": answers[1]},
        {"image": A, "prompt": prompts[0], "answer": answers[2]},
    ]
    both = ["<image>the cat<image> and the dog", "<image>the car"]
    rows = [json.loads(line) for line in generate("--json", "--image", A, B, A, "--prompt", *both)]
    assert [row["image"] for row in rows] == [[A, B], A] and [row["prompt"] for row in rows] == both


def test_dtype_and_numerics(generate):
    """Both reach the model. (Greedy tokens of a random model differ between big_vision and transformers: there is no window in the one.)"""
    given = ("--image", A, "--prompt", "caption en")
    for option in ({"dtype": "bfloat16"}, {"numerics": "big_vision"}):
        expected = pg.load(MODEL, **option).generate(A, "caption en", 20)
        assert generate(*given, *(f"--{name}={value}" for name, value in option.items()), new=20) == expected
    assert expected != generate(*given, new=20)


def test_max_new_tokens(generate, predictor):
    short, long = (generate("--image", A, "--prompt", "caption en", new=new)[0] for new in (1, NEW))
    assert [short] == predictor.generate(A, "caption en", 1) and long.startswith(short) and long != short


@pytest.mark.parametrize(
    "flags,sampler",
    [
        ("--temperature 2 --top-k 40 --seed 7", pg.Sample(2.0, 40)),
        ("--top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --best-of 3", pg.BestOf(3, pg.Sample(1.0, None, 0.9, 0.1, 1.2))),
        ("--beams 3 --length-penalty 0.5 --min-new-tokens 4 --stop a e", pg.Beam(3, 0.5)),
    ],
    ids=["sample", "best of", "beam"],
)
def test_how_tokens_are_chosen(generate, predictor, flags, sampler):
    said = dict(min_new_tokens=4, stop=["a", "e"]) if "--stop" in flags else dict(seeds=[7, 8] if "--seed" in flags else [0, 1])
    found = generate("--image", A, "--prompt", "caption en", "what", *flags.split())
    assert found == predictor.generate([A, A], ["caption en", "what"], NEW, sampler, **said)


@pytest.mark.parametrize(
    "flags,reason",
    [
        ("--beams 2 --temperature 0.7", "--beams and --temperature: beam search draws no samples"),
        ("--beams 2 --best-of 3", "--beams and --best-of: beam search draws no samples"),
        ("--length-penalty 2", "--length-penalty 2.0 is for beam search"),
        ("--temperature 0", "Sample(temperature=0.0) makes no sense"),
        ("--beams 0", "Beam(width=0) makes no sense"),
    ],
)
def test_contradictions(command, flags, reason):
    """Told at once, before a checkpoint is looked for, in one line."""
    code, out, err = command("generate", "--model", "none", "--image", A, "--prompt", "ocr", *flags.split())
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_paligemma_1(generate):
    directory = MODEL.parent / "pg1"
    assert generate("--image", A, "--prompt", "caption en", model=directory) == pg.load(directory).generate(A, "caption en", NEW)


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="the default checkpoint is not built yet")
def test_default_model(command):
    code, out, err = command("generate", "--image", A, "--prompt", "caption en")
    assert (code, out, err) == (0, pg.load("tiny").generate(A, "caption en")[0] + "\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help(arguments, command, monkeypatch):
    """Fits 80 columns, and shows an example of every subcommand that it tells of."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(*arguments)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    for name in COMMANDS if not arguments or arguments == ["--help"] else arguments[:1]:
        assert f"Example: paligemma-jax {name} " in out


def process(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


def test_module():
    """`python -m paligemma_jax` is the same command."""
    done = process("-m", "paligemma_jax", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: paligemma-jax") and not done.stderr


def test_text_alone_on_stdout(predictor):
    done = process("-m", "paligemma_jax", "generate", "--model", MODEL, "--image", A, "--prompt", "caption en", "--max-new-tokens", "3")
    assert done.returncode == 0 and done.stdout == predictor.generate(A, "caption en", 3)[0] + "\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["generate", "--bogus"]], ids=" ".join)
def test_help_without_jax(arguments):
    """What needs no model does not wait for jax: half a second and more."""
    code = (
        f"import sys, paligemma_jax.cli as cli\nsys.argv[1:] = {arguments}\ntry: cli.main()\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    )
    done = process("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]], ids=" ".join)
def test_closed_pipe(arguments):
    """As in `paligemma-jax --help | head -1`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "paligemma_jax", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
