"""Bad input: one clear line, a ValueError in Python, and the same line with exit code 2 on the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.paths import GOLDEN
from support.refusals import IMAGE, predictor, check_refused, check_message

import paligemma_jax as pg
from paligemma_jax.processing.tokenizer import Tokenizer


def test_names(random_directory, command):
    check_refused(command, ["'int4'", "float32, bfloat16, float16"], random_directory(), dtype="int4")
    check_refused(command, ["'pytorch'", "transformers, big_vision"], GOLDEN / "pg2", numerics="pytorch")


def test_source(tmp_path, command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_refused(command, ["is a file", "directory"], str(IMAGE))
    check_refused(command, ["has no config.json"], tmp_path)
    for nowhere in ("absent", "./absent", "a/b/c", "~nobody/absent"):
        check_refused(command, ["no such checkpoint", nowhere, "tiny", "hub id"], nowhere)
    for nowhere in ("some body/pali gemma", "google/no-such-paligemma"):
        check_refused(command, [nowhere, "cannot be downloaded"], nowhere)


def hub_errors():
    """Every error of huggingface_hub, and of network and disk below it; made without their constructors, which want responses."""
    from huggingface_hub import errors

    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)]
    return [cls.__new__(cls, "what went wrong\nand more") for cls in (*classes, ConnectionError, TimeoutError, OSError, RuntimeError)]


def test_hub(command, monkeypatch):
    import huggingface_hub

    known = {"GatedRepoError": "gated", "RepositoryNotFoundError": "does not exist"}
    for error in hub_errors():
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        parts = ["google/paligemma2-3b-pt-224", known.get(type(error).__name__, "cannot be downloaded")]
        check_refused(command, parts, "google/paligemma2-3b-pt-224")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(GOLDEN))  # what was downloaded is no checkpoint
    check_refused(command, ["no config.json"], "google/siglip")


def test_without_huggingface_hub(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    check_refused(command, ["google/x", "pip install 'paligemma-jax[hub]'"], "google/x")




TWO = str(IMAGE), str(IMAGE)
# images, prompts, parts of the message in Python, parts on the command line (where it pairs images and prompts itself)
INPUTS = {
    "no such image": ("absent.png", ["caption en"], ["absent.png"]),
    "a prompt for an image": ("what " * 80, ["caption en"], ["no image file"]),
    "a directory for an image": (str(GOLDEN), ["caption en"], ["no image file"]),
    "not an image": (__file__, ["caption en"], [Path(__file__).name, "no image"]),
    "truncated image": ("cut.png", ["caption en"], ["cut.png", "in full"]),
    "no prompt": (str(IMAGE), [], ["no prompt"]),
    "no image": ([], ["caption en"], ["no image"]),
    "image count": (TWO, ["a", "b", "c"], ["2 prompts", "3 prompts"], ["2 images", "3 prompts"]),
    "placeholder count": (TWO, ["<image>a<image>b<image>"], ["2 images", "[3]"], ["2 images", "3", "<image>"]),
    "mixed batch": (TWO, ["<image>a", "b"], ["prompt 1", "every prompt or"]),
    "longer than the context": (str(IMAGE), ["cat " * 9000], ["prompt 0", "context is 8192"]),
    "not Unicode": (str(IMAGE), ["a\udcff"], ["surrogate", "UTF-8"]),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case, command, tmp_path, monkeypatch):
    images, prompts, parts, *others = INPUTS[case]
    monkeypatch.chdir(tmp_path)
    Path("cut.png").write_bytes(IMAGE.read_bytes()[:5000])
    with pytest.raises(ValueError) as error:
        predictor().generate(images, prompts, 4)
    check_message(str(error.value), parts)
    flat = [images] if isinstance(images, str) else images
    code, out, err = command("generate", "--model", GOLDEN / "pg2", "--image", *flat, "--prompt", *prompts)
    assert (code, out) == (2, "") and err.startswith("paligemma-jax: ")
    check_message(err[:-1], others[0] if others else parts)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 4.0}, {"max_new_tokens": "4"}, {"max_new_tokens": True}, {"batch_size": 2.5}, {"min_new_tokens": 1.0}]
)
def test_no_whole_number(options):
    with pytest.raises(ValueError) as error:
        predictor().generate(IMAGE, "caption en", **options)
    check_message(str(error.value), [f"{next(iter(options))} is {next(iter(options.values()))!r}"])


@pytest.mark.parametrize("new", [0, -1, 8192])
def test_max_new_tokens(new, command):
    with pytest.raises(ValueError) as error:
        predictor().generate(IMAGE, "caption en", new)
    check_message(str(error.value), [f"max_new_tokens is {new}", "1 to 81"])
    code, out, err = command("generate", "--model", GOLDEN / "pg2", "--image", IMAGE, "--prompt", "caption en", "--max-new-tokens", new)
    assert (code, out, err) == (2, "", f"paligemma-jax: {error.value}\n")


SEEDS = [([1, 2, 3], "3 seeds for 1 prompts"), ([2**40], "32 bits"), ([1.5], "32 bits"), (["a"], "32 bits"), ([True], "32 bits")]
SEEDS += [(7, "seeds is 7: pass a list"), ("7", "seeds is '7'"), ([[7]], "pass a list")]


@pytest.mark.parametrize("seeds,part", SEEDS)
def test_seeds(seeds, part):
    with pytest.raises(ValueError, match=part):
        predictor().generate(IMAGE, "caption en", 4, pg.Sample(), seeds=seeds)


SAMPLE = [{"temperature": t} for t in (0, -1, 1e-40, float("nan"), float("inf"))] + [{"top_k": 0}, {"top_k": 1.5}, {"top_p": 0}, {"min_p": 2}]
SAMPLE += [{"temperature": "hot"}, {"top_k": True}, {"top_p": "0.9"}, {"repetition_penalty": None}, {"repetition_penalty": float("inf")}]


@pytest.mark.parametrize("setting", SAMPLE, ids=str)
def test_sampler(setting):
    with pytest.raises(ValueError, match=rf"Sample\({next(iter(setting))}=.* makes no sense"):
        pg.Sample(**setting)


OTHER = [
    (lambda: pg.Beam(width=2.5), "width=2.5"),
    (lambda: pg.Beam(length_penalty=float("nan")), "length_penalty=nan"),
    (lambda: pg.BestOf(3, pg.Greedy()), "among samples"),
    (lambda: pg.BestOf("3"), "width='3'"),
    (lambda: predictor().generate(IMAGE, "caption en", 4, "greedy"), r"sampler is 'greedy': pass Greedy\(\)"),
    (lambda: list(predictor().stream(IMAGE, "caption en", 4, pg.Beam(2))), "what is streamed is final"),
    (lambda: list(predictor().stream(IMAGE, "caption en", 4, seed="a")), "32 bits"),
    (lambda: list(predictor().stream(IMAGE, "caption en", 4.5)), "max_new_tokens is 4.5"),
]


@pytest.mark.parametrize("ask,part", OTHER, ids=[part for _, part in OTHER])
def test_other_samplers(ask, part):
    with pytest.raises(ValueError, match=part):
        ask()


def test_score_without_suffixes():
    with pytest.raises(ValueError, match="no suffixes"):
        predictor().score(IMAGE, "caption en", None)


def test_inputs_made_by_hand():
    """What a compiled program would clip in silence: ids beyond the table, image tokens that do not match the images."""
    inputs = predictor().processor(IMAGE, "caption en")
    for tokens, part in [(inputs.tokens + 10**5, "outside the vocabulary of 1600"), (-1 - inputs.tokens, "outside the vocabulary")]:
        with pytest.raises(ValueError, match=part):
            predictor().logits(replace(inputs, tokens=tokens))
    with pytest.raises(ValueError, match="16 image tokens for 2 images of 16 each"):
        predictor().stages(replace(inputs, images=inputs.images.repeat(2, axis=0)))


def test_unreadable_tokenizer(monkeypatch):
    """Permissions, which a test run by root cannot take away."""
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match=r"cannot read the tokenizer.*Permission denied"):
        Tokenizer(GOLDEN / "pg2" / "tokenizer.model")


OTHERS = [
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "out of memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "out of memory"),  # jax's
    (PermissionError(13, "Permission denied", "x/config.json"), 2, "x/config.json: Permission denied"),
    (OSError("the disk is gone"), 2, "the disk is gone"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "invalid start byte"),
]


@pytest.mark.parametrize("error,code,part", OTHERS, ids=[type(error).__name__ for error, *_ in OTHERS])
def test_other_exceptions(error, code, part, command, monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.loading.load", lambda *_, **__: (_ for _ in ()).throw(error))
    found, out, err = command("generate", "--image", IMAGE, "--prompt", "a")
    assert (found, out) == (code, "") and err.startswith("paligemma-jax: ") and err.endswith("\n")
    check_message(err[:-1], [part])


def test_our_own_mistakes_keep_their_traceback(command, monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.loading.load", lambda *_, **__: 1 + "1")
    with pytest.raises(TypeError):
        command("generate", "--image", IMAGE, "--prompt", "a")


USAGE = {
    "unknown subcommand": (["generat"], "generate"),
    "unknown flag": (["generate", "--image", "a", "--prompt", "b", "--bogus", "1"], "--bogus"),
    "missing flag": (["generate", "--image", "a"], "--prompt"),
    "missing value": (["generate", "--image", "a", "--prompt", "b", "--max-new-tokens"], "--max-new-tokens"),
    "not a number": (["generate", "--image", "a", "--prompt", "b", "--max-new-tokens", "many"], "many"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case, command, monkeypatch):
    """tyro's own errors: on stderr, at most 80 columns wide, with the way to the help."""
    monkeypatch.setenv("COLUMNS", "80")
    arguments, part = USAGE[case]
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and part in err and "--help" in err and "Traceback" not in err
    assert max(map(len, err.splitlines())) <= 80


@pytest.mark.parametrize("model,image,part", [("absent", IMAGE, "no such checkpoint"), (GOLDEN / "pg2", "absent.png", "no image file")])
def test_in_a_process_of_its_own(model, image, part):
    arguments = [sys.executable, "-m", "paligemma_jax", "generate", "--model", model, "--image", image, "--prompt", "a"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("paligemma-jax: ") and part in done.stderr and done.stderr.count("\n") == 1
