"""The command: what it prints, in which order, and how soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.paths import GOLDEN, ROOT

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.cli import COMMANDS

MODEL = GOLDEN / "pg2"
IMAGE = str(GOLDEN / "image.png")
NEW_TOKENS = 6
TWO_IMAGES = "<image>the cat<image> and the dog"


@pytest.fixture(scope="module")
def predictor():
    return pg.load(MODEL)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("images") / "rotated.png"
    Image.open(IMAGE).transpose(Image.Transpose.ROTATE_90).save(path)
    return str(path)


@pytest.fixture
def generate(command):
    """Run `generate` and return the lines of stdout; nothing may be on stderr."""

    def run(*arguments, model=MODEL, max_new_tokens=NEW_TOKENS):
        options = ("--model", model, "--max-new-tokens", max_new_tokens)
        code, out, err = command("generate", *options, *arguments)
        assert (code, err) == (0, "") and out.endswith("\n")
        return out[:-1].split("\n")

    return run


def test_one_image_and_one_prompt(generate, predictor):
    lines = generate("--image", IMAGE, "--prompt", "caption en")
    assert lines == predictor.generate(IMAGE, "caption en", NEW_TOKENS)


def test_images_and_prompts_are_paired_in_order(generate, predictor, rotated):
    """Pairs are one image per prompt, one image for all prompts, or one prompt for all images."""
    images, prompts = [IMAGE, rotated], ["caption en", "what color is this"]
    for own_images, own_prompts in (
        (images, prompts),
        (images[:1], prompts),
        (images, prompts[:1]),
    ):
        lines = generate("--image", *own_images, "--prompt", *own_prompts)
        paired = (own_images * 2)[:2], (own_prompts * 2)[:2]
        assert lines == predictor.generate(*paired, NEW_TOKENS)


def test_placeholders_share_out_the_images(generate, predictor, rotated):
    images, prompts = [IMAGE, rotated, IMAGE], [TWO_IMAGES, "<image>the car"]
    lines = generate("--image", *images, "--prompt", *prompts)
    assert lines == predictor.generate(images, prompts, NEW_TOKENS)
    prompt = "<image> caption en"  # one placeholder is still one image per prompt
    lines = generate("--image", IMAGE, rotated, "--prompt", prompt)
    assert lines == predictor.generate([IMAGE, rotated], [prompt] * 2, NEW_TOKENS)


def test_transparency_is_left_to_the_checkpoint(generate, tmp_path, monkeypatch):
    """Its image settings decide whether a transparent color becomes white."""
    from PIL import Image

    from paligemma_jax.inference.answer import Answer
    from paligemma_jax.processing.image import load_image

    file, passed = str(tmp_path / "key.png"), []
    Image.new("RGB", (8, 8), "red").save(file, transparency=(255, 0, 0))

    def answers(self, images, prompts, **options):
        passed.extend(images[0])
        return [Answer("red", [], [], 0.0)]

    monkeypatch.setattr(pg.Predictor, "answers", answers)
    assert generate("--image", file, "--prompt", "what color is this") == ["red"]
    for on_white, color in ((True, (255, 255, 255)), (False, (255, 0, 0))):
        for source in (file, passed[0]):
            assert load_image(source, on_white).getpixel((0, 0)) == color


def test_json_is_one_object_per_line(generate, predictor, rotated):
    """Objects come in the order of the prompts, with newlines and quotes in strings."""
    images = [IMAGE, rotated, IMAGE]
    prompts = ['"caption"\nen', "cat 😀", '"caption"\nen']
    lines = generate("--json", "--image", *images, "--prompt", *prompts)
    answers = predictor.generate(images, prompts, NEW_TOKENS)
    assert [json.loads(line) for line in lines] == [
        {"image": image, "prompt": prompt, "answer": answer}
        for image, prompt, answer in zip(images, prompts, answers, strict=True)
    ]


def test_alternatives_and_likely_tokens(generate, predictor):
    """Best first: a line each, or in the JSON of the best."""
    search, prompt = ("--beams", "3", "--num-return", "2"), ("--image", IMAGE, "--prompt", "ocr")
    (answer,) = predictor.answers(
        IMAGE, "ocr", NEW_TOKENS, pg.Beam(3, num_return=2), top_log_probabilities=2
    )
    (other,) = answer.alternatives
    assert generate(*prompt, *search) == [answer.text, other.text]
    (line,) = generate(*prompt, *search, "--top-log-probabilities", "2", "--json")
    record = json.loads(line)
    assert record["score"] == pytest.approx(answer.score)
    assert record["alternatives"][0]["answer"] == other.text
    assert len(record["top"]) == len(answer.tokens)
    assert [token["id"] for token in record["top"][0]] == answer.top.ids[0].tolist()
    assert record["top"][0][0]["text"] == predictor.processor.decode([answer.tokens[0]])


def test_json_lists_several_images_of_a_prompt(generate, rotated):
    prompts = [TWO_IMAGES, "<image>the car"]
    lines = generate("--json", "--image", IMAGE, rotated, IMAGE, "--prompt", *prompts)
    rows = [json.loads(line) for line in lines]
    assert [row["image"] for row in rows] == [[IMAGE, rotated], IMAGE]
    assert [row["prompt"] for row in rows] == prompts


def test_dtype_and_numerics_reach_the_model(generate):
    """Greedy tokens of a random model differ: big_vision has no sliding window."""
    arguments = ("--image", IMAGE, "--prompt", "caption en")
    for name, value in (("dtype", "bfloat16"), ("numerics", "big_vision")):
        expected = pg.load(MODEL, **{name: value}).generate(IMAGE, "caption en", 20)
        assert generate(*arguments, f"--{name}={value}", max_new_tokens=20) == expected
    assert expected != generate(*arguments, max_new_tokens=20)


def test_max_new_tokens_limits_the_answer(generate, predictor):
    arguments = ("--image", IMAGE, "--prompt", "caption en")
    short, long = (generate(*arguments, max_new_tokens=n)[0] for n in (1, NEW_TOKENS))
    assert [short] == predictor.generate(IMAGE, "caption en", 1)
    assert long.startswith(short) and long != short


@pytest.mark.parametrize(
    "flags,sampler,options",
    [
        ("--temperature 2 --top-k 40 --seed 7", pg.Sample(2.0, 40), {"seeds": [7, 8]}),
        (
            "--top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --best-of 3",
            pg.BestOf(3, pg.Sample(1.0, None, 0.9, 0.1, 1.2)),
            {"seeds": [0, 1]},
        ),
        (
            "--beams 3 --length-penalty 0.5 --min-new-tokens 4 --stop a e",
            pg.Beam(3, 0.5),
            {"min_new_tokens": 4, "stop": ["a", "e"]},
        ),
    ],
    ids=["sample", "best of", "beam"],
)
def test_flags_choose_the_sampler(generate, predictor, flags, sampler, options):
    prompts = ["caption en", "what"]
    lines = generate("--image", IMAGE, "--prompt", *prompts, *flags.split())
    assert lines == predictor.generate([IMAGE] * 2, prompts, NEW_TOKENS, sampler, **options)


@pytest.mark.parametrize(
    "flags,reason",
    [
        ("--beams 2 --temperature 0.7", "--beams cannot be combined with --temperature"),
        ("--beams 2 --best-of 3", "--beams cannot be combined with --best-of"),
        ("--length-penalty 2", "--length-penalty 2.0 requires --beams"),
        ("--num-return 2", "--num-return 2 requires --beams or --best-of"),
        ("--num-return 3 --beams 2", "num_return must be an integer from 1 to width (2), got 3"),
        ("--top-log-probabilities 2", "--top-log-probabilities requires --json"),
        ("--temperature 0", "Sample.temperature must be a finite number of at least 1e-6"),
        ("--beams 0", "Beam.width must be a positive integer, got 0"),
    ],
)
def test_contradicting_flags_are_refused_first(command, flags, reason):
    """The error is one line, raised before the checkpoint is resolved."""
    arguments = ("--model", "none", "--image", IMAGE, "--prompt", "ocr")
    code, out, err = command("generate", *arguments, *flags.split())
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_paligemma_1(generate):
    directory = GOLDEN / "pg1"
    expected = pg.load(directory).generate(IMAGE, "caption en", NEW_TOKENS)
    assert generate("--image", IMAGE, "--prompt", "caption en", model=directory) == expected


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="the checkpoint is not built yet")
def test_the_default_model_is_tiny(command):
    code, out, err = command("generate", "--image", IMAGE, "--prompt", "caption en")
    expected = pg.load("tiny").generate(IMAGE, "caption en")[0]
    assert (code, out, err) == (0, expected + "\n", "")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_fits_80_columns_and_has_examples(arguments, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for name in COMMANDS if not arguments or arguments == ["--help"] else arguments[:1]:
        assert f"Example: paligemma-jax {name} " in out


def test_help_wraps_to_the_terminal(command, monkeypatch):
    """The line breaks of the docstrings are not kept."""
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = command("generate", "--help")
    sentence = "nf4 (the decoder's projections), or a list by part, such as nf4-32-double"
    assert any(sentence in line for line in out.splitlines())


def run_python(*arguments, **options):
    options = {"capture_output": True, "text": True, "cwd": ROOT} | options
    return subprocess.run([sys.executable, *arguments], **options)


def test_python_m_is_the_same_command():
    done = run_python("-m", "paligemma_jax", "--help")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("usage: paligemma-jax")


def test_only_text_is_on_stdout(predictor):
    arguments = ("--model", MODEL, "--image", IMAGE, "--prompt", "caption en")
    done = run_python("-m", "paligemma_jax", "generate", *arguments, "--max-new-tokens", "3")
    assert done.returncode == 0
    assert done.stdout == predictor.generate(IMAGE, "caption en", 3)[0] + "\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["generate", "--bogus"]], ids=" ".join
)
def test_help_does_not_import_jax(arguments):
    """Importing it takes half a second or more."""
    code = f"""if True:
        import sys
        import paligemma_jax.cli as cli
        sys.argv[1:] = {arguments}
        try:
            cli.main()
        except SystemExit:
            pass
        assert "jax" not in sys.modules
    """
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(arguments):
    """`paligemma-jax --help | head -1` exits without an error."""
    read, write = os.pipe()
    os.close(read)
    done = run_python(
        "-m",
        "paligemma_jax",
        *arguments,
        capture_output=False,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
