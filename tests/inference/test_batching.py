"""Many prompts at once, on the embedded model: order, buckets, images encoded once, errors by
prompt, streaming."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from support.photos import crops

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.inference import admission, answering, batching, generate, scoring
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample
from paligemma_jax.processing.image_settings import ImageSettings
from paligemma_jax.processing.processor import Processor

PHOTO = str(TINY.parent / "digits.jpg")
TASKS = ["caption en", "ocr", "answer en how many digits?", *(f"detect {d}" for d in range(10))]
PROGRAMS = (generate.prefill, generate.decode, generate.encode_images)


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def photos():
    return crops(40)


def spy_on_encoding():
    return mock.patch.object(batching, "encode_images", side_effect=generate.encode_images)


def encoded_images(spy):
    return sum(len(call.args[1]) for call in spy.call_args_list)


@pytest.mark.thorough
def test_answers_keep_the_order_of_their_prompts(tiny, photos):
    """Prompts of mixed lengths get the same answers as each prompt alone."""
    images = [photos[i * 7 % 40] for i in range(300)]
    longer = [" " + "and so on" * (i % 5) if i % 3 == 0 else "" for i in range(300)]
    prompts = [TASKS[i % 13] + longer[i] for i in range(300)]
    answers = tiny.generate(images, prompts, 12, batch_size=32)
    for i in range(0, 300, 71):
        assert tiny.generate(images[i], prompts[i], 12) == [answers[i]], i


def test_images_are_opened_and_encoded_once(tiny, photos):
    images = [photos[i % 3] for i in range(12)]
    opening = mock.patch.object(
        Processor, "pixel_values", autospec=True, side_effect=Processor.pixel_values
    )
    with spy_on_encoding() as encode, opening as opened:
        tiny.generate(images, [TASKS[i] for i in range(12)], 4, batch_size=4)
    assert opened.call_count == 3
    assert encoded_images(encode) in (3, 4)  # padded to a power of two


def test_image_settings_steer_batches_and_streams(tiny, photos):
    """With a rescale factor of 0, every image is black."""
    settings = ImageSettings(rescale_factor=0.0)
    blind = replace(tiny, processor=replace(tiny.processor, image_settings=settings))
    (expected,) = tiny.generate(Image.new("RGB", (112, 112)), "ocr", 40)
    assert blind.generate(photos[0], "ocr", 40) == [expected]
    assert "".join(blind.stream(photos[0], "ocr", 40)) == expected
    assert tiny.generate(photos[0], "ocr", 40) != [expected]


@pytest.mark.parametrize(
    ("module", "sampler"),
    [(admission, Greedy()), (batching, Sample(repetition_penalty=1.1))],
    ids=["engine", "batches"],
)
def test_images_are_dropped_after_their_last_use(tiny, photos, module, sampler):
    counts = []

    class WatchedCache(batching.ImageCache):
        def release(self, images):
            super().release(images)
            counts.append((len(self.encoded), len(self.opened)))

    with mock.patch.object(module, "ImageCache", WatchedCache):
        tiny.generate(photos, ["ocr"] * 40, 4, sampler, batch_size=4)
    assert counts[-1] == (0, 0)
    assert max(encoded for encoded, _ in counts) == 0
    assert max(opened for _, opened in counts) <= 4 * batching.AHEAD


def test_a_new_length_in_the_same_bucket_compiles_nothing(tiny):
    tiny.generate(PHOTO, "ocr", 20)
    before = [program._cache_size() for program in PROGRAMS]
    for prompt, new in (("caption en", 32), ("answer en how many digits?", 1), ("detect 3", 17)):
        tiny.generate(PHOTO, prompt, new)
    assert [program._cache_size() for program in PROGRAMS] == before


def test_prompts_with_several_images_are_batched_by_their_number(tiny, photos):
    images = [[photos[0], photos[1]], [photos[2]], [photos[3], photos[4]], [photos[5]]]
    answers = tiny.generate(images, ["ocr"] * 4, 8)
    assert [tiny.generate([group], ["ocr"], 8)[0] for group in images] == answers


@pytest.mark.thorough
def test_an_unreadable_image_fails_alone(tiny, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(PHOTO).read_bytes()[:5000])
    images = [photos[i % 40] for i in range(300)]
    images[150] = broken
    answers = tiny.answers(images, ["ocr"] * 300, 8, batch_size=64)
    assert [i for i, answer in enumerate(answers) if answer.error] == [150]
    assert "broken.jpg" in answers[150].error
    alone = tiny.generate(photos[20], "ocr", 8)[0]
    assert answers[140].text == answers[180].text == alone
    with pytest.raises(ValueError, match=r"prompt 1: .*broken.jpg.*1 of 2 failed"):
        tiny.generate([photos[0], broken], ["ocr"] * 2, 8)


def test_a_batch_may_consist_of_failures(tiny):
    assert all(answer.error for answer in tiny.answers(["no.jpg", "none.jpg"], ["ocr"] * 2, 8))


@pytest.mark.parametrize("prompt", ["caption en", "detect 3", "ocr"])
@pytest.mark.parametrize("sampler", [Greedy(), Sample(temperature=3.0)], ids=["greedy", "sample"])
@pytest.mark.thorough
def test_streamed_pieces_join_to_the_answer(tiny, prompt, sampler):
    """They do so even at a temperature that produces invalid UTF-8 and parts of words."""
    for seed in range(3):
        pieces = list(tiny.stream(PHOTO, prompt, 40, sampler, seed=seed))
        assert "".join(pieces) == tiny.generate(PHOTO, prompt, 40, sampler, seeds=[seed])[0]
        assert all(pieces)


def test_stream_takes_the_options_of_generate(tiny):
    """It decodes the first token at prefill, then eight tokens per dispatch."""
    allowed = np.zeros(tiny.config.decoder.vocab_size, bool)
    allowed[tiny.processor.tokenizer.encode("0 1 2 3")] = True
    for options in (
        dict(min_new_tokens=40),
        dict(allowed=allowed),
        dict(allowed=allowed[None], stop=None),
    ):
        with mock.patch.object(generate, "decode", side_effect=generate.decode) as decode:
            text = "".join(tiny.stream(PHOTO, "ocr", 40, **options))
        assert decode.call_count == -(-39 // answering.STREAM)
        assert [text] == tiny.generate(PHOTO, "ocr", 40, **options) and len(text) > 30
    with pytest.raises(ValueError, match=r"min_new_tokens must be .* got 5"):
        next(tiny.stream(PHOTO, "ocr", 4, min_new_tokens=5))


def test_options_are_keywords_or_one_value(tiny):
    """Keywords take precedence over `options`."""
    options = pg.DecodingOptions(12, Beam(2), min_new_tokens=3, stop="9")
    expected = tiny.generate(PHOTO, "ocr", 12, Beam(2), min_new_tokens=3, stop=["9"])
    assert tiny.generate(PHOTO, "ocr", options=options) == expected
    greedy = pg.DecodingOptions(9, min_new_tokens=9)
    streamed = "".join(tiny.stream(PHOTO, "ocr", options=greedy))
    assert [streamed] == tiny.generate(PHOTO, "ocr", 9, min_new_tokens=9)
    shorter = tiny.generate(PHOTO, "ocr", max_new_tokens=3, options=options)
    assert shorter == tiny.generate(PHOTO, "ocr", 3, Beam(2), min_new_tokens=3) != expected
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        tiny.generate(PHOTO, "ocr", temperature=2.0)


def test_stacked_layers_give_the_same_answers(tiny):
    stacked = pg.load("tiny", layers="stack")
    assert stacked.generate([PHOTO] * 3, TASKS[:3], 20) == tiny.generate([PHOTO] * 3, TASKS[:3], 20)
    assert len(jax.tree.leaves(stacked.model)) < len(jax.tree.leaves(tiny.model))
    with pytest.raises(ValueError, match="layers must be 'list' or 'stack', got 'fold'"):
        pg.load("tiny", layers="fold")


def test_a_stream_never_splits_a_character(tiny):
    """Tests characters of several tokens, decoded one token at a time."""
    tokenizer, text = tiny.processor.tokenizer, "3 ☃ 5 日本 ok"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    prefixes = [ids[:n] for n in range(len(ids) + 1)]
    shown = [tokenizer.decode(ids[: tokenizer.stable_length(prefix)]) for prefix in prefixes]
    assert all(text.startswith(part) for part in shown) and shown[-1] == text


@pytest.mark.parametrize("stop", ["3,", ["and", "digits: 9"], "four", ["never said"]])
def test_an_answer_ends_before_the_first_stop_text(tiny, stop):
    """Tests batches, streams and beam search."""
    full = tiny.generate(PHOTO, "caption en")[0]
    stops = [stop] if isinstance(stop, str) else stop
    expected = full[: min([full.find(s) for s in stops if s in full], default=len(full))]
    assert tiny.generate(PHOTO, "caption en", stop=stop) == [expected]
    assert "".join(tiny.stream(PHOTO, "caption en", stop=stop)) == expected
    assert tiny.generate(PHOTO, "caption en", sampler=Beam(2), stop=stop) == [expected]


@pytest.mark.parametrize("sampler", [Greedy(), Beam(2, 0.5)], ids=["greedy", "beam"])
def test_tokens_after_a_stop_text_do_not_count(tiny, sampler):
    """Tokens, log-probabilities and score end where a stop text is complete, without pads."""
    (full,) = tiny.answers(PHOTO, "ocr", 24, sampler)
    (cut,) = tiny.answers(PHOTO, "ocr", 24, sampler, stop=["<", " 3"])
    assert (full.text, cut.text, cut.tokens) == ("4 3 2 3", "4", full.tokens[:3])
    assert cut.log_probabilities == pytest.approx(full.log_probabilities[:3], abs=1e-5)
    assert [text for text, _ in cut.pieces(tiny.processor.tokenizer)] == ["4", "", ""]
    penalty = getattr(sampler, "length_penalty", 0)
    assert cut.score == pytest.approx(sum(cut.log_probabilities) / 3**penalty)


def test_best_of_ranks_by_the_text_before_the_stop(tiny):
    """The best of four samples up to the stop text differs from the best to the end."""
    samples, join, sampler = [], generate._join, BestOf(4, Sample(3.0))

    def spy(*args):
        samples.append(join(*args))
        return samples[-1]

    with mock.patch.object(generate, "_join", side_effect=spy):
        (full,) = tiny.answers(PHOTO, "ocr", 12, sampler)
        (cut,) = tiny.answers(PHOTO, "ocr", 12, sampler, stop="1")
    tokens, log_probabilities = samples[0].tokens, samples[0].log_probabilities
    ends = [
        next(n for n in range(1, 13) if n == 12 or "1" in tiny.processor.decode(row[:n]))
        for row in tokens.tolist()
    ]
    scores = [row[:n].sum() for row, n in zip(log_probabilities, ends, strict=True)]
    best = int(np.argmax(scores))
    assert cut.tokens == tokens[best, : ends[best]].tolist()
    assert cut.tokens != full.tokens[: len(cut.tokens)]
    assert cut.score == pytest.approx(scores[best], abs=1e-4)


def test_only_locations_are_allowed(tiny):
    """The mask allows `<locNNNN>`, `;`, space and eos."""
    tokenizer = tiny.processor.tokenizer
    allowed = np.zeros(tiny.config.decoder.vocab_size, bool)
    locations = [tokenizer.loc(n) for n in range(1024)]
    allowed[[tokenizer.eos_id, *tokenizer.encode(" ;"), *locations]] = True
    (text,) = tiny.generate(PHOTO, "detect 4", 8, allowed=allowed, min_new_tokens=4)
    assert text.startswith("<loc06")
    for part in ("<loc", ">", ";", " "):
        text = text.replace(part, "")
    assert not text.strip("0123456789")


INVALID_OPTIONS = [
    ("max_new_tokens must be .* got 0", dict(max_new_tokens=0)),
    ("max_new_tokens must be .* got 9000", dict(max_new_tokens=9000)),
    ("min_new_tokens must be .* got 5", dict(max_new_tokens=4, min_new_tokens=5)),
    ("batch_size must be .* got 0", dict(batch_size=0)),
    (r"allowed must be a grammar, bool\[1664\]", dict(allowed=np.ones(7, bool))),
    ("permit at least one token of text", dict(allowed=np.arange(1664) >= 1601)),
    ("one per prompt, got 2 for 1 prompts", dict(seeds=[1, 2])),
    ("stop must be .* got ''", dict(stop="")),
    (r"stop must be .* got \['3', 4\]", dict(stop=["3", 4])),
    ("stop must be .* got 3", dict(stop=3)),
    ("stop must be .* got 0", dict(stop=0)),
]


@pytest.mark.parametrize("message,options", INVALID_OPTIONS)
def test_invalid_options_are_refused(tiny, message, options):
    with pytest.raises(ValueError, match=message):
        tiny.generate(PHOTO, "ocr", **options)


def test_scores_are_batched(tiny, photos, optimized):
    """Scores equal those of single prompts, in order. A new length in a bucket compiles nothing, an
    image that occurs twice is encoded once, and an unreadable one raises."""
    suffixes = ["4 3 2 3", "4", "four digits", "3 " * 10, "", "4 3 2 8"]
    images = [photos[0], photos[1], photos[0], photos[0], photos[1], photos[0]]
    with spy_on_encoding() as encode:
        scores = tiny.score(images, ["ocr"] * 6, suffixes, batch_size=2)
    assert scores.dtype == np.float32 and encoded_images(encode) == 2
    alone = [
        scoring.score(tiny.model, tiny.processor(images[i], "ocr", suffixes[i]))[0] for i in (0, 3)
    ]
    np.testing.assert_allclose(scores[[0, 3]], alone, rtol=1e-5, atol=1e-5)
    before = scoring._score._cache_size()
    for suffix, prompt in (("4 3", "ocr"), ("9 9 9 9 9", "caption en"), ("two digits", "detect 3")):
        tiny.score([photos[0], photos[2]], [prompt, "ocr"], [suffix, "4"], batch_size=2)
    assert scoring._score._cache_size() == before
    with pytest.raises(ValueError, match=r"no.png"):
        tiny.score([photos[0], "no.png"], ["ocr"] * 2, ["4"] * 2)


@pytest.mark.slow
def test_memory_stays_flat(tiny, photos):
    """1,000 calls grow memory by less than 20 MB after the first hundred, with no new device
    array."""

    def usage():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), len(jax.live_arrays())

    for i in range(1000):
        tiny.generate(photos[i % 40], TASKS[i % 13], 4)
        if i == 100:
            before = usage()
    after = usage()
    assert after[0] - before[0] < 20e6 and after[1] <= before[1]


COUNT_CACHE_EVENTS = """
import sys, jax, paligemma_jax as pg
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
assert "3" in "".join(pg.load("tiny").stream(sys.argv[1], "ocr"))
print(events.count("cache_misses"), events.count("cache_hits"))
"""


@pytest.mark.thorough
def test_compiled_programs_are_cached_for_the_next_process(tmp_path):
    """The second process compiles nothing. PALIGEMMA_JAX_CACHE=off disables the cache."""
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run(cache):
        """Number of cache misses and hits."""
        done = subprocess.run(
            [sys.executable, "-c", COUNT_CACHE_EVENTS, PHOTO],
            capture_output=True,
            text=True,
            env=environment | {"PALIGEMMA_JAX_CACHE": cache},
        )
        assert done.returncode == 0, done.stderr
        return tuple(map(int, done.stdout.split()))

    cache = tmp_path / "cache"
    misses, hits = run(str(cache))
    files = {file.name for file in cache.iterdir()}
    assert hits == 0
    assert all(any(name in file for file in files) for name in ("prefill", "decode"))
    assert run(str(cache)) == (0, misses)
    assert {file.name for file in cache.iterdir()} == files
    assert run("off") == (0, 0)
    assert {file.name for file in tmp_path.iterdir()} == {"cache"}
