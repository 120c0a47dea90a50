"""Answers with boxes as training sequences: order, noise boxes, and what is trained of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.data.rows import Example
from paligemma_jax.processing.locations import parse_detections
from paligemma_jax.training.batches import Batcher, encode_example, training_batch
from paligemma_jax.training.box_sequences import NOISE, BoxSequences, location_ids

PHOTO = str(TINY.parent / "digits.jpg")
SMALL = "<loc0100><loc0100><loc0200><loc0200> 3"
LARGE = "<loc0300><loc0050><loc0900><loc0800> 4"
TOP = "<loc0010><loc0500><loc0210><loc0700> 5"
EXAMPLE = Example((PHOTO,), "detect 3 ; 4 ; 5", f"{SMALL} ; {LARGE} ; {TOP}", 1.0, 1)


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "order,expected",
    [
        ("given", [SMALL, LARGE, TOP]),
        ("area", [LARGE, TOP, SMALL]),
        ("position", [TOP, SMALL, LARGE]),
    ],
)
def test_boxes_are_ordered(order, expected):
    assert BoxSequences(order)(EXAMPLE, rng()).suffix == " ; ".join(expected)


def test_a_random_order_differs_from_step_to_step():
    orders = {BoxSequences("random")(EXAMPLE, rng(seed)).suffix for seed in range(30)}
    assert len(orders) == 6
    assert BoxSequences("random")(EXAMPLE, rng(3)) == BoxSequences("random")(EXAMPLE, rng(3))


def test_noise_boxes_follow_the_objects():
    suffix = BoxSequences("given", 20)(EXAMPLE, rng()).suffix
    found = parse_detections(suffix, (640, 480))
    assert not found.skipped and len(found) == 20  # all have an area
    assert [d.label for d in found] == ["3", "4", "5"] + [NOISE] * 17
    assert suffix.startswith(EXAMPLE.suffix)


@pytest.mark.parametrize("suffix", ["four digits: 4, 3, 2 and 3", "a box <loc0001>", SMALL[:-2]])
def test_other_answers_are_not_changed(suffix):
    example = replace(EXAMPLE, prefix="caption en", suffix=suffix)
    changed = BoxSequences("random", 0)(example, rng())
    assert changed.suffix == suffix


def test_an_answer_without_objects_is_noise_only():
    nothing = replace(EXAMPLE, suffix="")
    suffix = BoxSequences("given", 4)(nothing, rng()).suffix
    assert re.findall(NOISE, suffix) == [NOISE] * 4
    assert BoxSequences("given", 4)(replace(nothing, prefix="ocr"), rng()).suffix == ""


def test_masks_get_no_noise():
    masked = replace(
        EXAMPLE, suffix="<loc0100><loc0100><loc0200><loc0200>" + "<seg001>" * 16 + " 3"
    )
    assert BoxSequences("given", 4)(masked, rng()) == masked


def test_locations_of_noise_are_not_targets(tiny):
    processor = tiny.processor
    example = BoxSequences("given", 5)(EXAMPLE, rng())
    row = encode_example(example, processor, None)
    fields = processor.pad([row, encode_example(EXAMPLE, processor, None)], "right")
    ids = location_ids(processor.tokenizer)
    is_location = np.isin(fields["tokens"], list(ids))
    assert len(ids) == 1024
    assert (is_location & fields["targets"])[0].sum() == 12 and is_location[0].sum() == 20
    # Nothing else of the answers: labels, separators and the end are trained.
    untrained = fields["valid"] & ~fields["prefix"] & ~fields["targets"]
    assert untrained.sum(axis=1).tolist() == [8, 0] and not (untrained & ~is_location).any()


def test_a_run_trains_on_sequences(tiny):
    config = pg.FinetuneConfig(
        data="", output="", box_order="random", noise_boxes=6, batch_size=2, accumulate=1
    )
    batcher = Batcher(tiny.processor, 2, None, range(2))
    batches = [training_batch(config, batcher, [EXAMPLE] * 4, step) for step in (0, 1, 0)]
    np.testing.assert_array_equal(batches[0].inputs.tokens, batches[2].inputs.tokens)
    assert (batches[0].inputs.tokens != batches[1].inputs.tokens).any()


def test_sequences_must_fit_the_length(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"image": PHOTO, "prefix": "detect 3", "suffix": SMALL}
    rows.write_text(json.dumps(row) + "\n")
    config = pg.FinetuneConfig(
        data=str(rows), output=str(tmp_path / "run"), noise_boxes=30, length=100, steps=1
    )
    with pytest.raises(ValueError, match=r"line 1: .* but length is 100"):
        pg.finetune(config)
    assert not (tmp_path / "run").exists()


def test_the_confidence_may_be_that_of_the_label():
    pieces = [("<loc0100>", -1.0), ("<loc0100>", -1.0), ("<loc0200>", -1.0), ("<loc0200>", -1.0)]
    (found,) = parse_detections([*pieces, (" 3", -0.5)], (640, 480), "label")
    assert found.score == pytest.approx(np.exp(-0.5))
    (found,) = parse_detections([*pieces, (" 3", -0.5)], (640, 480))
    assert found.score == pytest.approx(np.exp(-0.9))
