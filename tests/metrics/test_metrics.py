"""Every metric against its reference. golden/metrics.json holds what published code said of random cases, made by running it:

vqa, vqa_normalised: vqaEval.py of GT-Vision-Lab/VQA at a013f00; pope: evaluate.py of RUCAIBox/POPE at 3df3ba1; relaxed_accuracy, anls, tallyqa: the
evaluators of google-research/big_vision at 0127fb6; ptb, ptb_other: pycocoevalcap 1.2's PTBTokenizer (Java). CIDEr-D, BLEU and AP are compared live.
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

from paligemma_jax.metrics import registry
from paligemma_jax.metrics.answers import normalise
from paligemma_jax.metrics.boxes import overlaps
from paligemma_jax.metrics.captions import split_sentences, tokenize

CASES = json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["vqa", "relaxed_accuracy", "anls", "tallyqa"])
def test_answers_are_scored_as_published(name):
    cases, metric = CASES[name], getattr(registry, name)
    predictions, references, wanted = map(list, zip(*cases))
    assert len(cases) >= 200 and len(set(wanted)) > 1
    np.testing.assert_allclose(metric.scores(predictions, references).each, wanted, atol=1e-9)
    assert metric(predictions, references) == pytest.approx(np.mean(wanted), abs=1e-9)


def test_vqa_normalisation_is_the_published_one():
    assert len(CASES["vqa_normalised"]) >= 200
    for answer, wanted in CASES["vqa_normalised"]:
        assert normalise(answer) == wanted, answer


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
    assert registry.vqa([prediction], [people]) == pytest.approx(accuracy)


def test_pope_is_counted_as_published():
    names = {"pope_accuracy": "Accuracy", "pope_precision": "Precision", "pope_recall": "Recall", "pope_f1": "F1 score"}
    assert sum(len(answers) for answers, _, _ in CASES["pope"]) >= 200
    for answers, labels, wanted in CASES["pope"]:
        for name, key in names.items():
            assert getattr(registry, name)(answers, labels) == pytest.approx(wanted[key], abs=1e-9)
    assert registry.pope_precision(["no"], ["yes"]) == 0


def test_exact_match_and_rsvqa():
    assert registry.exact_match(["a ", "b", "C"], [["x", "a"], ["B"], ["C"]]) == pytest.approx(2 / 3)
    assert registry.rsvqa(["Yes", "3", "rural", "no"], ["yes", "4", "rural", "no"]) == 0.75
    assert registry.average_accuracy(
        ["Yes", "3", "rural", "no"], ["yes", "4", "rural", "no"], ["presence", "count", "area", "presence"]
    ) == pytest.approx(2 / 3)


def test_relaxed_accuracy_worked_examples():
    score = lambda said, right: registry.relaxed_accuracy([said], [right])
    assert score("52", "50") == 1 and score("53", "50") == 0 and score("0.5", "50%") == 1 and score("0.01", "0") == 0
    assert score("Blue", "blue") == 1 and score("blu", "blue") == 0 and score("inf", "inf") == 1


# ---- Captions


def captions(rng, n):
    words = ["a", "man", "woman", "dog", "riding", "the", "on", "wave", "surfboard", "red", "bus", "street", "it", "is", "large", "small"]
    make = lambda: " ".join(rng.choice(words, rng.integers(0, 14)))
    references = [[make() for _ in range(rng.integers(1, 6))] for _ in range(n)]
    near = lambda i: [make(), references[i][0], rng.choice(references[rng.integers(n)])][rng.integers(3)]
    return [near(i) for i in range(n)], references


def test_cider_is_pycocoevalcaps():
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    rng = np.random.default_rng(0)
    for n in (1, 2, 10, 30, *[8] * 25):
        predictions, references = captions(rng, n)
        wanted, each = Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)})
        scores = registry.cider.scores(predictions, references)
        np.testing.assert_allclose(scores.each, each, atol=1e-9)
        assert scores.value() == pytest.approx(wanted, abs=1e-9)
    assert scores.value() > 0.1


def test_bleu_is_sacrebleus():
    rng = np.random.default_rng(0)
    for n in (1, 2, *[10] * 20):
        predictions, references = captions(rng, n)
        references = [[f"{text} a." for text in texts] for texts in references]
        wanted = sacrebleu.corpus_bleu(predictions, list(zip_longest(*references))).score
        assert registry.bleu(predictions, references) == pytest.approx(wanted, abs=1e-9)


def test_tokens_are_those_of_ptbtokenizer():
    """Whose rules were looked at with `ptb`; `ptb_other` was made afterwards, of other words."""
    wrong = [text for text, tokens in CASES["ptb"] if tokenize(text) != tokens.split()]
    assert len(CASES["ptb"]) == 310 and len(wrong) == 2  # an address before "!", "a." at the end
    assert len(CASES["ptb_other"]) == 300 and all(tokenize(text) == tokens.split() for text, tokens in CASES["ptb_other"])


def test_long_captions():
    text = 'A view of St. Louis, at 3.5 km. The sign says "STOP!" Mr. X is there (why?) and waits. No. 5 drives by.\nIndoors.'
    wanted = ["A view of St. Louis, at 3.5 km.", 'The sign says "STOP!"', "Mr. X is there (why?) and waits.", "No. 5 drives by.", "Indoors."]
    assert split_sentences(text) == wanted
    assert registry.sentences([text, ""], ["", ""]) == 2.5 and registry.characters(["abc", ""], ["", ""]) == 1.5
    true = {"A dog.": True, "A cat.": False, "Wow.": None}
    assert registry.non_entailment(["A dog. A cat. Wow.", "A dog. A dog. A dog."], [true, true], judge=lambda sentence, facts: facts[sentence]) == 0.2


# ---- Boxes


def pictures(rng, n):
    """Objects with labels, many of one score, some alike; the found ones more or less where they are."""
    make = lambda label, box, score=1.0: SimpleNamespace(label=str(label), box=np.asarray(box), score=float(score))
    box = lambda: np.tile(rng.uniform(0, 80, 2), 2) + [0, 0, *rng.uniform(1, 40, 2)]
    references, predictions = [], []
    for _ in range(n):
        right = [make(rng.integers(3), box()) for _ in range(rng.integers(0, 5))]
        near = [thing for thing in right for _ in range(rng.integers(0, 3))]
        found = [
            make(thing.label if rng.random() < 0.8 else 3, thing.box + rng.normal(0, rng.choice([0, 1, 3]), 4), rng.choice([0.2, 0.5, rng.random()]))
            for thing in near
        ]
        predictions.append(found + [make(rng.integers(4), box(), rng.random()) for _ in range(rng.integers(0, 3))])
        references.append(right)
    return predictions, references


def coco_evaluation(predictions, references):
    coco = pytest.importorskip("pycocotools.coco")
    COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

    def dataset(pictures):
        found, corner = coco.COCO(), lambda box: [box[1], box[0], box[3] - box[1], box[2] - box[0]]
        things = [(i, thing) for i, picture in enumerate(pictures) for thing in picture]
        rows = [
            {"id": k, "image_id": i, "category_id": int(t.label), "bbox": corner(t.box), "area": 100.0, "iscrowd": 0, "score": t.score}
            for k, (i, t) in enumerate(things, 1)
        ]
        found.dataset = {"images": [{"id": i} for i in range(len(pictures))], "annotations": rows, "categories": [{"id": c} for c in range(4)]}
        found.createIndex()
        return found

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset(references), dataset(predictions), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:3]


def test_average_precision_is_pycocotools():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 12, *[6] * 40]
    assert sum(sizes) >= 200
    for n in sizes:
        predictions, references = pictures(rng, n)
        if any(references):
            found = [metric(predictions, references) for metric in (registry.average_precision, registry.ap50, registry.ap75)]
            np.testing.assert_allclose(found, coco_evaluation(predictions, references), atol=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_that_fit_alike_the_last_is_taken(order):
    """Which leaves the first, or nothing, to the next."""
    make = lambda box, score=1.0: SimpleNamespace(label="0", box=np.array(box, float), score=score)
    right = [make([0, 0, 10, 10]), make([0, 4, 10, 14])][::order]
    found = [make([0, 2, 10, 12], 0.9), make([0, 0, 10, 9], 0.8)]
    wanted = coco_evaluation([found], [right])[1]
    assert registry.ap50([found], [right]) == pytest.approx(wanted, abs=1e-9) and (wanted == 1) == (order == 1)


def test_only_a_hundred_objects_of_a_label_count():
    rng = np.random.default_rng(1)
    predictions, references = zip(*(pictures(rng, 1) for _ in range(40)))
    predictions, references = (
        [[thing for one in many for thing in one[0]] * k for many in (side,)] for side, k in ((predictions, 4), (references, 1))
    )
    assert len(predictions[0]) > 300
    np.testing.assert_allclose(registry.ap50(predictions, references), coco_evaluation(predictions, references)[1], atol=1e-9)


def test_scores_that_know_better_give_a_higher_ap():
    make = lambda box, score: SimpleNamespace(label="3", box=box, score=score)
    right, wrong = [0, 0, 10, 10], [50, 50, 60, 60]
    ap = lambda *scores: registry.ap50([[make(wrong, scores[0]), make(right, scores[1])]], [[make(right, 1)]])
    assert ap(0.1, 0.9) == 1 and ap(0.9, 0.1) == 0.5


def test_boxes_and_masks_of_refcoco():
    assert overlaps([[0, 0, 10, 10]], [[0, 0, 10, 5], [5, 5, 15, 15], [20, 20, 30, 30]])[0].tolist() == pytest.approx([0.5, 25 / 175, 0])
    assert registry.box_accuracy([[0, 0, 10, 10], [0, 0, 10, 10], None], [[0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 1, 1]]) == pytest.approx(1 / 3)
    assert registry.box_iou([[0, 0, 10, 10], None], [[0, 0, 10, 5], [0, 0, 1, 1]]) == 0.25
    one, other = np.zeros((2, 4, 4), bool)
    one[:2], other[1:3] = True, True
    assert registry.mask_iou([one, None, one], [other, one, one]) == pytest.approx((1 / 3 + 0 + 1) / 3)
    with pytest.raises(ValueError, match=r"\(4, 4\) pixels for a picture of \(2, 2\)"):
        registry.mask_iou([one], [np.ones((2, 2), bool)])


def test_masks_overlap_as_pycocotools_says():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    encode = lambda mask: coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    masks = rng.random((200, 2, 13, 9)) < rng.random((200, 2, 1, 1))
    wanted = [coco.iou([encode(a)], [encode(b)], [0])[0, 0] for a, b in masks]
    np.testing.assert_allclose(registry.mask_iou.scores(list(masks[:, 0]), list(masks[:, 1])).each, wanted, atol=1e-9)


# ---- All of them


def test_a_resampling_scores_as_the_set_it_stands_for():
    rng = np.random.default_rng(3)
    chosen = np.array([0, 0, 2, 5, 5, 5, 7])
    weights = np.bincount(chosen, minlength=8)
    answers, labels = rng.choice(["yes", "no"], (2, 8)).tolist()
    streets = ["a red dog on a street"] * 8, [[" ".join(rng.permutation(["a", "red", "dog", "on", "a", "wide", "street"]))] for _ in range(8)]
    sets = {"pope_f1": (answers, labels), "exact_match": (answers, labels), "average_precision": pictures(rng, 8), "bleu": streets}
    for name, (predictions, references) in sets.items():
        metric = getattr(registry, name)
        pick = lambda side: [side[i] for i in chosen]
        found = metric.scores(predictions, references).total(weights)
        assert found == pytest.approx(metric(pick(predictions), pick(references)), abs=0.03 if name == "average_precision" else 1e-9), name  # ties


def test_what_does_not_fit_is_told():
    for call, told in [
        (lambda: registry.exact_match(["a"], []), "1 predictions for 0 references"),
        (lambda: registry.cider([], []), "0 predictions for 0 references"),
        (lambda: registry.vqa(["a"], ["a"]), "ten in VQAv2"),
        (lambda: registry.cider(["a"], [[]]), "case 0 has no reference"),
    ]:
        with pytest.raises(ValueError, match=told):
            call()
