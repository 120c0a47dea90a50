"""The embedded default: what it can do on digits that it never saw, and that transformers says the same words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.checkpoint import TINY
from paligemma_jax.training import digits

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
        made[task] = digits.score(task, tiny.generate(list(images), list(prompts), 48), truths)
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


def test_photo(tiny):
    """The picture of the README: 4 and 3 below, 3 and 2 above."""
    caption, read, count, boxes = tiny.generate([PHOTO] * 4, ["caption en", "ocr", "answer en how many digits?", "detect 4"])
    assert (caption, read, count) == ("four digits: 4, 3, 2 and 3", "4 3 2 3", "4")
    (box, digit), *others = digits.detections(boxes)
    assert digit == 4 and not others
    np.testing.assert_allclose(np.asarray(box) / 1024, [340 / 480, 133 / 640, 475 / 480, 268 / 640], atol=0.06)


def test_says_what_transformers_says(tiny):
    """The text of 50 held-out scenes, from pixels to words, by transformers' own processor and model on the same directory."""
    torch = pytest.importorskip("torch", reason="the reference is transformers on torch: install the extra test")
    pytest.importorskip("sklearn", reason="the held-out digits are scikit-learn's: install the extra train")
    from PIL import Image
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
