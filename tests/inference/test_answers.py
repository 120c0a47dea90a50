"""Answers of the embedded model: alternatives, likely tokens, streams of tokens, stop functions."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.inference.answer import Detokenizer
from paligemma_jax.inference.chosen import Chosen
from paligemma_jax.inference.streaming import stream_tokens
from paligemma_jax.sharding import devices

PHOTO = str(DIGITS)


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


def test_alternatives_are_the_next_best_answers(tiny):
    """Each has what belongs to its own tokens; the best is the answer without alternatives."""
    beam = pg.Beam(4, length_penalty=0.5, num_return=3)
    (answer,) = tiny.answers(PHOTO, "ocr", 16, beam, top_log_probabilities=2)
    (alone,) = tiny.answers(PHOTO, "ocr", 16, pg.Beam(4, length_penalty=0.5))
    assert answer.text == alone.text and answer.score == pytest.approx(alone.score)
    assert not alone.alternatives and alone.top is None
    ranked = [answer, *answer.alternatives]
    assert len(ranked) == len({other.text for other in ranked}) == 3
    assert ranked == sorted(ranked, key=lambda other: -other.score)
    for other in ranked:
        penalized = sum(other.log_probabilities) / len(other.tokens) ** 0.5
        assert other.score == pytest.approx(penalized)
        assert other.top.ids.shape == other.top.log_probabilities.shape == (len(other.tokens), 2)
    assert tiny.generate(PHOTO, "ocr", 16, beam) == [answer.text]


def test_there_may_be_fewer_alternatives_than_asked_for(tiny):
    """A grammar of two answers has no third one."""
    two = pg.Choices(["three", "four"])
    beam = pg.Beam(4, num_return=4)
    (answer,) = tiny.answers(PHOTO, "caption en", 8, beam, allowed=two)
    (other,) = answer.alternatives
    assert {answer.text, other.text} == {"three", "four"} and answer.score > other.score


@pytest.mark.parametrize("stop", [None, ["9", ", 2 and"], lambda text: text.count(",") == 2])
def test_streamed_tokens_are_those_of_the_answer(tiny, stop):
    """With text that joins to it, log-probabilities, likely tokens and logits."""
    options = dict(top_log_probabilities=2, logits=True, stop=stop)
    (answer,) = tiny.answers(PHOTO, "caption en", 24, **options)
    tokens = list(tiny.stream_tokens(PHOTO, "caption en", 24, **options))
    assert [token.id for token in tokens] == answer.tokens
    assert "".join(token.text for token in tokens) == answer.text
    pieces = list(answer.pieces(tiny.processor.tokenizer))
    assert [token.text for token in tokens] == [text for text, _ in pieces]
    log_probabilities = [token.log_probability for token in tokens]
    assert log_probabilities == pytest.approx(answer.log_probabilities, abs=1e-6)
    for name in ("ids", "log_probabilities"):
        streamed = np.stack([getattr(token.top, name) for token in tokens])
        np.testing.assert_allclose(streamed, getattr(answer.top, name), atol=1e-6)
    logits = np.stack([token.logits for token in tokens])
    np.testing.assert_allclose(logits, answer.logits, atol=1e-5)


def test_streamed_tokens_have_complete_characters(tiny):
    """At a temperature that produces invalid UTF-8 and parts of words."""
    hot = pg.Sample(temperature=3.0)
    for seed in range(3):
        tokens = list(tiny.stream_tokens(PHOTO, "ocr", 40, hot, seed=seed))
        (answer,) = tiny.answers(PHOTO, "ocr", 40, hot, seeds=[seed])
        texts = [text for text, _ in answer.pieces(tiny.processor.tokenizer)]
        assert [token.text for token in tokens] == texts


def test_text_that_may_become_a_stop_is_held_back(tiny):
    """Token by token, for a stop text of several tokens: what was sent is never taken back."""
    (answer,) = tiny.answers(PHOTO, "caption en", 24)
    ids, values = np.array([answer.tokens]), np.array([answer.log_probabilities])
    for stop, expected in ((", 2 and", "four digits: 4, 3"), (", 2 or", answer.text)):
        detokenizer = Detokenizer(tiny.processor.tokenizer, tiny.config.eos_token_ids, (stop,))
        chunks = (Chosen(ids[:, [n]], values[:, [n]]) for n in range(ids.shape[1]))
        texts = [
            "".join(token.text for token in tokens) for tokens in stream_tokens(detokenizer, chunks)
        ]
        assert "".join(texts) == expected
        assert sum(map(bool, texts)) > 3  # a stream, not one text at the end


STOPS = [
    (lambda text: text.find(",") if "," in text else None, "four digits: 4"),
    (lambda text: text.find(","), "four digits: 4"),
    (lambda text: len(text.split()) == 3, "four digits: 4"),
    (lambda text: text.endswith(","), "four digits: 4,"),
    ([",", lambda text: "digits" in text], "four digits"),
    ([lambda text: False, "digits"], "four "),
    (lambda text: np.bool_("never" in text), "four digits: 4, 3, 2 and 3"),
]


@pytest.mark.parametrize(("stop", "expected"), STOPS)
def test_a_function_of_the_text_ends_an_answer(tiny, stop, expected):
    """Also if only a shorter text satisfies it: it sees the text after each token."""
    (answer,) = tiny.answers(PHOTO, "caption en", 24, stop=stop)
    assert answer.text == expected == "".join(tiny.stream(PHOTO, "caption en", 24, stop=stop))
    assert tiny.generate(PHOTO, "caption en", 24, pg.Beam(2), stop=stop) == [expected]
    assert answer.score == pytest.approx(sum(answer.log_probabilities))


def test_a_stop_function_is_called_once_for_a_token_while_decoding(tiny):
    texts = []
    list(tiny.stream(PHOTO, "caption en", 24, stop=texts.append))
    seen = texts[:-1]  # the last call cuts the answer
    assert seen == sorted(set(seen), key=len) and seen[:2] == ["four", "four digits"]


def test_a_stop_function_sees_the_newest_token(tiny):
    """So that an answer ends with the token that satisfies it."""
    (answer,) = tiny.answers(PHOTO, "caption en", 24, stop=lambda text: "digits" in text)
    assert tiny.processor.decode(answer.tokens) == answer.text == "four digits"
    streamed = tiny.stream_tokens(PHOTO, "caption en", 24, stop=lambda text: "digits" in text)
    assert [token.id for token in streamed] == answer.tokens


def test_failing_stop_functions_are_errors(tiny):
    def fails(text):
        raise KeyError("comma")

    cases = [(fails, r"function .*fails failed for the text 'four': KeyError\('comma'\)")]
    cases += [(lambda text: "yes", "must return True, False or a length up to 4, got 'yes'")]
    cases += [(lambda text: 99, "must return True, False or a length up to 4, got 99")]
    for stop, message in cases:
        with pytest.raises(ValueError, match=message):
            tiny.generate(PHOTO, "caption en", 24, stop=stop)


def test_logits_that_do_not_fit_the_memory_are_refused(tiny):
    fits = mock.patch.object(devices, "memory_bytes", return_value=10**9)
    short = mock.patch.object(devices, "host_memory_bytes", return_value=4 * 24 * 1664 - 1)
    with fits, short:
        with pytest.raises(
            ValueError, match="logits of 1 answers need 0 GB, for 24 tokens of 1664"
        ):
            tiny.answers(PHOTO, "caption en", 24, logits=True)
        tiny.answers(PHOTO, "caption en", 24)


def test_settings_are_those_of_earlier_versions():
    """So that a run that they started resumes."""
    recorded = {
        "max_new_tokens": 128,
        "sampler": "Beam(width=3, length_penalty=1.0, early_stopping=False)",
        "min_new_tokens": 0,
        "stop": ["a"],
        "allowed": None,
    }
    options = pg.DecodingOptions(sampler=pg.Beam(3), stop=["a"])
    assert options.settings() == recorded
    for change in (dict(sampler=pg.Beam(3, num_return=2)), dict(top_log_probabilities=2)):
        assert replace(options, **change).settings() != recorded


def test_settings_identify_functions():
    """A resumed run compares them: they have no addresses."""
    settings = pg.DecodingOptions(stop=["a", test_settings_identify_functions]).settings()
    assert settings["stop"] == ["a", f"{__name__}.test_settings_identify_functions"]
