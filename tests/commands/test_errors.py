"""Bad input: one clear line, a ValueError in Python, and the same line with exit code 2 on the
command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.paths import GOLDEN
from support.refusals import IMAGE, check_message, check_refused, predictor

import paligemma_jax as pg
from paligemma_jax.processing.tokenizer import Tokenizer


def raising(error):
    """A function that raises `error`, whatever it is called with."""

    def function(*args, **kwargs):
        raise error

    return function


def test_unknown_names_are_refused(random_directory, command):
    names = ["'int4'", "float32, bfloat16, float16"]
    check_refused(command, names, random_directory(), dtype="int4")
    names = ["'pytorch'", "transformers, big_vision"]
    check_refused(command, names, GOLDEN / "pg2", numerics="pytorch")


def test_unknown_checkpoints_are_refused(tmp_path, command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_refused(command, ["is a file", "directory"], str(IMAGE))
    check_refused(command, ["has no config.json"], tmp_path)
    for reference in ("absent", "./absent", "a/b/c", "~root/absent"):
        parts = ["no such checkpoint", reference, "tiny", "hub id"]
        check_refused(command, parts, reference)
    check_refused(command, ["~nosuchuser/x: no such user: nosuchuser"], "~nosuchuser/x")
    for reference in ("some body/pali gemma", "google/no-such-paligemma"):
        check_refused(command, [reference, "cannot be downloaded"], reference)


def hub_errors():
    """Make every error of huggingface_hub, and of the network and disk below it.

    Skips the constructors, which require responses.
    """
    from huggingface_hub import errors

    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    classes += [ConnectionError, TimeoutError, OSError, RuntimeError]
    return [cls.__new__(cls, "what went wrong\nand more") for cls in classes]


def test_hub_errors_are_one_line(command, monkeypatch):
    import huggingface_hub

    repo = "google/paligemma2-3b-pt-224"
    reasons = {"GatedRepoError": "gated", "RepositoryNotFoundError": "does not exist"}
    for error in hub_errors():
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
        reason = reasons.get(type(error).__name__, "cannot be downloaded")
        check_refused(command, [repo, reason], repo)


def test_a_download_that_is_no_checkpoint_is_refused(command, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(GOLDEN))
    check_refused(command, ["no config.json"], "google/siglip")


def test_a_hub_id_requires_the_hub_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    check_refused(command, ["google/x", "pip install 'paligemma-jax[hub]'"], "google/x")


TWO = str(IMAGE), str(IMAGE)
# Images, prompts, parts of the message in Python, and on the command line if it differs there,
# where images and prompts are paired first.
INPUTS = {
    "no such image": ("absent.png", ["caption en"], ["absent.png"]),
    "a prompt for an image": ("what " * 80, ["caption en"], ["no image file"]),
    "a directory for an image": (str(GOLDEN), ["caption en"], ["no image file"]),
    "not an image": (__file__, ["caption en"], [Path(__file__).name, "is not an image"]),
    "truncated image": ("cut.png", ["caption en"], ["cut.png", "completely", "truncated"]),
    "no prompt": (str(IMAGE), [], ["no prompt"]),
    "image count": (TWO, ["a", "b", "c"], ["2 images", "3 prompts"]),
    "placeholder count": (
        TWO,
        ["<image>a<image>b<image>"],
        ["2 images", "[3]"],
        ["2 images", "3", "<image>"],
    ),
    "mixed batch": (TWO, ["<image>a", "b"], ["prompt 1", "every prompt or"]),
    "longer than the context": (str(IMAGE), ["cat " * 9000], ["prompt 0", "context is 8192"]),
    "not Unicode": (str(IMAGE), ["a\udcff"], ["surrogate", "UTF-8"]),
}


@pytest.mark.parametrize("case", INPUTS)
def test_bad_images_and_prompts_are_refused(case, command, tmp_path, monkeypatch):
    images, prompts, parts, *command_parts = INPUTS[case]
    monkeypatch.chdir(tmp_path)
    Path("cut.png").write_bytes(IMAGE.read_bytes()[:5000])
    with pytest.raises(ValueError) as error:
        predictor().generate(images, prompts, 4)
    check_message(str(error.value), parts)
    files = [images] if isinstance(images, str) else images
    arguments = ("--model", GOLDEN / "pg2", "--image", *files, "--prompt", *prompts)
    code, out, err = command("generate", *arguments)
    assert (code, out) == (2, "") and err.startswith("paligemma-jax: ")
    check_message(err[:-1], command_parts[0] if command_parts else parts)


@pytest.mark.parametrize(
    "name,value",
    [
        ("max_new_tokens", 4.0),
        ("max_new_tokens", "4"),
        ("max_new_tokens", True),
        ("batch_size", 2.5),
        ("min_new_tokens", 1.0),
    ],
)
def test_counts_must_be_integers(name, value):
    with pytest.raises(ValueError) as error:
        predictor().generate(IMAGE, "caption en", **{name: value})
    check_message(str(error.value), [f"{name} must be an integer", f"got {value!r}"])


@pytest.mark.parametrize(
    "new,parts",
    [(0, ["at least 1", "got 0"]), (-1, ["at least 1", "got -1"]), (8192, ["1 to 81", "got 8192"])],
)
def test_max_new_tokens_must_fit_the_context(new, parts, command):
    with pytest.raises(ValueError) as error:
        predictor().generate(IMAGE, "caption en", new)
    check_message(str(error.value), ["max_new_tokens must be", *parts])
    arguments = ("--model", GOLDEN / "pg2", "--image", IMAGE, "--prompt", "caption en")
    code, out, err = command("generate", *arguments, "--max-new-tokens", new)
    assert (code, out, err) == (2, "", f"paligemma-jax: {error.value}\n")


@pytest.mark.parametrize(
    "seeds,part",
    [
        ([1, 2, 3], "seeds must be one per prompt, got 3 for 1 prompts"),
        ([2**40], f"32-bit integers, got {2**40}"),
        ([1.5], "32-bit integers, got 1.5"),
        (["a"], "32-bit integers, got 'a'"),
        ([True], "32-bit integers, got True"),
        (7, "seeds must be a list with one integer per prompt, got 7"),
        ("7", "seeds must be a list with one integer per prompt, got '7'"),
        ([[7]], "seeds must be a list with one integer per prompt"),
    ],
)
def test_seeds_must_be_a_list_of_32_bit_integers(seeds, part):
    with pytest.raises(ValueError, match=part):
        predictor().generate(IMAGE, "caption en", 4, pg.Sample(), seeds=seeds)


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", 0),
        ("temperature", -1),
        ("temperature", 1e-40),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", "0.9"),
        ("min_p", 2),
        ("repetition_penalty", None),
        ("repetition_penalty", float("inf")),
    ],
)
def test_invalid_sampling_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"Sample\.{name} must be .*, got {value!r}"):
        pg.Sample(**{name: value})


SAMPLERS = [
    (lambda: pg.Beam(width=2.5), "Beam.width must be a positive integer, got 2.5"),
    (
        lambda: pg.Beam(length_penalty=float("nan")),
        "Beam.length_penalty must be a finite number, got nan",
    ),
    (lambda: pg.BestOf(3, pg.Greedy()), r"BestOf.sampler must be Sample\(...\) or .*, got Greedy"),
    (lambda: pg.BestOf("3"), "BestOf.width must be a positive integer, got '3'"),
    (
        lambda: pg.Beam(4, num_return=5),
        r"Beam.num_return must be an integer from 1 to width \(4\), got 5",
    ),
    (lambda: pg.BestOf(4, num_return=0), "BestOf.num_return must be an integer from 1 .* got 0"),
    (lambda: pg.DecodingOptions(top_log_probabilities=-1), "must be an integer of at least 0"),
    (
        lambda: predictor().answers(IMAGE, "ocr", top_log_probabilities=2000),
        "top_log_probabilities must be at most 1600, the size of the vocabulary, got 2000",
    ),
    (lambda: pg.DecodingOptions(logits=1), "logits must be True or False, got 1"),
    (
        lambda: pg.DecodingOptions(sampler=pg.Beam(2), logits=True),
        "logits must be False with Beam, .* use top_log_probabilities",
    ),
    (lambda: pg.DecodingOptions(stop=3), "stop must be a non-empty text, a function .*, got 3"),
    (
        lambda: predictor().generate(IMAGE, "caption en", 4, "greedy"),
        r"sampler must be Greedy\(\), .*, got 'greedy'",
    ),
    (
        lambda: list(predictor().stream(IMAGE, "caption en", 4, pg.Beam(2))),
        "for streaming, because text that was streamed cannot change",
    ),
    (lambda: list(predictor().stream(IMAGE, "caption en", 4, seed="a")), "32-bit integers"),
    (
        lambda: list(predictor().stream(IMAGE, "caption en", 4.5)),
        "max_new_tokens must be an integer of at least 1, got 4.5",
    ),
]


@pytest.mark.parametrize("call,part", SAMPLERS, ids=[part for _, part in SAMPLERS])
def test_invalid_samplers_are_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_score_requires_suffixes():
    with pytest.raises(ValueError, match="no suffixes"):
        predictor().score(IMAGE, "caption en", None)


def test_handmade_inputs_are_checked():
    """Checks for values that a compiled program would clip silently: ids beyond the table, and
    image tokens that do not match the images."""
    inputs = predictor().processor(IMAGE, "caption en")
    for tokens, part in [
        (inputs.tokens + 10**5, "outside the vocabulary of 1600"),
        (-1 - inputs.tokens, "outside the vocabulary"),
    ]:
        with pytest.raises(ValueError, match=part):
            predictor().logits(replace(inputs, tokens=tokens))
    with pytest.raises(ValueError, match=r"2 images need 32 image tokens \(16 each\), got 16"):
        predictor().stages(replace(inputs, images=inputs.images.repeat(2, axis=0)))


def test_an_unreadable_tokenizer_is_refused(monkeypatch):
    """Simulates missing permissions, which do not stop a test run by root."""
    monkeypatch.setattr(Path, "read_bytes", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match=r"cannot read the tokenizer.*Permission denied"):
        Tokenizer(GOLDEN / "pg2" / "tokenizer.model")


EXCEPTIONS = [
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "out of memory"),
    # jax's
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "out of memory"),
    (
        PermissionError(13, "Permission denied", "x/config.json"),
        2,
        "x/config.json: Permission denied",
    ),
    (OSError("the disk is gone"), 2, "the disk is gone"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "invalid start byte"),
]


@pytest.mark.parametrize(
    "error,code,part", EXCEPTIONS, ids=[type(error).__name__ for error, *_ in EXCEPTIONS]
)
def test_other_user_errors_are_one_line(error, code, part, command, monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.loading.load", raising(error))
    exit_code, out, err = command("generate", "--image", IMAGE, "--prompt", "a")
    assert (exit_code, out) == (code, "")
    assert err.startswith("paligemma-jax: ") and err.endswith("\n")
    check_message(err[:-1], [part])


def test_bugs_keep_their_traceback(command, monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.loading.load", raising(TypeError("a bug")))
    with pytest.raises(TypeError):
        command("generate", "--image", IMAGE, "--prompt", "a")


@pytest.mark.parametrize(
    "arguments,part",
    [
        (["generat"], "generate"),
        (["generate", "--image", "a", "--prompt", "b", "--bogus", "1"], "--bogus"),
        (["generate", "--image", "a"], "--prompt"),
        (["generate", "--image", "a", "--prompt", "b", "--max-new-tokens"], "--max-new-tokens"),
        (["generate", "--image", "a", "--prompt", "b", "--max-new-tokens", "many"], "many"),
    ],
    ids=["unknown subcommand", "unknown flag", "missing flag", "missing value", "not a number"],
)
def test_usage_errors_fit_80_columns_and_name_the_help(arguments, part, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and part in err and "--help" in err and "Traceback" not in err
    assert max(map(len, err.splitlines())) <= 80


@pytest.mark.parametrize(
    "model,image,part",
    [("absent", IMAGE, "no such checkpoint"), (GOLDEN / "pg2", "absent.png", "no image file")],
)
def test_errors_in_a_process_of_its_own(model, image, part):
    arguments = ["generate", "--model", model, "--image", image, "--prompt", "a"]
    command = [sys.executable, "-m", "paligemma_jax", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("paligemma-jax: ")
    assert part in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags,part",
    [
        (["--beams", 2, "--length-penalty", "1e308"], "Beam.length_penalty must be from -18.3 to"),
        (["--beams", 100_000_000], "1 prompts with 100000000 candidates each need"),
        (["--best-of", 100_000_000], "use fewer beams or samples, a smaller batch"),
    ],
)
def test_what_cannot_fit_or_overflows_is_refused(flags, part, command):
    arguments = ("--model", GOLDEN / "pg2", "--image", IMAGE, "--prompt", "caption en")
    code, out, err = command("generate", *arguments, *flags)
    assert (code, out) == (2, "")
    check_message(err[:-1], [part])
