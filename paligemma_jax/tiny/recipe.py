"""The recipe of the embedded checkpoint: a small PaliGemma 2 that reads, counts and finds
handwritten digits.

The image encoder is pretrained alone (`probe`); then an ordinary `finetune` of the complete model
teaches it to answer in words, boxes and masks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from convert import huggingface
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.data.rows import Example
from paligemma_jax.inference.loading import load
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.mask_codec import load_codec
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tiny.digits import CODEC, glyphs, with_codes
from paligemma_jax.tiny.initialize import initialize
from paligemma_jax.tiny.probe import pretrain_encoder
from paligemma_jax.tiny.questions import (
    PROMPTS,
    ask,
    choose_digit,
    heldout_examples,
    heldout_scenes,
    mask_ious,
    score_answers,
)
from paligemma_jax.tiny.scenes import compose
from paligemma_jax.tiny.tokenizer import train_tokenizer
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune

CONFIG = FinetuneConfig(
    data="",
    output="",
    optimizer="muon",
    learning_rate=2e-3,
    weight_decay=0.02,
    beta2=0.98,
    warmup=100,
    layers="list",
    save_every=500,
)


class Questions:
    """Varied scenes with one question each, by index. Of five questions, two ask for masks, one for
    boxes, one for the text, and one for a caption or a count."""

    def __init__(self, rows: int):
        self.rows, self.source = rows, with_codes(glyphs(held_out=False, copies=12))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((3, index))
        task = ("segment", "segment", "detect", "ocr", rng.choice(["caption", "count"]))[index % 5]
        scenes = compose(rng, self.source, 1)
        prompt, answer = ask(scenes, 0, task, choose_digit(rng, scenes.digits(0)))
        # Not a dict: the answer about a digit that the scene does not have is empty.
        return Example((scenes.images[0],), prompt, answer, weight=1.0, line=index)


def make_tiny(output: Path, pretraining_steps: int = 5000, steps: int = 6000) -> None:
    """Train the embedded checkpoint `assets/tiny` again, in about 100 CPU-minutes.

    To continue a stopped run, run it again with the same --output.

    Args:
        output: Directory to write to. Receives tiny/ and digits.jpg at the end.
        pretraining_steps: Training steps of the image encoder alone.
        steps: Training steps of the complete model.
    """
    start, final = output / "start", output / "tiny"
    if output.exists() and any(output.iterdir()) and not start.exists():
        raise ValueError(f"{output} is not empty: choose another --output")
    if not (start / "model.safetensors").exists():
        make_start(start, pretraining_steps)
    config = replace(
        CONFIG,
        output=str(output / "run"),
        model=str(start),
        steps=steps,
        batch_size=32,
        vision_rate=0.3,
        resume=(output / "run").exists(),
    )
    result = finetune(config, Questions(steps * config.batch_size))
    if result == Path(config.output):
        return  # interrupted
    final.mkdir(exist_ok=True)
    for file in (start / "tokenizer.model", CODEC):
        (final / file.name).write_bytes(file.read_bytes())
    save_tiny(final, load_model(result), "bfloat16")
    make_photo().save(output / "digits.jpg", quality=92)
    for task, scores in evaluate(load(final), 500).items():
        print(task, {name: round(value, 4) for name, value in scores.items()})


def make_start(directory: Path, pretraining_steps: int) -> None:
    """Write a checkpoint with a pretrained image encoder and a new decoder."""
    config = PaliGemmaConfig.preset("tiny")
    train_tokenizer(directory / "tokenizer.model")
    tokenizer = Tokenizer(directory / "tokenizer.model", config.image_token_id)
    model = initialize(config, tokenizer, np.asarray(load_codec(CODEC).codebook[...]))
    pretrain_encoder(model, CONFIG, pretraining_steps)
    save_tiny(directory, model, "float32")


def evaluate(predictor: Predictor, count: int) -> dict[str, dict[str, float]]:
    """Score every task on `count` scenes of held-out digits."""
    scores = {}
    for task in PROMPTS:
        images, prompts, references = map(list, zip(*heldout_examples(task, count), strict=True))
        max_new_tokens = 100 if task == "segment" else 32
        answers = predictor.generate(images, prompts, max_new_tokens, batch_size=100)
        if task == "segment":
            ious = mask_ious(answers, *heldout_scenes(task, count), load_codec(CODEC))
            scores[task] = {"iou": float(np.mean(ious))}
        else:
            scores[task] = score_answers(task, answers, references)
    return scores


def make_photo(seed: int = 340_900) -> Image.Image:
    """`assets/digits.jpg`: four held-out digits on 640 x 480 pixels, neither square nor of the
    training size."""
    source = glyphs(held_out=True, size=96, gain=3)
    scenes = compose(np.random.default_rng(seed), source, 1, (480, 640), count=4)
    return Image.fromarray(scenes.images[0])


def save_tiny(directory: Path, model: PaliGemma, dtype: str) -> None:
    """Write config.json, model.safetensors and, if transformers is installed, the files that its
    AutoProcessor reads."""
    values = {path: np.asarray(array.astype(dtype)) for path, array in parameters(model).items()}
    huggingface.save_parameters(directory, model.config, values)
    try:
        from transformers import GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil
    except ImportError:
        return
    vision = model.config.vision
    images = SiglipImageProcessorPil(size={"height": vision.image_size, "width": vision.image_size})
    images.image_seq_length = vision.num_patches  # type: ignore[attr-defined]
    tokenizer = GemmaTokenizer.from_pretrained(str(directory), local_files_only=True)
    processor = PaliGemmaProcessor(images, tokenizer)
    for key in ("vocab_file", "is_local", "local_files_only"):  # where the file was loaded from
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(str(directory))
