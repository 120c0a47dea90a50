"""The scenes that the embedded checkpoint is trained and judged on."""

import numpy as np
import pytest

from paligemma_jax.processing.locations import box_iou
from paligemma_jax.processing.mask_codec import load_codec
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tiny import digits, probe, recipe

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def scenes():
    return digits.compose(np.random.default_rng(0), digits.glyphs(held_out=True), 200)


def test_the_split_is_fixed_and_without_overlap():
    (train, train_labels), (held_out, held_out_labels) = digits.scans(False), digits.scans(True)
    assert len(held_out) == digits.HELD_OUT and len(train) + len(held_out) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in held_out}
    assert set(train_labels) == set(held_out_labels) == set(range(10))
    assert held_out_labels[:8].tolist() == FIRST_HELD_OUT


FIRST_HELD_OUT = [2, 2, 0, 8, 7, 8, 3, 4]


def test_bent_copies_keep_their_labels():
    plain, bent = digits.glyphs(held_out=True), digits.glyphs(held_out=True, copies=2)
    assert bent.labels.tolist() == plain.labels.tolist() * 2
    close = np.abs(bent.alpha[: len(plain.alpha)] - plain.alpha).mean((1, 2))
    other = np.abs(bent.alpha[: len(plain.alpha)] - np.roll(plain.alpha, 1, axis=0)).mean((1, 2))
    assert 0.01 < close.mean() < 0.6 * other.mean()


def test_scenes_are_the_same_for_the_same_seed(scenes):
    again = digits.compose(np.random.default_rng(0), digits.glyphs(held_out=True), 200)
    other = digits.compose(np.random.default_rng(1), digits.glyphs(held_out=True), 200)
    np.testing.assert_array_equal(scenes.images, again.images)
    np.testing.assert_array_equal(scenes.boxes, again.boxes)
    assert (scenes.images != other.images).any()


def test_digits_stand_apart_in_reading_order_and_inside(scenes):
    for labels, boxes in zip(scenes.labels, scenes.boxes):
        count = (labels >= 0).sum()
        assert 1 <= count <= digits.MAX_DIGITS and (labels[count:] == -1).all()
        boxes = boxes[:count]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= digits.SIZE).all() and (boxes[:, :2] < boxes[:, 2:]).all()
        assert (np.diff(boxes[:, 1] + boxes[:, 3]) >= 0.08 * digits.SIZE).all()
        assert all(box_iou(boxes[i], boxes[j]) == 0 for i in range(count) for j in range(i))
    assert np.bincount((scenes.labels >= 0).sum(1), minlength=5)[1:].min() > 25


@pytest.mark.parametrize("canvas", [(112, 112), (120, 200)])
def test_boxes_hold_the_ink_and_touch_it_on_every_side(canvas):
    """On a canvas that is not square, so that swapped axes show; black on plain white, so that ink is what is dark."""
    scenes = digits.compose(np.random.default_rng(0), digits.glyphs(held_out=True), 30, canvas, variety=0)
    assert scenes.images.shape[1:] == (*canvas, 3)
    for image, labels, boxes in zip(scenes.images, scenes.labels, scenes.boxes):
        ink = image.min(-1) < 225
        for (y0, x0, y1, x1), label in zip(boxes, labels):
            if label >= 0:
                inside = ink[y0:y1, x0:x1]
                rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
                assert rows[0] <= 2 and rows[-1] >= y1 - y0 - 3 and columns[0] <= 2 and columns[-1] >= x1 - x0 - 3
                ink[y0:y1, x0:x1] = False
        assert not ink.any()


def test_ink_differs_from_its_background(scenes):
    for image, labels, boxes in zip(scenes.images, scenes.labels, scenes.boxes):
        for (y0, x0, y1, x1), label in zip(boxes, labels):
            if label >= 0:
                low, high = np.percentile(image[y0:y1, x0:x1].mean(-1), [3, 97])
                assert high - low > 40


def test_questions_and_answers():
    scenes = digits.Scenes(
        np.zeros((2, 100, 200, 3), np.uint8), np.array([[3, 5, 3, -1], [7, -1, -1, -1]]),
        np.array([[[10, 20, 50, 60], [0, 100, 25, 120], [50, 150, 100, 200], [0] * 4], [[0, 0, 100, 100], *[[0] * 4] * 3]]), np.zeros((2, 4), int),
    )  # fmt: skip
    assert digits.ask(scenes, 0, "caption") == ("caption en", "three digits: 3, 5 and 3")
    assert digits.ask(scenes, 1, "caption") == ("caption en", "one digit: 7")
    assert digits.ask(scenes, 0, "ocr") == ("ocr", "3 5 3")
    assert digits.ask(scenes, 0, "count") == ("answer en how many digits?", "3")
    found = "<loc0102><loc0102><loc0512><loc0307> 3 ; <loc0512><loc0767><loc1023><loc1023> 3"  # y before x
    assert digits.ask(scenes, 0, "detect", 3) == ("detect 3", found)
    assert digits.ask(scenes, 1, "detect", 0) == ("detect 0", "")


def test_masks_are_the_ink():
    """On a canvas that is not square; and the answers to `segment` are boxes, 16 codes and the digit, which give the ink back."""
    scenes = digits.compose(np.random.default_rng(0), digits.coded(digits.glyphs(held_out=True)), 30, (120, 200), variety=0)
    assert scenes.masks is not None and scenes.masks.shape == (30, 4, 120, 200)
    clear = scenes.images[..., 0] != 127  # half ink, rounded down
    np.testing.assert_array_equal(scenes.masks.any(1)[clear], scenes.images[..., 0][clear] < 127)
    asked = [scene[0] for scene in map(scenes.digits, range(30))]
    answers = [digits.ask(scenes, i, "segment", digit)[1] for i, digit in enumerate(asked)]
    assert all(answer.count("<loc") * 4 == answer.count("<seg") and answer.endswith(f" {digit}") for answer, digit in zip(answers, asked))
    codec = load_codec(digits.CODEC)
    found = digits.mask_overlaps(answers, scenes, asked, codec)
    assert len(found) >= 30 and np.mean(found) > 0.9
    assert digits.mask_overlaps([""] * 30, scenes, asked, codec) == [0.0] * len(found)
    assert np.mean(digits.mask_overlaps(answers[1:] + answers[:1], scenes, asked, codec)) < 0.2


def test_score_counts_every_find_once():
    truth = "<loc0000><loc0000><loc0100><loc0100> 3 ; <loc0500><loc0500><loc0600><loc0600> 3"
    assert digits.score_answers("detect", [truth], [truth]) == {"exact": 1, "found": 1, "spurious": 0}
    twice = "<loc0000><loc0000><loc0100><loc0100> 3 ; <loc0000><loc0010><loc0100><loc0110> 3"
    assert digits.score_answers("detect", [twice], [truth]) == {"exact": 0, "found": 0.5, "spurious": 0.5}
    assert digits.score_answers("detect", [truth.replace(" 3", " 8")], [truth]) == {"exact": 0, "found": 0, "spurious": 1}
    assert digits.score_answers("detect", ["", truth], ["", truth]) == {"exact": 1, "found": 1, "spurious": 0}
    assert digits.score_answers("ocr", ["3 5", "3"], ["3 5", "3 5"]) == {"exact": 0.5}


@pytest.mark.parametrize("task", digits.PROMPTS)
def test_held_out_samples(task):
    samples = digits.heldout(task, 20, seed=3)
    again, other = digits.heldout(task, 20, seed=3), digits.heldout(task, 20, seed=4)
    assert [sample[1:] for sample in samples] == [sample[1:] for sample in again] != [sample[1:] for sample in other]
    for image, prompt, answer in samples:
        assert image.shape == (digits.SIZE, digits.SIZE, 3) and image.dtype == np.uint8
        assert prompt.startswith(digits.PROMPTS[task][:6]) and (answer or task in ("detect", "segment"))


def test_patch_targets_name_the_digit_that_covers_most_of_a_patch(scenes):
    source = digits.glyphs(held_out=True)
    targets = probe.patch_targets(scenes, source, 8)
    for i in range(20):
        for k, (y0, x0, y1, x1) in enumerate(scenes.boxes[i][scenes.labels[i] >= 0]):
            patch = (y0 + y1) // 28 * 8 + (x0 + x1) // 28  # the one under the middle of the box; no other box comes near
            assert targets["label"][i, patch] == scenes.labels[i, k] and targets["place"][i, patch] == k
            np.testing.assert_allclose(targets["box"][i, patch] * digits.SIZE, [y0, x0, y1, x1], rtol=1e-6)
            np.testing.assert_allclose(targets["look"][i, patch].mean(), source.alpha[scenes.glyphs[i, k]].mean(), rtol=1e-5)
        covered = (targets["label"][i] < 10).sum()
        assert 0 < covered < 64 and ((targets["place"][i] == digits.MAX_DIGITS) == (targets["label"][i] == 10)).all()


def test_neighbouring_locations_start_alike():
    table = np.asarray(probe.waves(1024, 160))
    np.testing.assert_allclose((table**2).sum(1), 1, rtol=1e-5)
    likeness = table @ table[500]
    assert likeness.argmax() == 500 and likeness[510] > 0.7 > 0.4 > likeness[600] and (np.diff(likeness[500:530]) < 0).all()


def test_the_tokenizer_is_made_as_gemmas_is(tmp_path):
    recipe.train_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.loc(1023) - tokenizer.loc(0) == 1023 and tokenizer.seg(0) == tokenizer.loc(1023) + 1
    assert tokenizer.image_id == tokenizer.seg(127) + 1 == tokenizer.vocab_size - 1
    assert len(tokenizer.encode("37")) == 2 and len(tokenizer.encode("<loc0037>")) == 1 and len(tokenizer.encode("\n")) == 1
    assert tokenizer.decode(tokenizer.encode("Grüße, 漢字")) == "Grüße, 漢字"
