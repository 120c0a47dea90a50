"""This model against logits that releases of transformers computed, and saved in a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.engine_checkpoint import write_checkpoint
from support.paths import GOLDEN

FLOAT32 = GOLDEN / "engines" / "logits-5.3.0-float32.npz"
BFLOAT16 = GOLDEN / "engines" / "logits-4.52.4-bfloat16.npz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("against") / "checkpoint")


@pytest.fixture
def compare(command, checkpoint):
    def run(*arguments):
        return command("parity", "--model", checkpoint, *arguments)

    return run


def changed(folder, change):
    """A copy of FLOAT32 whose logits are changed in place."""
    with np.load(FLOAT32) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(folder / "changed.npz", **arrays)
    return folder / "changed.npz"


@pytest.mark.parametrize(
    ("file", "profile"), [(FLOAT32, "transformers-5.0"), (BFLOAT16, "transformers-4.52")]
)
def test_the_profile_of_the_release_is_within_tolerance(compare, file, profile):
    code, out, err = compare("--against", file, "--numerics", profile)
    assert (code, err) == (0, "") and "100.00% of 60 tokens" in out
    assert out.endswith(f"within tolerance of the profile {profile}\n")


def test_another_profile_diverges_and_hints_at_identify(compare):
    """The checkpoint's profile is that of a later release, which has a final softcap."""
    code, out, err = compare("--against", FLOAT32)
    assert code == 1 and "with the numerics of transformers\n" in out
    assert "diverge from row 0, token 0 on; --identify names the program" in err


def test_the_first_token_over_the_limit_is_named(compare, tmp_path):
    def change(arrays):
        arrays["logits"][1, 7:] += 1

    file = changed(tmp_path, change)
    code, out, _ = compare("--against", file, "--numerics", "transformers-5.0", "--json")
    report = json.loads(out)
    assert code == 1 and report["first_divergence"] == [1, 7]
    assert report["error"]["max"] == pytest.approx(1, abs=1e-4) and report["equal_tokens"] == 1


def test_pads_are_left_out(compare, tmp_path):
    def change(arrays):
        arrays["valid"][1, 28:] = 0
        arrays["logits"][1, 28:] = 99

    file = changed(tmp_path, change)
    code, out, _ = compare("--against", file, "--numerics", "transformers-5.0")
    assert code == 0 and "100.00% of 58 tokens" in out


def test_the_page_names_profile_and_divergence(compare, tmp_path):
    page = tmp_path / "page.html"
    code, _, _ = compare("--against", FLOAT32, "--numerics", "transformers-5.0", "--html", page)
    html = page.read_text()
    assert code == 0 and 'class="verdict good"' in html and "<li>no final softcap<" in html
    code, _, _ = compare("--against", FLOAT32, "--html", page)
    html = page.read_text()
    assert code == 1 and 'class="verdict bad"' in html and "This is the default profile" in html
    assert html.count("data:image/png;base64,") == 1 and "http" not in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "missing.npz"), "missing.npz does not exist"),
        (("--against", GOLDEN / "engines" / "keras.npz"), "must have logits, got decode, labels"),
        (("--against", FLOAT32, "--dtype", "bfloat16"), "cannot be combined with --dtype"),
        (("--against", FLOAT32, "--prompt", "ocr"), "cannot be combined with --prompt"),
        (("--against", FLOAT32, "--numerics", "jax"), "numerics must be one of"),
        (("--against", FLOAT32, "--html", "missing/page.html"), "missing"),
        (("--against", "big_vision=missing"), "must be a checkout of big_vision with"),
        (("--against", "keras-hub==0.32.0", "--gradients"), "cannot be combined with --gradients"),
        (("--against", "torch==2.13.0"), "keras-hub==VERSION or big_vision=DIR, got 'torch==2.13"),
        (("--python", "python"), "--python needs --against NAME==VERSION or big_vision=CHECKOUT"),
    ],
)
def test_wrong_arguments_are_one_sentence(compare, arguments, message):
    code, out, err = compare(*arguments)
    assert code == 2 and not out and message in err and err.count("\n") == 1
