"""Questions about scenes, and the scores of answers."""

import numpy as np
import pytest

from paligemma_jax.processing.mask_codec import load_codec
from paligemma_jax.tiny.digits import CODEC, glyphs, with_codes
from paligemma_jax.tiny.questions import PROMPTS, ask, heldout_examples, mask_ious, score_answers
from paligemma_jax.tiny.scenes import SIZE, Scenes, compose

pytest.importorskip("sklearn")


def test_answers_describe_the_scene():
    none = [0] * 4
    scenes = Scenes(
        images=np.zeros((2, 100, 200, 3), np.uint8),
        labels=np.array([[3, 5, 3, -1], [7, -1, -1, -1]]),
        boxes=np.array(
            [
                [[10, 20, 50, 60], [0, 100, 25, 120], [50, 150, 100, 200], none],
                [[0, 0, 100, 100], none, none, none],
            ]
        ),
        glyphs=np.zeros((2, 4), int),
    )
    assert ask(scenes, 0, "caption") == ("caption en", "three digits: 3, 5 and 3")
    assert ask(scenes, 1, "caption") == ("caption en", "one digit: 7")
    assert ask(scenes, 0, "ocr") == ("ocr", "3 5 3")
    assert ask(scenes, 0, "count") == ("answer en how many digits?", "3")
    boxes = "<loc0102><loc0102><loc0512><loc0307> 3 ; <loc0512><loc0767><loc1023><loc1023> 3"
    assert ask(scenes, 0, "detect", 3) == ("detect 3", boxes)  # y before x
    assert ask(scenes, 1, "detect", 0) == ("detect 0", "")


def test_answers_to_segment_give_the_ink_back():
    """Answers are boxes, 16 codes and the digit, here on a canvas that is not square."""
    source = with_codes(glyphs(held_out=True))
    scenes = compose(np.random.default_rng(0), source, 30, (120, 200), variety=0)
    digits = [scenes.digits(i)[0] for i in range(30)]
    answers = [ask(scenes, i, "segment", digit)[1] for i, digit in enumerate(digits)]
    for answer, digit in zip(answers, digits, strict=True):
        assert answer.count("<loc") * 4 == answer.count("<seg") and answer.endswith(f" {digit}")
    codec = load_codec(CODEC)
    ious = mask_ious(answers, scenes, digits, codec)
    assert len(ious) >= 30 and np.mean(ious) > 0.9
    assert mask_ious([""] * 30, scenes, digits, codec) == [0.0] * len(ious)
    assert np.mean(mask_ious(answers[1:] + answers[:1], scenes, digits, codec)) < 0.2


def test_every_box_is_matched_once():
    first = "<loc0000><loc0000><loc0100><loc0100> 3"
    truth = f"{first} ; <loc0500><loc0500><loc0600><loc0600> 3"
    twice = f"{first} ; <loc0000><loc0010><loc0100><loc0110> 3"
    wrong_label = truth.replace(" 3", " 8")
    perfect = {"exact": 1, "found": 1, "spurious": 0}
    assert score_answers("detect", [truth], [truth]) == perfect
    half = {"exact": 0, "found": 0.5, "spurious": 0.5}
    assert score_answers("detect", [twice], [truth]) == half
    none = {"exact": 0, "found": 0, "spurious": 1}
    assert score_answers("detect", [wrong_label], [truth]) == none
    assert score_answers("detect", ["", truth], ["", truth]) == perfect
    assert score_answers("ocr", ["3 5", "3"], ["3 5", "3 5"]) == {"exact": 0.5}


@pytest.mark.parametrize("task", PROMPTS)
def test_heldout_examples_depend_on_the_seed_only(task):
    examples, again, different = (heldout_examples(task, 20, seed) for seed in (3, 3, 4))
    texts, same, others = ([row[1:] for row in rows] for rows in (examples, again, different))
    assert texts == same != others
    for image, prompt, answer in examples:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert prompt.startswith(PROMPTS[task][:6])
        assert answer or task in ("detect", "segment")
