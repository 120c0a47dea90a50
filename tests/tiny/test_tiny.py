"""The embedded default: what it can do on digits that it never saw, and that transformers says the same words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.metrics.registry import average_precision
from paligemma_jax.processing.locations import Detection, box_iou
from paligemma_jax.tiny import digits

PHOTO = TINY.parent / "digits.jpg"
N = 200  # the recipe prints the figures for 500


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def answers(tiny):
    pytest.importorskip("sklearn", reason="the held-out digits are scikit-learn's: install the extra train")
    made = {}
    for task in digits.PROMPTS:
        images, prompts, truths = zip(*digits.heldout(task, N))
        said = tiny.generate(list(images), list(prompts), 100 if task == "segment" else 48, batch_size=50)
        made[task] = digits.score_answers(task, said, truths)
        if task == "segment":
            made[task]["iou"] = np.mean(digits.mask_overlaps(said, *digits.heldout_scenes(task, N), tiny.codec))
    return made


def test_config_is_the_preset(tiny):
    assert tiny.config == pg.PaliGemmaConfig.preset("tiny")
    d = tiny.config.decoder
    assert d.attn_logit_softcapping and d.final_logit_softcapping and d.num_key_value_heads < d.num_attention_heads and d.post_norms
    assert d.sliding_window < tiny.processor.image_tokens


def test_size():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 8e6


def test_reads_and_counts(answers):
    assert answers["ocr"]["exact"] >= 0.95 and answers["count"]["exact"] >= 0.95 and answers["caption"]["exact"] >= 0.9


def test_detects(answers):
    assert answers["detect"]["found"] >= 0.90 and answers["detect"]["spurious"] <= 0.05


def test_segments(answers):
    assert answers["segment"]["iou"] >= 0.7


def test_scores_tell_good_boxes_from_bad(tiny):
    """Asked for every digit, there or not, its AP is higher with the scores than with one for all."""
    pytest.importorskip("sklearn", reason="the held-out digits are scikit-learn's: install the extra train")
    scenes = digits.compose(np.random.default_rng(5), digits.glyphs(held_out=True), 40)
    answers = tiny.answers([image for image in scenes.images for _ in range(10)], [f"detect {digit}" for digit in range(10)] * 40, 48, batch_size=100)
    found = [[thing for answer in answers[i * 10 : i * 10 + 10] for thing in tiny.detections(answer, scenes.images[i])] for i in range(40)]
    constant = [[replace(thing, score=0.5) for thing in things] for things in found]
    right = [
        [Detection(str(digit), (x0, y0, x1, y1)) for (y0, x0, y1, x1), digit in zip(boxes, labels) if digit >= 0]
        for boxes, labels in zip(scenes.boxes.tolist(), scenes.labels.tolist())
    ]
    assert average_precision(found, right) > average_precision(constant, right) + 0.005


def test_photo(tiny):
    """The picture of the README: 4 and 3 below, 3 and 2 above."""
    caption, read, count = tiny.generate([PHOTO] * 3, ["caption en", "ocr", "answer en how many digits?"])
    assert (caption, read, count) == ("four digits: 4, 3, 2 and 3", "4 3 2 3", "4")
    (four,) = tiny.detect(PHOTO, "4")
    assert four.label == "4" and box_iou(four.box, (28, 303, 195, 472)) > 0.8
    ink = np.asarray(Image.open(PHOTO).convert("L")) < 110
    threes = tiny.segment(PHOTO, "3")
    assert len(threes) == 2
    for three in threes:
        left, top, right, bottom = (round(side) for side in three.box)
        dark, mask = ink[top:bottom, left:right], three.mask[top:bottom, left:right]
        assert (dark & mask).sum() / (dark | mask).sum() > 0.6


def test_says_what_transformers_says(tiny):
    """The text of 50 held-out scenes, from pixels to words, by transformers' own processor and model on the same directory."""
    torch = pytest.importorskip("torch", reason="the reference is transformers on torch: install the extra test")
    pytest.importorskip("sklearn", reason="the held-out digits are scikit-learn's: install the extra train")
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(TINY, backend="pil")
    model = PaliGemmaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    tasks = list(digits.PROMPTS)
    samples = [digits.heldout(tasks[i % len(tasks)], i + 1, seed=7)[-1] for i in range(50)]
    images, prompts, _ = zip(*samples)
    expected = []
    for image, prompt in zip(images, prompts):
        batch = processor(text=prompt, images=Image.fromarray(image), return_tensors="pt")
        batch.pop("labels", None)
        ids = model.generate(**batch, max_new_tokens=48, do_sample=False)[0, batch["input_ids"].shape[1] :]
        expected.append(processor.decode(ids, skip_special_tokens=True))
    assert tiny.generate(list(images), list(prompts), 48) == expected
    assert len(set(expected)) > 30


def test_assets_are_in_the_package():
    assert Path(pg.__file__).parent in TINY.parents and PHOTO.exists()
