"""Write tests/golden: two small random checkpoints and transformers' outputs on them, for the tests
that run without torch.

Run by hand (`PYTHONPATH=tests python tests/support/make_golden.py`) to extend the set, never to
make a failing test pass.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from support.golden import from_bytes, sample
from support.hf_models import hf_inputs, hf_stages, random_inputs, random_model, save_checkpoint
from support.hf_processor import hf_processor, train_tokenizer
from support.paths import GOLDEN
from transformers import PaliGemmaForConditionalGeneration

from paligemma_jax.processing.processor import Inputs
from paligemma_jax.processing.tokenizer import Tokenizer

MODELS = {
    "pg2": dict(num_hidden_layers=4),
    "pg1": dict(num_hidden_layers=3),
}  # other values are those of tests/support/hf_models.py
LAYOUTS = {"pg2": "released", "pg1": "v5"}
ROWS = (
    (1, 5, 12),
    (2, 3, 4),
)  # images, prompt tokens, suffix tokens: ragged, and longer than the window of 8
STEPS = 20
SIDE, PATCH = 56, 14

TEXTS = {  # images per prompt, prompts, suffixes, padding side
    "caption": ([1], ["caption en"], None, "left"),
    "placeholder and space": ([1], ["<image> caption en"], None, "left"),
    "image at the end": ([1], ["what color is this<image>"], None, "left"),
    "batch": ([1, 1], ["answer en what color is the cat", "detect dog ; car"], None, "left"),
    "two images": ([2, 1], ["the cat and the dog", ""], None, "left"),
    "suffix": (
        [1, 1],
        ["detect cat", "segment the red car"],
        ["<loc0003><loc0100><loc1023><loc0007> cat", "<seg001><seg127>"],
        "left",
    ),
    "suffix, right": ([1, 1], ["caption en\n", "  a\tb 😀"], ["A cat.", ""], "right"),
}


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    picture().save(GOLDEN / "image.png")
    for kind, changes in MODELS.items():
        directory = GOLDEN / kind
        tokenizer = Tokenizer(train_tokenizer(directory / "tokenizer.model", vocabulary=400))
        rows = -(-tokenizer.vocab_size // 64) * 64
        model = random_model(
            kind, seed=7, text=changes | {"vocab_size": rows}, image_id=tokenizer.image_id
        )
        save_checkpoint(model, directory, LAYOUTS[kind], torch.bfloat16)
        model = PaliGemmaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        np.savez_compressed(directory / "expected.npz", **expected(model))
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(case)}" for name, case in processed().items()
    )
    (GOLDEN / "processor.json").write_text("{\n" + lines + "\n}\n")
    print(sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()), "bytes")


def picture() -> Image.Image:
    """A picture of smooth colors with noise, neither square nor of the model's size."""
    y, x = np.mgrid[0:70, 0:100]
    smooth = np.stack([x * 2.5, y * 3.6, 255 - x - y], axis=-1)
    return Image.fromarray(
        (smooth + np.random.default_rng(0).normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    )


def expected(model) -> dict[str, np.ndarray]:
    """Inputs, stages, a slice of the logits, the loss and the greedy tokens."""
    inputs, pixels = with_byte_pixels(random_inputs(model, ROWS, seed=1, order="mixed"))
    stages = hf_stages(model, inputs)
    result = {f"stages/{name}": sample(name, value, inputs.valid) for name, value in stages.items()}
    result |= {
        "tokens": inputs.tokens,
        "bytes": pixels,
        "valid": inputs.valid,
        "prefix": inputs.prefix,
        "targets": inputs.targets,
    }
    result["logits"] = stages["logits"][inputs.valid][:, ::40]
    batch = hf_inputs(inputs)
    labels = torch.where(batch["token_type_ids"] == 1, batch["input_ids"], -100)
    positions = batch["attention_mask"].cumsum(1).clamp(min=1)
    with torch.no_grad():
        result["loss"] = model(**batch, labels=labels, position_ids=positions).loss.numpy()
    return result | greedy(model)


def greedy(model) -> dict[str, np.ndarray]:
    """Three prompts and their STEPS greedy tokens, without near ties."""
    inputs, pixels = with_byte_pixels(
        random_inputs(model, ((1, 5, 0), (2, 3, 0), (1, 9, 0)), seed=2, order="mixed")
    )
    out = model.generate(
        **hf_inputs(inputs),
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits, 1).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 5e-3
    answer = out.sequences[:, inputs.tokens.shape[1] :].numpy()
    return {
        "greedy/tokens": inputs.tokens,
        "greedy/bytes": pixels,
        "greedy/valid": inputs.valid,
        "greedy/answer": answer,
    }


def with_byte_pixels(inputs: Inputs) -> tuple[Inputs, np.ndarray]:
    """`inputs` with pixels rounded to integers from 0 to 255, and those integers."""
    pixels = to_bytes(inputs.images)
    return replace(inputs, images=from_bytes(pixels)), pixels


def to_bytes(images: np.ndarray) -> np.ndarray:
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def processed() -> dict[str, dict]:
    """The outputs of transformers' processor for TEXTS and the picture."""
    processor = hf_processor(GOLDEN / "pg2", SIDE, PATCH)
    image, result = Image.open(GOLDEN / "image.png"), {}
    for name, (counts, prompts, suffixes, side) in TEXTS.items():
        out = processor(
            [[image] * n for n in counts],
            prompts,
            suffix=suffixes,
            padding=True,
            padding_side=side,
            return_tensors="np",
        )
        result[name] = {"images": counts, "prompts": prompts, "suffixes": suffixes, "side": side}
        result[name] |= {
            key: out[key].tolist()
            for key in ("input_ids", "attention_mask", "token_type_ids", "labels")
        }
        result[name]["decoded"] = processor.batch_decode(out["input_ids"], skip_special_tokens=True)
    np.save(GOLDEN / "image.npy", to_bytes(np.moveaxis(out["pixel_values"][0], 0, 2)))
    return result


if __name__ == "__main__":
    main()
