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
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.inference import batching, generate, pointing, predictor, scoring
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample

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
        batching, "pixel_values", side_effect=batching.pixel_values
    ) as opened:  # fmt: skip
        tiny.generate(images, [TASKS[i] for i in range(12)], 4, batch_size=4)
    assert opened.call_count == 3
    assert sum(len(call.args[1]) for call in encode.call_args_list) in (3, 4)  # filled up to a power of two


def test_nothing_is_kept_after_its_last_use(tiny, photos):
    kept = []

    class Watched(batching.ImageCache):
        def forget(self, images):
            super().forget(images)
            kept.append((len(self.encoded), len(self.opened)))

    with mock.patch.object(batching, "ImageCache", Watched):
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


def test_a_stream_is_asked_as_the_others(tiny):
    """And says several tokens a dispatch: the first with the prompt, then eight at a time."""
    allowed = np.zeros(tiny.config.decoder.vocab_size, bool)
    allowed[tiny.processor.tokenizer.encode("0 1 2 3")] = True
    for options in (dict(min_new_tokens=40), dict(allowed=allowed), dict(allowed=allowed[None], stop=None)):
        with mock.patch.object(generate, "decode", side_effect=generate.decode) as decode:
            parts = "".join(tiny.stream(PHOTO, "ocr", 40, **options))
        assert decode.call_count == -(-39 // predictor.STREAM)
        assert [parts] == tiny.generate(PHOTO, "ocr", 40, **options) and len(parts) > 30
    with pytest.raises(ValueError, match="min_new_tokens is 5"):
        next(tiny.stream(PHOTO, "ocr", 4, min_new_tokens=5))


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


@pytest.mark.parametrize("sampler", [Greedy(), Beam(2, 0.5)], ids=["greedy", "beam"])
def test_what_a_stop_cuts_off_counts_for_nothing(tiny, sampler):
    """Tokens, their log-probabilities and the score go on to where a stop text is complete, and no pads follow."""
    (whole,) = tiny.answers(PHOTO, "ocr", 24, sampler)
    (cut,) = tiny.answers(PHOTO, "ocr", 24, sampler, stop=["<", " 3"])
    assert (whole.text, cut.text, cut.tokens) == ("4 3 2 3", "4", whole.tokens[:3])
    assert cut.log_probabilities == pytest.approx(whole.log_probabilities[:3], abs=1e-5)
    assert [text for text, _ in pointing.pieces(tiny.processor.tokenizer, cut)] == ["4", "", ""]
    assert cut.score == pytest.approx(sum(cut.log_probabilities) / 3 ** getattr(sampler, "length_penalty", 0))


def test_best_of_chooses_by_what_is_kept(tiny):
    """Of four samples another one is the best up to the stop text than to its end."""
    samples, fixed = [], generate._fixed
    with mock.patch.object(generate, "_fixed", side_effect=lambda *args: samples.append(fixed(*args)) or samples[-1]):
        whole, cut = (tiny.answers(PHOTO, "ocr", 12, BestOf(4, Sample(3.0)), stop=stop)[0] for stop in (None, "1"))
    tokens, log_probabilities = samples[0]
    ends = [next(n for n in range(1, 13) if n == 12 or "1" in tiny.processor.decode(row[:n])) for row in tokens.tolist()]
    scores = [row[:n].sum() for row, n in zip(log_probabilities, ends)]
    best = int(np.argmax(scores))
    assert cut.tokens == tokens[best, : ends[best]].tolist() and cut.tokens != whole.tokens[: len(cut.tokens)]
    assert cut.score == pytest.approx(scores[best], abs=1e-4)


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


def test_scores_are_batched(tiny, photos):
    """As alone, in their order; a new length within a bucket compiles nothing, an image given twice is encoded once, one that fails is told."""
    suffixes = ["4 3 2 3", "4", "four digits", "3 " * 10, "", "4 3 2 8"]
    images = [photos[0], photos[1], photos[0], photos[0], photos[1], photos[0]]
    with mock.patch.object(batching, "encode_images", side_effect=generate.encode_images) as encode:
        found = tiny.score(images, ["ocr"] * 6, suffixes, batch_size=2)
    assert found.dtype == np.float32 and sum(len(call.args[1]) for call in encode.call_args_list) == 2
    alone = [scoring.score(tiny.model, tiny.processor(images[i], "ocr", suffixes[i]))[0] for i in (0, 3)]
    np.testing.assert_allclose(found[[0, 3]], alone, rtol=1e-5, atol=1e-5)
    before = scoring._score._cache_size()
    for suffix, prompt in (("4 3", "ocr"), ("9 9 9 9 9", "caption en"), ("two digits", "detect 3")):
        tiny.score([photos[0], photos[2]], [prompt, "ocr"], [suffix, "4"], batch_size=2)
    assert scoring._score._cache_size() == before
    with pytest.raises(ValueError, match=r"no.png"):
        tiny.score([photos[0], "no.png"], ["ocr"] * 2, ["4"] * 2)


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


SCRIPT = """
import sys, jax, paligemma_jax as pg
told = []
jax.monitoring.register_event_listener(lambda event, **_: told.append(event.rpartition("/")[2]))
assert "3" in "".join(pg.load("tiny").stream(sys.argv[1], "ocr"))
print(told.count("cache_misses"), told.count("cache_hits"))
"""


def test_programs_are_kept_for_the_next_process(tmp_path):
    """The second process compiles nothing and takes each from there; PALIGEMMA_JAX_CACHE=off keeps none."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}

    def run(place):
        """How many programs were compiled to be kept, and how many were there."""
        done = subprocess.run([sys.executable, "-c", SCRIPT, PHOTO], capture_output=True, text=True, env=environment | {"PALIGEMMA_JAX_CACHE": place})
        assert done.returncode == 0, done.stderr
        return tuple(map(int, done.stdout.split()))

    compiled, there = run(str(tmp_path / "cache"))
    kept = {file.name for file in (tmp_path / "cache").iterdir()}
    assert there == 0 and all(any(name in file for file in kept) for name in ("prefill", "decode"))
    assert run(str(tmp_path / "cache")) == (0, compiled)
    assert {file.name for file in (tmp_path / "cache").iterdir()} == kept
    assert run("off") == (0, 0)
    assert {file.name for file in tmp_path.iterdir()} == {"cache"}
