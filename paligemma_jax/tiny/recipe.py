"""The recipe of the embedded checkpoint `assets/tiny`: a small PaliGemma 2 that reads, counts and finds handwritten digits.

    python -m paligemma_jax.tiny.recipe --output DIR

Two runs of the `Trainer`. The first teaches the image encoder alone, patch by patch, to say which digit it sees, where and how it looks (a
throw-away linear probe), on scenes that grow from tidy to varied. The second is an ordinary `finetune` of the whole model to answer in words,
boxes and masks, in the codes of the codec that `training.masks` makes.
Begun again with the same DIR, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx
from jax import Array
from PIL import Image
from tqdm import tqdm

from convert import huggingface
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.data.rows import Example
from paligemma_jax.inference.loading import load
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.mask_codec import load_codec
from paligemma_jax.processing.tokenizer import LOCATIONS, SEGMENTS, Tokenizer
from paligemma_jax.tiny import digits, probe
from paligemma_jax.training.batches import prefetch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.trainer import Trainer

MUON = FinetuneConfig(
    data="", output="", optimizer="muon", learning_rate=2e-3, weight_decay=0.02, beta2=0.98, warmup=100, layers="list", save_every=500,
)  # fmt: skip


# Tokenizer


def train_tokenizer(path: Path, pieces: int = 448) -> None:
    """Writes a sentencepiece model made as Gemma's is: byte fallback, split digits, no normalisation; then `<loc>` and `<seg>`.

    Its English is the description that comes with the digits.
    """
    scenes = digits.compose(np.random.default_rng(0), digits.glyphs(held_out=False), 500)
    texts = [text for i in range(500) for task in digits.PROMPTS for text in digits.ask(scenes, i, task, 7)]
    about = digits.source()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in texts if "<loc" not in text] + about.DESCR.splitlines()), model_writer=model,
        model_type="bpe", vocab_size=pieces, byte_fallback=True, split_digits=True, user_defined_symbols=["<mask>", "\n"],
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue() + b"".join(map(_user_defined, LOCATIONS + SEGMENTS)))


def _user_defined(piece: str) -> bytes:
    """One more piece of a serialised sentencepiece model: joining protobuf messages appends to their repeated fields."""
    text = piece.encode()
    message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"  # piece, score, USER_DEFINED
    return b"\x0a" + bytes([len(message)]) + message


# First to see


class Seeing(nnx.Module):
    """The image encoder under a linear probe."""

    def __init__(self, model: PaliGemma):
        self.vision = model.vision
        self.probe = Linear("OW", (sum(probe.PROBE.values()), model.config.vision.hidden_size), bias=True, rngs=nnx.Rngs(1))


def seeing_loss(model: Seeing, batch: dict[str, Array], max_targets: int) -> tuple[Array, Array]:
    return probe.patch_loss(model.probe(model.vision(batch["images"] / 127.5 - 1)), batch), jnp.float32(1)


def seeing_batches(steps: int, size: int, side: int) -> Iterator[Any]:
    """Scenes, first of four digits, black on white, of one size and on the patch grid, then more and more varied; half of them of 1 to 4 at last."""
    source = digits.glyphs(held_out=False, copies=12)

    def make(step: int) -> dict[str, np.ndarray]:
        variety = float(np.clip(step / steps / 0.4 - 0.3, 0, 1))
        count = digits.MAX_DIGITS if step % 2 or variety < 1 else None
        scenes = digits.compose(
            np.random.default_rng((2, step)), source, size, count=count, variety=variety, grid=max(1, round(14 * (1 - 3 * variety)))
        )
        return {"images": scenes.images, **probe.patch_targets(scenes, source, side)}

    return (partial(make, step) for step in range(steps))


def learn_to_see(model: PaliGemma, steps: int) -> None:
    """Trains the image encoder of `model` in place."""
    trainer = Trainer(Seeing(model), MUON, steps, loss=seeing_loss)
    state = trainer.start()
    side = model.config.vision.image_size // model.config.vision.patch_size
    for batch in (bar := tqdm(prefetch(seeing_batches(steps, 16, side)), "seeing", steps, mininterval=10)):
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=0)
        bar.set_postfix(loss=f"{float(report['loss']):.3f}", refresh=False)
    model.vision = trainer.result(state).vision


# Then to answer


class Questions:
    """Varied scenes with a question each, by number. Of five, two ask for masks, one for boxes, one for the text, one for caption or count."""

    def __init__(self, rows: int):
        self.rows, self.source = rows, digits.coded(digits.glyphs(held_out=False, copies=12))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((3, index))
        task = ("segment", "segment", "detect", "ocr", rng.choice(["caption", "count"]))[index % 5]
        scenes = digits.compose(rng, self.source, 1)
        prompt, answer = digits.ask(scenes, 0, task, digits.to_detect(rng, scenes.digits(0)))
        return Example((scenes.images[0],), prompt, answer, weight=1.0, line=index)  # not a dict: the answer for a digit that is not there is empty


def evaluate(predictor: Predictor, n: int) -> dict[str, dict[str, float]]:
    """Scores on `n` scenes of held-out digits for every task."""
    scores = {}
    for task in digits.PROMPTS:
        images, prompts, truths = zip(*digits.heldout(task, n))
        answers = predictor.generate(list(images), list(prompts), 100 if task == "segment" else 32, batch_size=100)
        scores[task] = digits.score_answers(task, answers, truths)
        if task == "segment":
            scores[task] = {"iou": float(np.mean(digits.mask_overlaps(answers, *digits.heldout_scenes(task, n), load_codec(digits.CODEC))))}
    return scores


# The files


def photo(seed: int = 340_900) -> Image.Image:
    """`assets/digits.jpg`: 640 x 480 pixels, four held-out digits; not square, not of the size that the model was trained on."""
    source = digits.glyphs(held_out=True, size=96, gain=3)
    return Image.fromarray(digits.compose(np.random.default_rng(seed), source, 1, (480, 640), count=4).images[0])


def save_tiny(directory: Path, model: PaliGemma, dtype: str) -> None:
    """config.json, model.safetensors, and, where transformers is installed, the files that its AutoProcessor reads."""
    huggingface.save_parameters(directory, model.config, {path: np.asarray(value.astype(dtype)) for path, value in parameters(model).items()})
    try:
        from transformers import GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil
    except ImportError:
        return
    size = model.config.vision.image_size
    images: Any = SiglipImageProcessorPil(size={"height": size, "width": size})
    images.image_seq_length = model.config.vision.num_patches
    processor = PaliGemmaProcessor(images, GemmaTokenizer.from_pretrained(str(directory), local_files_only=True))
    for key in ("vocab_file", "is_local", "local_files_only"):  # how this call found the file
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(str(directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeing-steps", type=int, default=5000)
    parser.add_argument("--answering-steps", type=int, default=6000)
    args = parser.parse_args()
    config, start, final = PaliGemmaConfig.preset("tiny"), args.output / "start", args.output / "tiny"
    if args.output.exists() and any(args.output.iterdir()) and not start.exists():
        raise ValueError(f"{args.output} is not empty: give another --output")
    if not (start / "model.safetensors").exists():
        train_tokenizer(start / "tokenizer.model")
        codebook = np.asarray(load_codec(digits.CODEC).codebook[...])
        model = probe.initial(config, Tokenizer(start / "tokenizer.model", config.image_token_id), codebook)
        learn_to_see(model, args.seeing_steps)
        save_tiny(start, model, "float32")
    run = replace(MUON, output=str(args.output / "run"), model=str(start), steps=args.answering_steps, batch_size=32, vision_rate=0.3)
    answering = finetune(replace(run, resume=Path(run.output).exists()), Questions(args.answering_steps * run.batch_size))
    if answering == Path(run.output):
        return  # stopped
    final.mkdir(exist_ok=True)
    for file in (start / "tokenizer.model", digits.CODEC):
        (final / file.name).write_bytes(file.read_bytes())
    save_tiny(final, load_model(answering), "bfloat16")
    photo().save(args.output / "digits.jpg", quality=92)
    for task, scores in evaluate(load(final), 500).items():
        print(task, {name: round(value, 4) for name, value in scores.items()})


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
