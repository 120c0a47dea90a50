"""Continuous batching with grammars: each row follows its own, and answers as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from support.engines import alone, assert_same, run
from support.photos import crops

import paligemma_jax as pg
from paligemma_jax.grammars import rows
from paligemma_jax.grammars.automaton import compile_grammars
from paligemma_jax.grammars.grammar import Choices, Repeat, Text
from paligemma_jax.grammars.rows import AutomatonTables, automaton_of_ids
from paligemma_jax.inference import answering, decoding, slots
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.options import DecodingOptions

HOT = pg.Sample(temperature=2.0)
SIZE = dict(rows=4, slots=160)  # of all engines, whose programs are compiled once


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny", layers="stack")  # compiles faster


@pytest.fixture(scope="module")
def prompts(tiny):
    photos, tasks = crops(4), ["ocr", "detect 4 ; 3", "segment 2"]
    return tiny.processor.encode(
        [photos[i % 4] for i in range(28)], [tasks[i % 3] for i in range(28)]
    )


def digits(tiny):
    """Ids of digits, spaces and the end."""
    tokenizer = tiny.processor.tokenizer
    ids = np.zeros(tiny.config.decoder.vocab_size, bool)
    ids[[*tokenizer.encode("0 1 2 3 4 5 6 7 8 9"), tokenizer.eos_id]] = True
    return ids


def make_requests(tiny, prompts):
    """Requests with and without grammars, and with other options."""
    kinds = [
        (HOT, None),
        (HOT, pg.Boxes(["4", "3"], least=1)),
        (pg.Greedy(), pg.Choices(["4 3 2 3", "no digits", "two"])),
        (pg.BestOf(2, HOT), [pg.Boxes("two words", 1, 2)]),
        (HOT, digits(tiny)),
        (pg.Greedy(), Repeat(Choices([" 3", " 4"]), least=2)),
        (HOT, Repeat(Choices([" 3", " 4"]), least=2)),
    ]
    numbers, requests = random.Random(2), []
    for i, prompt in enumerate(prompts):
        sampler, allowed = kinds[i % 7]
        stop = "3" if i % 6 == 0 else ()
        options = DecodingOptions(numbers.randrange(17, 33), sampler, stop=stop, allowed=allowed)
        requests.append((prompt, options, i))
    return requests


def grouped(requests, seed):
    """Requests in groups of random size."""
    sizes, groups, start = random.Random(seed), [], 0
    while start < len(requests):
        end = start + sizes.randrange(6)
        groups.append(requests[start:end])
        start = end
    return groups


def assert_alone(tiny, request, answer):
    # At temperature 2, some tokens are so unlikely that rounding is 3e-5.
    assert_same(answer, alone(tiny, *request), atol=1e-4)


@pytest.mark.thorough
def test_answers_are_those_of_each_request_alone(tiny, prompts):
    requests = make_requests(tiny, prompts)
    with Engine(tiny.model, tiny.processor, **SIZE) as batch:
        answers = run(batch, grouped(requests, 1))
    assert len({answer.text for answer in answers}) > 15
    for request, answer in zip(requests, answers, strict=True):
        assert_alone(tiny, request, answer)


def test_nothing_is_compiled_after_the_first_requests(tiny, prompts):
    """Neither by other grammars, nor by rows without one."""
    options = DecodingOptions(30, HOT)
    free = [(prompt, options, i) for i, prompt in enumerate(prompts[:4])]
    boxes = [
        (prompts[i], replace(options, allowed=pg.Boxes(f"label {i}", 1)), i) for i in range(24)
    ]
    with Engine(tiny.model, tiny.processor, **SIZE) as batch:
        for group in (free, free[:1], boxes[:4], boxes[:1]):  # all rows, and one
            for request in group:
                batch.submit(*request)
            list(batch.answers())
        programs = slots.insert, slots.advance, decoding.prefill
        before = [program._cache_size() for program in programs]
        mixed = free + boxes[4:14] + free + boxes[14:]
        answers = run(batch, grouped(mixed, 3))
        assert [program._cache_size() for program in programs] == before
    for (_, options, _), answer in zip(mixed, answers, strict=True):
        found = pg.parse_detections(answer.text, (64, 64))
        labels = options.allowed and options.allowed.labels
        assert not labels or {box.label for box in found} == {*labels}


def test_no_sampled_box_is_malformed(tiny, prompts):
    """Beside rows that sample any text, at temperature 2, with limits that cut no box."""
    box = DecodingOptions(22, HOT, allowed=pg.Boxes(["4", "two words"], least=1))
    options = [box, DecodingOptions(22, HOT), replace(box, max_new_tokens=9)]
    requests = [(prompts[1], options[i % 3], i) for i in range(90)]
    with Engine(tiny.model, tiny.processor, **SIZE) as batch:
        answers = run(batch, grouped(requests, 1))
    found = [pg.parse_detections(answer.text, (64, 64)) for answer in answers]
    assert all(found[i] and not found[i].skipped for i in range(90) if i % 3 != 1)
    assert {box.label for i in range(0, 90, 3) for box in found[i]} == {"4", "two words"}
    assert sum(len(found[i].skipped) for i in range(1, 90, 3)) > 10


def test_tables_grow_or_requests_wait(tiny, prompts, monkeypatch):
    """The first table has room for one grammar, and the largest for three: the fourth waits."""
    fits, fit = [], AutomatonTables.fit
    monkeypatch.setattr(AutomatonTables, "fit", lambda *args: fits.append(fit(*args)) or fits[-1])
    monkeypatch.setattr(rows, "STATES", 32)
    monkeypatch.setattr(rows, "KINDS", 16)
    monkeypatch.setattr(rows, "LARGEST", 64 * 16)
    options = [
        DecodingOptions(20, HOT, allowed=Choices([f"{i} {j}" for j in range(4)])) for i in range(6)
    ]
    options.append(DecodingOptions(20, HOT))
    requests = [(prompts[i], options[i % 7], i) for i in range(14)]
    with Engine(tiny.model, tiny.processor, **SIZE) as batch:
        (first,) = run(batch, grouped(requests[:1], 1))
        assert batch._tables.shape == (32, 16)
        answers = [first, *run(batch, grouped(requests[1:], 1))]
        assert batch._tables.shape == (64, 16)
    assert False in fits
    for request, answer in zip(requests, answers, strict=True):
        assert_alone(tiny, request, answer)


def test_tables_keep_automata_as_long_as_there_is_room(tiny):
    """What is used is there, with its own table, wherever it is moved."""
    tokenizer, rng = tiny.processor.tokenizer, random.Random(0)
    V = tokenizer.vocab_size
    automata = [
        compile_grammars([Repeat(Text(f"{i}"), i, i)], tokenizer, V, [tokenizer.eos_id])
        for i in range(1, 10)
    ]
    automata.append(automaton_of_ids(np.arange(V) % 2 == 0))
    tables = AutomatonTables(4, V)
    assert tables.of([None, None]) is None
    for _ in range(50):
        used = [rng.choice([None, *automata]) for _ in range(4)]
        joined = tables.of(used)
        assert len(tables.kept) <= 4
        if joined is not None:
            for row, automaton in enumerate(used):
                if automaton is not None:
                    own = joined.firsts[row] + np.arange(len(automaton.table))
                    table = np.asarray(joined.table)[own, : automaton.table.shape[1]]
                    np.testing.assert_array_equal(table, automaton.table)
                    kinds = np.asarray(joined.kinds)[joined.numbers[row]]
                    np.testing.assert_array_equal(kinds, automaton.kinds)
    before = tables.tables
    tables.of(used[::-1])
    assert tables.tables is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(allowed=pg.Boxes("4", 2), max_new_tokens=9), "got 9: it needs 16"),
        (dict(allowed=pg.Choices(["4"]), min_new_tokens=1), "min_new_tokens must be 0 with a"),
        (dict(allowed=[Text("4"), Text("3")]), "one grammar per prompt, got 2 for 1 prompts"),
        (dict(allowed=np.ones(3, bool)), "allowed must be a grammar, bool"),
        (dict(allowed=pg.Regex("[0-9]")), "no Json, Regex, edit or logits"),
        (dict(allowed=[pg.Json()]), "no Json, Regex, edit or logits"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(tiny, prompts, options, message):
    with Engine(tiny.model, tiny.processor, rows=2, slots=128) as batch:
        with pytest.raises(ValueError, match=message):
            batch.submit(prompts[0], DecodingOptions(**{"max_new_tokens": 20} | options))
        assert not batch.waiting


def test_many_prompts_have_a_grammar_each(tiny, prompts, monkeypatch):
    monkeypatch.setattr(answering, "generate", None)
    grammars = [Choices([f"{i}", f"{i} {i}"]) for i in range(16)]
    masks = np.stack([digits(tiny)] * 16)
    for allowed in (grammars, masks):
        options = DecodingOptions(64, HOT, allowed=allowed)
        batches = tiny.batches(prompts[:16], options, batch_size=4)
        answers = {k: v.text for new in batches for k, v in new.items()}
        for i in range(16):
            if allowed is grammars:
                assert answers[i] in grammars[i].texts
            assert not set(answers[i]) - set("0123456789 ")
        with pytest.raises(ValueError, match="per prompt, got 16 for 17 prompts"):
            list(tiny.batches(prompts[:17], options, batch_size=4))
