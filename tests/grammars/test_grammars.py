"""Answers follow their grammar: every one, and only those."""

from __future__ import annotations

import itertools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from support.on_devices import call
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.grammars.automaton import compile_grammars
from paligemma_jax.grammars.grammar import Boxes, Choices, Either, Masks, Repeat, Sequence, Text
from paligemma_jax.grammars.guidance import Json, Regex
from paligemma_jax.inference import generate

HOT = pg.Sample(temperature=2.0)
SIZE = (320, 224)


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def tokenizer(predictor):
    return predictor.processor.tokenizer


def answers_of(grammar, tokenizer, most=8) -> set[tuple[int, ...]]:
    """All answers of at most that many tokens, found by following the automaton."""
    automaton = compile_grammars([grammar], tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    found, waiting = set(), [(int(automaton.starts[0]), ())]
    for state, tokens in waiting:
        kinds = np.flatnonzero(automaton.table[state] >= 0)
        for token in np.flatnonzero(np.isin(automaton.kinds, kinds)).tolist():
            following = int(automaton.table[state, automaton.kinds[token]])
            if token == tokenizer.eos_id:
                found.add(tokens)
            elif len(tokens) < most:
                waiting.append((following, (*tokens, token)))
    return found


GRAMMARS = {
    "text": (Text("two digits"), ["two digits"]),
    "choices with one start": (Choices(["4", "4 3", "4 3 2", "no"]), ["4", "4 3", "4 3 2", "no"]),
    "sequence": (Sequence([Text("4"), Choices([" 3", " 2"]), Text(" 1")]), ["4| 3| 1", "4| 2| 1"]),
    "repeat": (Repeat(Choices(["4", " 3"]), 1, 2), ["4", " 3", "4|4", "4| 3", " 3|4", " 3| 3"]),
    "any number": (Repeat(Text("4")), ["", "4", "4|4", "4|4|4", "4|4|4|4"]),
    "either": (Either([Text("4"), Sequence([Text("4"), Text(" 3")])]), ["4", "4| 3"]),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_an_automaton_accepts_the_answers_of_its_grammar_and_no_other(name, tokenizer):
    """Texts between | are tokenized on their own."""
    grammar, texts = GRAMMARS[name]
    expected = {
        tuple(itertools.chain(*(tokenizer.encode(part) for part in text.split("|") if part)))
        for text in texts
    }
    most = max(map(len, expected))
    assert answers_of(grammar, tokenizer, most) == {e for e in expected if len(e) <= most}


def test_boxes_are_tokenized_as_the_answers_that_a_model_is_trained_on(tokenizer):
    """A detector's own answers are accepted, and nothing after them."""
    box, mask = "<loc0001><loc0002><loc0003><loc1023>", "<seg001>" * 16
    texts = [
        (Boxes("4"), f"{box} 4"),
        (Boxes(["4", "two words"]), f"{box} 4 ; {box} two words ; {box} 4"),
        (Boxes(["4"]), ""),
        (Masks(["4"], most=2), f"{box}{mask} 4 ; {box}{mask} 4"),
    ]
    for grammar, text in texts:
        eos = tokenizer.eos_id
        automaton = compile_grammars([grammar], tokenizer, tokenizer.vocab_size, [eos])
        position = automaton.begin()
        for left, token in zip(range(200, 0, -1), [*tokenizer.encode(text), eos], strict=False):
            permitted = automaton.permitted(position, jnp.int32(left))
            assert permitted[0, token], (text, token)
            position = automaton.advance(position, jnp.array([token]))
        assert np.flatnonzero(automaton.permitted(position, jnp.int32(9))[0]).tolist() == [eos]


def count_malformed(predictor, count, grammar, limit) -> tuple[int, int]:
    """(boxes, malformed parts) of that many sampled answers at temperature 2."""
    boxes = malformed = 0
    prompts = ["detect 4 ; 3"] * count
    options = dict(sampler=HOT, allowed=grammar, max_new_tokens=limit, batch_size=250)
    for text in predictor.generate([str(DIGITS)] * count, prompts, **options):
        found = pg.parse_detections(text, SIZE)
        boxes += len(found)
        malformed += len(found.skipped) + any(box.label not in grammar.labels for box in found)
    return boxes, malformed


@pytest.mark.thorough
def test_no_sampled_box_is_malformed(predictor):
    """Without the grammar, nearly all of them are. The limit cuts no box either."""
    boxes, malformed = count_malformed(predictor, 250, Boxes(["4", "3", "two words"]), 20)
    assert boxes > 200 and malformed == 0
    free = predictor.generate(
        [str(DIGITS)] * 20, ["detect 4 ; 3"] * 20, sampler=HOT, max_new_tokens=20
    )
    assert sum(len(pg.parse_detections(text, SIZE).skipped) for text in free) > 20


@pytest.mark.slow
def test_no_box_of_5000_answers_is_malformed(predictor):
    boxes, malformed = count_malformed(predictor, 5000, Boxes(["4", "3", "two words"]), 30)
    print(f"{boxes} boxes, {malformed} malformed")
    assert boxes > 5000 and malformed == 0


def test_masks_have_all_of_their_codes(predictor):
    answers = predictor.generate(
        [str(DIGITS)] * 8, ["segment 4"] * 8, sampler=HOT, allowed=Masks("4", 1), max_new_tokens=25
    )
    for answer in answers:
        found = pg.parse_detections(answer, SIZE)
        assert len(found) == 1 and len(found[0].codes) == 16 and not found.skipped


def test_the_best_choice_is_the_one_with_the_best_score(predictor):
    texts = ["4 3 2 3", "3 2", "digits", "no"]
    scores = predictor.score([str(DIGITS)] * 4, ["ocr"] * 4, texts)
    for sampler in (pg.Beam(4), pg.Beam(8, length_penalty=0.0)):
        (answer,) = predictor.answers(
            str(DIGITS), "ocr", sampler=sampler, allowed=Choices(texts), max_new_tokens=8
        )
        if sampler.length_penalty == 0:
            assert answer.text == texts[int(np.argmax(scores))]
            assert answer.score == pytest.approx(max(scores), abs=1e-4)
        assert answer.text in texts


def test_each_prompt_follows_its_own_grammar(predictor):
    grammars = [Choices(["4 3", "no"]), Boxes("4", 1, 1), Text("digits"), Repeat(Text("3"), 2, 2)]
    images, prompts = [str(DIGITS)] * 4, ["ocr", "detect 4", "caption en", "ocr"]
    options = dict(sampler=HOT, max_new_tokens=12)
    together = predictor.generate(images, prompts, allowed=grammars, **options)
    alone = [
        predictor.generate(images[i], prompts[i], allowed=grammars[i], seeds=[i], **options)[0]
        for i in range(4)
    ]
    assert together == alone and together[2:] == ["digits", "33"]


def test_streams_and_best_of_follow_the_grammar(predictor):
    grammar = Boxes(["4", "3"], least=1)
    options = dict(sampler=HOT, allowed=grammar, max_new_tokens=30)
    text = "".join(predictor.stream(str(DIGITS), "detect 4 ; 3", seed=1, **options))
    assert text == predictor.generate(str(DIGITS), "detect 4 ; 3", seeds=[1], **options)[0]
    options["sampler"] = pg.BestOf(3, HOT)
    (best,) = predictor.generate(str(DIGITS), "detect 4 ; 3", **options)
    assert not pg.parse_detections(best, SIZE).skipped


def test_another_grammar_compiles_no_other_program(predictor):
    def run(*labels):
        predictor.generate(str(DIGITS), "detect 4", allowed=Boxes(labels, 1), max_new_tokens=20)
        return generate.prefill._cache_size(), generate.decode._cache_size()

    assert run("4") == run("3") == run("5", "6")


def test_a_shorter_limit_only_shortens_the_answer(predictor):
    """With 8 tokens one box fits, of 4 locations, a space, a label and eos."""
    for limit in (7, 8, 14):
        options = dict(allowed=Boxes("4", least=1), max_new_tokens=limit, sampler=HOT)
        for answer in predictor.answers([str(DIGITS)] * 4, ["detect 4"] * 4, **options):
            assert answer.tokens[-1] == 1 and len(answer.tokens) <= limit
            assert not pg.parse_detections(answer.text, SIZE).skipped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choices([]), "Choices must have a list of non-empty texts, got []"),
        (lambda: Choices("yes"), "Choices must have a list of non-empty texts, got 'yes'"),
        (lambda: Text(3), "Text must be a non-empty str, got 3"),
        (lambda: Boxes("a;b"), "a label of Boxes must not contain ; or < or start or end"),
        (lambda: Masks(["cat", " dog"]), "a label of Masks must not contain ; or <"),
        (lambda: Boxes("a", 3, 2), "Boxes must have integers least from 0 to most"),
        (lambda: Boxes("a", most=0), "most at least 1 or None, got least=0, most=0"),
        (lambda: Repeat(Text("a"), -1), "got least=-1, most=None"),
        (lambda: Sequence(["a"]), "Sequence must have grammars, such as Text('yes')"),
        (lambda: Either([]), "Either must have grammars"),
    ],
)
def test_a_wrong_grammar_is_one_sentence(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(allowed=[Text("a")] * 2), "one grammar per prompt, got 2 for 1 prompts"),
        (dict(allowed=Boxes("4", 2), max_new_tokens=9), "got 9: it needs 16"),
        (dict(allowed=Text("a"), min_new_tokens=1), "min_new_tokens must be 0 with a grammar"),
        (dict(allowed=["yes"]), "allowed must have grammars such as Choices(['yes', 'no'])"),
        (dict(allowed="yes"), "allowed must be a grammar"),
        (dict(allowed=Text("<image>")), "Text must not contain special tokens, got '<image>'"),
    ],
)
def test_a_grammar_that_does_not_fit_is_one_sentence(predictor, options, message):
    with pytest.raises(ValueError) as error:
        predictor.generate(str(DIGITS), "detect 4", **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_stacked_layers_give_the_same(predictor):
    stacked = pg.load("tiny", layers="stack")
    options = dict(sampler=HOT, allowed=Boxes(["4", "3"], 1), max_new_tokens=20)
    images, prompts = [str(DIGITS)] * 3, ["detect 4"] * 3
    assert stacked.generate(images, prompts, **options) == predictor.generate(
        images, prompts, **options
    )


def test_on_a_mesh_answers_are_the_same(predictor):
    options = dict(allowed=Boxes(["4", "3"], 1), max_new_tokens=20)
    expected = predictor.generate([str(DIGITS)] * 4, ["detect 4 ; 3"] * 4, **options)
    assert call(4, "constrained_answers", str(DIGITS)) == expected


llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}


def test_json_follows_its_schema(predictor):
    options = dict(sampler=HOT, allowed=Json(SCHEMA), max_new_tokens=60)
    answers = predictor.answers([str(DIGITS)] * 6, ["ocr"] * 6, **options)
    finished = [answer.text for answer in answers if answer.tokens[-1] == 1]
    assert len(finished) >= 3  # the limit cuts those with much white space
    for text in finished:
        value = json.loads(text)
        assert list(value) == ["count"] and 0 <= value["count"] <= 99


def test_a_regular_expression_is_followed_by_beams_and_samples(predictor):
    for sampler in (pg.Greedy(), pg.Beam(3), HOT):
        (text,) = predictor.generate(
            str(DIGITS), "ocr", sampler=sampler, allowed=Regex("[0-9] [0-9]( [0-9])?")
        )
        assert len(text.split()) in (2, 3) and text.replace(" ", "").isdigit()


def test_a_wrong_schema_is_one_sentence(predictor):
    for grammar in (Regex("((("), Json({"type": "nothing"}), Json("{")):
        with pytest.raises(ValueError, match="is not a valid grammar") as error:
            predictor.generate(str(DIGITS), "ocr", allowed=grammar)
        assert "\n" not in str(error.value)


def test_without_llguidance_the_error_names_the_extra(predictor, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'paligemma-jax\[grammars\]'"):
        predictor.generate(str(DIGITS), "ocr", allowed=Regex("[0-7]+"))


def test_the_command_line_takes_a_grammar(command, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    arguments = ("generate", "--image", DIGITS, "--prompt", "ocr", "--grammar")
    assert command(*arguments, "choices:no digits, none")[1] in ("no digits\n", "none\n")
    code, out, _ = command(*arguments, f"json:{schema}", "--max-new-tokens", 40)
    assert code == 0 and out.startswith("{")
    for grammar, message in {
        "boxes": "a grammar must be boxes:LABELS, masks:LABELS",
        "box:cat": "got 'box:cat'",
        "boxes:a,,b": "Boxes must have a list of non-empty texts",
        "json:missing.json": "no such file",
    }.items():
        code, out, err = command(*arguments, grammar)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
