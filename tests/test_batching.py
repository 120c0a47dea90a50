"""Many prompts at once: order, buckets, images encoded once, errors by row, streaming; on the embedded default."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.checkpoint import TINY
from paligemma_jax.inference import batching, generate
from paligemma_jax.inference.sampling import Beam, Sample

PHOTO = str(TINY.parent / "digits.jpg")
TASKS = ["caption en", "ocr", "answer en how many digits?", *(f"detect {d}" for d in range(10))]


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def photos():
    """Forty crops of the photo: forty different images."""
    photo = Image.open(PHOTO)
    return [photo.crop((i, i // 2, 640 - 2 * i, 480 - i)) for i in range(40)]


def test_thousands_keep_their_order(tiny, photos):
    """1,000 prompts of mixed lengths give what each gives alone, in their order."""
    images = [photos[i * 7 % 40] for i in range(1000)]
    prompts = [TASKS[i % 13] + (" " + "and so on" * (i % 5) if i % 3 == 0 else "") for i in range(1000)]
    found = tiny.generate(images, prompts, 12, batch_size=32)
    for i in range(0, 1000, 71):
        assert tiny.generate(images[i], prompts[i], 12) == [found[i]], i


def test_images_are_opened_and_encoded_once(tiny, photos):
    images = [photos[i % 3] for i in range(12)]
    with mock.patch.object(batching, "encode_images", side_effect=generate.encode_images) as encode, mock.patch.object(
        batching, "pixels", side_effect=batching.pixels
    ) as opened:  # fmt: skip
        tiny.generate(images, [TASKS[i] for i in range(12)], 4, batch_size=4)
    assert opened.call_count == 3
    assert sum(len(call.args[1]) for call in encode.call_args_list) in (3, 4)  # filled up to a power of two


def test_nothing_is_kept_after_its_last_use(tiny, photos):
    kept = []

    class Watched(batching.Images):
        def forget(self, images):
            super().forget(images)
            kept.append((len(self.encoded), len(self.opened)))

    with mock.patch.object(batching, "Images", Watched):
        tiny.generate(photos, ["ocr"] * 40, 4, batch_size=4)
    assert kept[-1] == (0, 0) and max(encoded for encoded, _ in kept) == 0 and max(opened for _, opened in kept) <= 4 * batching.AHEAD


def test_a_new_length_within_a_bucket_compiles_nothing(tiny):
    tiny.generate(PHOTO, "ocr", 20)
    before = [program._cache_size() for program in (generate.prefill, generate.decode, generate.encode_images)]
    for prompt, new in (("caption en", 32), ("answer en how many digits?", 1), ("detect 3", 17)):
        tiny.generate(PHOTO, prompt, new)
    assert [program._cache_size() for program in (generate.prefill, generate.decode, generate.encode_images)] == before


def test_several_images_in_one_prompt(tiny, photos):
    """Batched by their number, beside prompts with one."""
    images = [[photos[0], photos[1]], [photos[2]], [photos[3], photos[4]], [photos[5]]]
    found = tiny.generate(images, ["ocr"] * 4, 8)
    assert [tiny.generate([group], ["ocr"], 8)[0] for group in images] == found


def test_an_image_that_fails_is_told_and_the_others_finish(tiny, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(PHOTO).read_bytes()[:5000])
    images = [photos[i % 40] for i in range(1000)]
    images[500] = broken
    answers = tiny.answers(images, ["ocr"] * 1000, 8, batch_size=64)
    assert [i for i, answer in enumerate(answers) if answer.error] == [500] and "broken.jpg" in answers[500].error
    assert answers[460].text == answers[540].text == tiny.generate(photos[20], "ocr", 8)[0]
    with pytest.raises(ValueError, match=r"prompt 1: .*broken.jpg.*1 of 2 failed"):
        tiny.generate([photos[0], broken], ["ocr"] * 2, 8)


def test_a_batch_of_nothing_but_failures(tiny):
    assert all(answer.error for answer in tiny.answers(["no.jpg", "none.jpg"], ["ocr"] * 2, 8))


@pytest.mark.parametrize("prompt", ["caption en", "detect 3", "ocr"])
@pytest.mark.parametrize("sampler", [pg.Greedy(), Sample(temperature=3.0)], ids=["greedy", "sample"])
def test_a_stream_is_the_same_text(tiny, prompt, sampler):
    """Hot sampling says bytes that are no UTF-8 and pieces of words: the parts joined are the whole all the same."""
    for seed in range(3):
        parts = list(tiny.stream(PHOTO, prompt, 40, sampler, seed=seed))
        assert "".join(parts) == tiny.generate(PHOTO, prompt, 40, sampler, seeds=[seed])[0]
        assert all(parts)


def test_a_stream_never_cuts_a_character(tiny):
    """Pieces of a multi-byte character, one token at a time."""
    tokenizer, text = tiny.processor.tokenizer, "3 ☃ 5 日本 ok"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    shown = [tokenizer.decode(ids[: tokenizer.settled(ids[:n])]) for n in range(len(ids) + 1)]
    assert all(text.startswith(part) for part in shown) and shown[-1] == text


@pytest.mark.parametrize("stop", ["3,", ["and", "digits: 9"], "four", ["never said"]])
def test_stop(tiny, stop):
    """The answer ends before the first of them, streamed or not; with beams too."""
    whole = tiny.generate(PHOTO, "caption en")[0]
    stops = [stop] if isinstance(stop, str) else stop
    expected = whole[: min([whole.find(s) for s in stops if s in whole], default=len(whole))]
    assert tiny.generate(PHOTO, "caption en", stop=stop) == [expected]
    assert "".join(tiny.stream(PHOTO, "caption en", stop=stop)) == expected
    assert tiny.generate(PHOTO, "caption en", sampler=Beam(2), stop=stop) == [expected]


def test_allowed_only_locations(tiny):
    """The mask of the issue: nothing but `<locNNNN>` and `;` (and eos)."""
    tokenizer = tiny.processor.tokenizer
    allowed = np.zeros(tiny.config.decoder.vocab_size, bool)
    allowed[[tokenizer.eos_id, *tokenizer.encode(" ;"), *(tokenizer.loc(n) for n in range(1024))]] = True
    text = tiny.generate(PHOTO, "detect 4", 8, allowed=allowed, min_new_tokens=4)[0]
    assert text.startswith("<loc06") and not text.replace("<loc", "").replace(">", "").replace(";", "").replace(" ", "").strip("0123456789")


def test_wrong_requests(tiny):
    for message, options in [
        ("max_new_tokens is 0", dict(max_new_tokens=0)),
        ("max_new_tokens is 9000", dict(max_new_tokens=9000)),
        ("min_new_tokens is 5", dict(max_new_tokens=4, min_new_tokens=5)),
        ("batch_size is 0", dict(batch_size=0)),
        ("pass bool", dict(allowed=np.ones(7, bool))),
        ("allows no token", dict(allowed=np.arange(1664) >= 1601)),
        ("2 seeds for 1", dict(seeds=[1, 2])),
        ("stop is ''", dict(stop="")),
        ("stop is .'3', 4", dict(stop=["3", 4])),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny.generate(PHOTO, "ocr", **options)


@pytest.mark.slow
def test_memory_stays_flat(tiny, photos):
    """1,000 calls: after the first hundred no growth beyond 20 MB, and not one array more on the device."""
    held = lambda: (int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), len(jax.live_arrays()))
    for i in range(1000):
        tiny.generate(photos[i % 40], TASKS[i % 13], 4)
        if i == 100:
            before = held()
    after = held()
    assert after[0] - before[0] < 20e6 and after[1] <= before[1]


SCRIPT = "import sys, paligemma_jax as pg; print(list(pg.load('tiny').stream(sys.argv[1], 'ocr')))"


def test_programs_are_kept_for_the_next_process(tmp_path):
    """The second process finds them; PALIGEMMA_JAX_CACHE=off writes none."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}

    def run(place):
        done = subprocess.run([sys.executable, "-c", SCRIPT, PHOTO], capture_output=True, text=True, env=environment | {"PALIGEMMA_JAX_CACHE": place})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3")

    run(str(tmp_path / "cache"))
    kept = {file.name for file in (tmp_path / "cache").iterdir()}
    assert any("prefill" in name for name in kept) and any("decode" in name for name in kept)
    run(str(tmp_path / "cache"))
    assert {file.name for file in (tmp_path / "cache").iterdir()} == kept
    run("off")
    assert {file.name for file in tmp_path.iterdir()} == {"cache"}
