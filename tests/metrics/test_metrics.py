"""Every metric against its reference implementation.

golden/metrics.json contains the output of published code for random cases: vqa, vqa_normalised from
vqaEval.py of GT-Vision-Lab/VQA at a013f00; pope from evaluate.py of RUCAIBox/POPE at 3df3ba1;
relaxed_accuracy, anls, tallyqa from the evaluators of google-research/big_vision at 0127fb6; ptb,
ptb_other from the PTBTokenizer (Java) of pycocoevalcap 1.2. CIDEr-D, BLEU and AP are compared live.
"""

import contextlib
import io
import json
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
from support.paths import GOLDEN

from paligemma_jax.metrics.answers import average_accuracy, normalise
from paligemma_jax.metrics.boxes import overlaps
from paligemma_jax.metrics.captions import non_entailment, split_sentences, tokenize
from paligemma_jax.metrics.registry import METRICS

CASES = json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["vqa", "relaxed_accuracy", "anls", "tallyqa"])
def test_answers_are_scored_as_published(name):
    cases, metric = CASES[name], METRICS[name]
    predictions, references, expected = map(list, zip(*cases, strict=True))
    assert len(cases) >= 200 and len(set(expected)) > 1
    np.testing.assert_allclose(metric.scores(predictions, references).each, expected, atol=1e-9)
    assert metric(predictions, references) == pytest.approx(np.mean(expected), abs=1e-9)


def test_vqa_normalisation_is_the_published_one():
    assert len(CASES["vqa_normalised"]) >= 200
    for answer, expected in CASES["vqa_normalised"]:
        assert normalise(answer) == expected, answer


@pytest.mark.parametrize(
    "prediction, people, accuracy",
    [
        ("2", ["2"] * 2 + ["3"] * 8, 0.6),  # two of ten: (2 * 1/3 + 8 * 2/3) / 10
        ("two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("red", ["red"] * 4 + ["blue"] * 6, 1),
        ("Red.", ["red"] * 4 + ["a blue"] * 6, 1),
        ("Red", ["red"] * 10, 0),  # all agree: nothing is normalised
        ("dont know", ["don't know"] * 4 + ["no"] * 6, 1),
        ("the left-hand side", ["left hand side"] * 5 + ["right"] * 5, 1),
        ("2,000", ["2000"] * 5 + ["1"] * 5, 1),
    ],
)
def test_vqa_worked_examples(prediction, people, accuracy):
    assert METRICS["vqa"]([prediction], [people]) == pytest.approx(accuracy)


def test_pope_is_scored_as_published():
    names = {
        "pope_accuracy": "Accuracy",
        "pope_precision": "Precision",
        "pope_recall": "Recall",
        "pope_f1": "F1 score",
    }
    assert sum(len(answers) for answers, _, _ in CASES["pope"]) >= 200
    for answers, labels, expected in CASES["pope"]:
        for name, key in names.items():
            assert METRICS[name](answers, labels) == pytest.approx(expected[key], abs=1e-9)
    assert METRICS["pope_precision"](["no"], ["yes"]) == 0


def test_exact_match_and_rsvqa():
    score = METRICS["exact_match"](["a ", "b", "C"], [["x", "a"], ["B"], ["C"]])
    assert score == pytest.approx(2 / 3)
    predictions, references = ["Yes", "3", "rural", "no"], ["yes", "4", "rural", "no"]
    assert METRICS["rsvqa"](predictions, references) == 0.75
    kinds = ["presence", "count", "area", "presence"]
    assert average_accuracy(predictions, references, kinds) == pytest.approx(2 / 3)


def test_relaxed_accuracy_worked_examples():
    correct = [("52", "50"), ("0.5", "50%"), ("Blue", "blue"), ("inf", "inf")]
    wrong = [("53", "50"), ("0.01", "0"), ("blu", "blue")]
    for pairs, score in ((correct, 1), (wrong, 0)):
        for prediction, reference in pairs:
            assert METRICS["relaxed_accuracy"]([prediction], [reference]) == score


# ---- Captions


def captions(rng, n):
    """Random captions, some of which are references of the same or of another image."""
    words = [
        "a",
        "man",
        "woman",
        "dog",
        "riding",
        "the",
        "on",
        "wave",
        "surfboard",
        "red",
        "bus",
        "street",
        "it",
        "is",
        "large",
        "small",
    ]

    def caption():
        return " ".join(rng.choice(words, rng.integers(0, 14)))

    def prediction(i):
        others = references[rng.integers(n)]
        return [caption(), references[i][0], rng.choice(others)][rng.integers(3)]

    references = [[caption() for _ in range(rng.integers(1, 6))] for _ in range(n)]
    return [prediction(i) for i in range(n)], references


def test_cider_equals_pycocoevalcap():
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    rng = np.random.default_rng(0)
    for n in (1, 2, 10, 30, *[8] * 25):
        predictions, references = captions(rng, n)
        candidates = {i: [text] for i, text in enumerate(predictions)}
        expected, each = Cider().compute_score(dict(enumerate(references)), candidates)
        scores = METRICS["cider"].scores(predictions, references)
        np.testing.assert_allclose(scores.each, each, atol=1e-9)
        assert scores.value() == pytest.approx(expected, abs=1e-9)
    assert scores.value() > 0.1


def test_bleu_equals_sacrebleu():
    rng = np.random.default_rng(0)
    for n in (1, 2, *[10] * 20):
        predictions, references = captions(rng, n)
        references = [[f"{text} a." for text in texts] for texts in references]
        expected = sacrebleu.corpus_bleu(predictions, list(zip_longest(*references))).score
        assert METRICS["bleu"](predictions, references) == pytest.approx(expected, abs=1e-9)


def test_tokens_equal_ptbtokenizer():
    """The rules were developed on `ptb`; `ptb_other` was made afterwards, with other words."""
    wrong = [text for text, tokens in CASES["ptb"] if tokenize(text) != tokens.split()]
    assert len(CASES["ptb"]) == 310 and len(wrong) == 2  # an address before "!", "a." at the end
    assert len(CASES["ptb_other"]) == 300
    assert all(tokenize(text) == tokens.split() for text, tokens in CASES["ptb_other"])


def test_long_captions():
    expected = ["A view of St. Louis, at 3.5 km.", 'The sign says "STOP!"']
    expected += ["Mr. X is there (why?) and waits.", "No. 5 drives by.", "Indoors."]
    text = " ".join(expected[:4]) + "\n" + expected[4]
    assert split_sentences(text) == expected
    assert METRICS["sentences"]([text, ""], ["", ""]) == 2.5
    assert METRICS["characters"](["abc", ""], ["", ""]) == 1.5
    facts = {"A dog.": True, "A cat.": False, "Wow.": None}
    captions = ["A dog. A cat. Wow.", "A dog. A dog. A dog."]
    nes = non_entailment(captions, [facts, facts], judge=lambda sentence, facts: facts[sentence])
    assert nes == 0.2


# ---- Boxes


def make_object(label, box, score=1.0):
    return SimpleNamespace(label=str(label), box=np.asarray(box, float), score=float(score))


def random_objects(rng, n):
    """Labelled objects of n images, many with equal scores or boxes, and detections near them."""

    def box():
        return np.tile(rng.uniform(0, 80, 2), 2) + [0, 0, *rng.uniform(1, 40, 2)]

    def detect(item):
        label = item.label if rng.random() < 0.8 else 3
        shifted = item.box + rng.normal(0, rng.choice([0, 1, 3]), 4)
        return make_object(label, shifted, rng.choice([0.2, 0.5, rng.random()]))

    def noise():
        return make_object(rng.integers(4), box(), rng.random())

    references, predictions = [], []
    for _ in range(n):
        objects = [make_object(rng.integers(3), box()) for _ in range(rng.integers(0, 5))]
        seen = [item for item in objects for _ in range(rng.integers(0, 3))]
        detections = [detect(item) for item in seen]
        predictions.append(detections + [noise() for _ in range(rng.integers(0, 3))])
        references.append(objects)
    return predictions, references


def coco_evaluation(predictions, references):
    """AP, AP50 and AP75 of pycocotools."""
    coco = pytest.importorskip("pycocotools.coco")
    COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

    def annotation(number, image, item):
        y0, x0, y1, x1 = item.box
        about = {"id": number, "image_id": image, "category_id": int(item.label)}
        return about | {
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": 100.0,
            "iscrowd": 0,
            "score": item.score,
        }

    def dataset(images):
        numbered = [(i, item) for i, objects in enumerate(images) for item in objects]
        result = coco.COCO()
        result.dataset = {
            "images": [{"id": i} for i in range(len(images))],
            "annotations": [annotation(k, i, item) for k, (i, item) in enumerate(numbered, 1)],
            "categories": [{"id": c} for c in range(4)],
        }
        result.createIndex()
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset(references), dataset(predictions), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:3]


def test_average_precision_equals_pycocotools():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 12, *[6] * 40]
    assert sum(sizes) >= 200
    for n in sizes:
        predictions, references = random_objects(rng, n)
        if any(references):
            names = ("average_precision", "ap50", "ap75")
            values = [METRICS[name](predictions, references) for name in names]
            expected = coco_evaluation(predictions, references)
            np.testing.assert_allclose(values, expected, atol=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_references_with_equal_iou_the_last_is_matched(order):
    """The next detection gets the first reference, or none."""
    references = [make_object(0, [0, 0, 10, 10]), make_object(0, [0, 4, 10, 14])][::order]
    detections = [make_object(0, [0, 2, 10, 12], 0.9), make_object(0, [0, 0, 10, 9], 0.8)]
    expected = coco_evaluation([detections], [references])[1]
    value = METRICS["ap50"]([detections], [references])
    assert value == pytest.approx(expected, abs=1e-9) and (expected == 1) == (order == 1)


def test_at_most_100_detections_of_a_label_count():
    rng = np.random.default_rng(1)
    images = [random_objects(rng, 1) for _ in range(40)]
    predictions = [[item for (objects,), _ in images for item in objects] * 4]
    references = [[item for _, (objects,) in images for item in objects]]
    assert len(predictions[0]) > 300
    value = METRICS["ap50"](predictions, references)
    np.testing.assert_allclose(value, coco_evaluation(predictions, references)[1], atol=1e-9)


def test_informative_scores_raise_ap():
    correct, wrong = [0, 0, 10, 10], [50, 50, 60, 60]
    for scores, expected in (((0.1, 0.9), 1), ((0.9, 0.1), 0.5)):
        detections = [make_object(3, wrong, scores[0]), make_object(3, correct, scores[1])]
        assert METRICS["ap50"]([detections], [[make_object(3, correct)]]) == expected


def test_boxes_and_masks_of_refcoco():
    box, half = [0, 0, 10, 10], [0, 0, 10, 5]
    ious = overlaps([box], [half, [5, 5, 15, 15], [20, 20, 30, 30]])
    assert ious[0].tolist() == pytest.approx([0.5, 25 / 175, 0])
    accuracy = METRICS["box_accuracy"]([box, box, None], [half, [0, 0, 10, 4.9], [0, 0, 1, 1]])
    assert accuracy == pytest.approx(1 / 3)
    assert METRICS["box_iou"]([box, None], [half, [0, 0, 1, 1]]) == 0.25
    upper, middle = np.zeros((2, 4, 4), bool)
    upper[:2], middle[1:3] = True, True
    iou = METRICS["mask_iou"]([upper, None, upper], [middle, upper, upper])
    assert iou == pytest.approx((1 / 3 + 0 + 1) / 3)
    with pytest.raises(ValueError, match=r"shape of the reference, \(2, 2\), got \(4, 4\)"):
        METRICS["mask_iou"]([upper], [np.ones((2, 2), bool)])


def test_mask_iou_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)

    def encode(mask):
        return coco.encode(np.asfortranarray(mask.astype(np.uint8)))

    masks = rng.random((200, 2, 13, 9)) < rng.random((200, 2, 1, 1))
    expected = [coco.iou([encode(a)], [encode(b)], [0])[0, 0] for a, b in masks]
    scores = METRICS["mask_iou"].scores(list(masks[:, 0]), list(masks[:, 1]))
    np.testing.assert_allclose(scores.each, expected, atol=1e-9)


# ---- All metrics


def test_the_total_of_a_resampling_is_the_metric_of_the_resampled_cases():
    rng = np.random.default_rng(3)
    chosen = np.array([0, 0, 2, 5, 5, 5, 7])
    weights = np.bincount(chosen, minlength=8)
    answers, labels = rng.choice(["yes", "no"], (2, 8)).tolist()
    words = ["a", "red", "dog", "on", "a", "wide", "street"]
    captions = ["a red dog on a street"] * 8, [[" ".join(rng.permutation(words))] for _ in range(8)]
    cases = {
        "pope_f1": (answers, labels),
        "exact_match": (answers, labels),
        "average_precision": random_objects(rng, 8),
        "bleu": captions,
    }
    for name, (predictions, references) in cases.items():
        total = METRICS[name].scores(predictions, references).total(weights)
        resampled = [[side[i] for i in chosen] for side in (predictions, references)]
        tolerance = 0.03 if name == "average_precision" else 1e-9  # order of equal scores
        assert total == pytest.approx(METRICS[name](*resampled), abs=tolerance), name


@pytest.mark.parametrize(
    "name, predictions, references, error",
    [
        ("exact_match", ["a"], [], "1 predictions for 0 references"),
        ("cider", [], [], "0 predictions for 0 references"),
        ("vqa", ["a"], ["a"], "VQAv2 has ten"),
        ("cider", ["a"], [[]], "case 0 has no reference"),
    ],
)
def test_cases_that_cannot_be_scored_are_refused(name, predictions, references, error):
    with pytest.raises(ValueError, match=error):
        METRICS[name](predictions, references)
