"""Compare this project with the authors' programs on checkpoint directories.

    python -m tools.check_outside_checkpoints DIRECTORY...

Each row of the table is one directory: the largest difference in the logits and in the pixels of
five pictures, and whether token ids, decoded text and greedy answers are equal; or the sentence of
the refusal. The reference is transformers with peft, as installed, on the same directory. Where
they cannot load an adapter, it is the `_reference.npy` that its author's program wrote beside it.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from PIL import Image
from transformers import logging

import paligemma_jax as pg
from paligemma_jax import Inputs, Predictor

TEXTS = [
    "caption en",
    "detect  4 ; <loc0001> 3",
    "answer en 7 <plain> x <tool>y zebra crossing",
    "naïve 🙂 ▁ tab\t  <seg012>\n\n end",
]


class Reference:
    """transformers' model and processor of a directory, and peft's adapter on it."""

    def __init__(self, directory: Path, base: Path):
        from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

        load = PaliGemmaForConditionalGeneration.from_pretrained
        self.model = load(base, attn_implementation="eager", dtype=torch.float32)
        if hasattr(self.model.config, "quantization_config"):
            for module in self.model.modules():  # else rounded to the dtype that was quantized
                state = getattr(getattr(module, "weight", None), "quant_state", None)
                if state is not None:
                    state.dtype = torch.float32
            self.model = self.model.dequantize().float()
        if base != directory:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, directory)
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(base)

    @torch.no_grad()
    def logits(self, tokens: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        return self.model(**_torch_inputs(tokens, pixels)).logits.float().numpy()

    @torch.no_grad()
    def greedy(self, tokens: np.ndarray, pixels: np.ndarray) -> list[int]:
        options = dict(max_new_tokens=8, do_sample=False)
        answer = self.model.generate(**_torch_inputs(tokens, pixels), **options)
        return answer[0, tokens.shape[1] :].tolist()


def _torch_inputs(tokens: np.ndarray, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(tokens)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    pictures = torch.from_numpy(pixels)
    return dict(input_ids=ids, pixel_values=pictures, attention_mask=ones, token_type_ids=zeros)


def check(directory: Path, base: Path) -> str:
    """Return what to print about one directory."""
    with tempfile.TemporaryDirectory() as scratch:
        if base != directory:
            directory = _with_base(directory, base, Path(scratch))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                predictor = pg.load(directory, dtype="float32")
        except ValueError as error:
            return f"refused: {error}"
        notes = [str(w.message) for w in caught if "paligemma" in str(w.filename)]
        try:
            reference = Reference(directory, base)
            results = compare(predictor, reference)
        except Exception as error:
            results = [f"transformers: {type(error).__name__}: {str(error).splitlines()[0][:100]}"]
        recorded = directory / "_reference.npy"
        if recorded.exists():
            tokens, pixels = _recorded_inputs(directory, predictor)
            error = np.abs(_logits(predictor, tokens, pixels) - np.load(recorded)).max()
            results.append(f"author's logits {error:.1e}")
        return "; ".join(results + [f"note: {note}" for note in notes])


def compare(predictor: Predictor, reference: Reference) -> list[str]:
    tokens, pixels = _inputs(predictor)
    error = np.abs(_logits(predictor, tokens, pixels) - reference.logits(tokens, pixels)).max()
    results = [f"logits {error:.1e}"]
    ends = predictor.config.eos_token_ids
    inputs = _own_inputs(tokens, pixels)
    options = pg.DecodingOptions(8)
    from paligemma_jax.inference import generate

    ours = generate.generate(predictor.model, inputs, options).tokens[0].tolist()
    theirs = reference.greedy(tokens, pixels)
    results.append(f"greedy {_equal(_until(ours, ends) == _until(theirs, ends))}")
    processor, pictures = reference.processor, make_pictures()
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    encoded = [(processor(text=t, images=image).input_ids, t) for t in TEXTS]
    ids = [np.asarray(ids).reshape(-1).tolist() for ids, _ in encoded]
    own = [predictor.processor([image], [t]).tokens[0].tolist() for t in TEXTS]
    results.append(f"ids {_equal(ids == own)}")
    decode: Callable = processor.tokenizer.decode
    texts = [decode(row, skip_special_tokens=True) for row in ids]
    decoded = [predictor.processor.decode(row) for row in ids]
    results.append(f"text {_equal(texts == decoded)}")
    difference = 0.0
    for picture in pictures:
        try:
            expected = processor(text="x", images=picture, return_tensors="np").pixel_values
        except ValueError:  # gray images, of the 4.x releases that never convert to RGB
            continue
        actual = predictor.processor([picture], ["x"]).images
        difference = max(difference, np.abs(np.moveaxis(expected, 1, -1) - actual).max())
    return [*results, f"pixels {difference:.1e}"]


def make_pictures() -> list[Image.Image]:
    """RGB, grayscale, palette with a transparent colour, RGBA, and RGB with a colour key."""
    values = np.random.default_rng(0).integers(0, 256, (37, 51, 4), np.uint8)
    rgba = Image.fromarray(values)
    palette = rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = 3
    keyed = io.BytesIO()
    rgba.convert("RGB").save(keyed, "PNG", transparency=tuple(values[0, 0, :3]))
    return [rgba.convert("RGB"), rgba.convert("L"), palette, rgba, Image.open(keyed)]


def _inputs(predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    vision, image = predictor.config.vision, predictor.config.image_token_id
    tokens = np.array([[image] * vision.num_patches + [2, 300, 301, 302]])
    shape = (1, 3, vision.image_size, vision.image_size)
    return tokens, np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32)


def _recorded_inputs(directory: Path, predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    file = directory / "_inputs.npz"
    if file.exists():
        inputs = np.load(file)
        return inputs["input_ids"], inputs["pixel_values"]
    vision, image = predictor.config.vision, predictor.config.image_token_id
    tokens = np.array([[image] * vision.num_patches + [2, 700, 701, 702]])
    generator = torch.Generator().manual_seed(3)
    shape = (1, 3, vision.image_size, vision.image_size)
    return tokens, (torch.rand(*shape, generator=generator) * 2 - 1).numpy()


def _own_inputs(tokens: np.ndarray, pixels: np.ndarray) -> Inputs:
    everything = np.ones(tokens.shape, bool)
    images = np.ascontiguousarray(np.moveaxis(pixels, 1, -1))
    return Inputs(tokens.astype(np.int32), images, everything, everything, ~everything)


def _logits(predictor: Predictor, tokens: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    inputs = _own_inputs(tokens, pixels)
    call = jax.jit(lambda model, *arrays: model(*arrays))
    logits = call(predictor.model, inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    return np.asarray(logits, np.float32)


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:at]


def _equal(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def _base_of(directory: Path) -> Path:
    """The base of an adapter: as recorded, or a directory of that name beside it."""
    config = directory / "adapter_config.json"
    if not config.exists():
        return directory
    name = json.loads(config.read_text())["base_model_name_or_path"]
    return Path(name) if Path(name).is_absolute() else directory.parent / name


def _with_base(directory: Path, base: Path, scratch: Path) -> Path:
    """A copy of an adapter that names its base by its path."""
    copy = scratch / directory.name
    shutil.copytree(directory, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    file = copy / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(base.resolve())}
    file.write_text(json.dumps(config))
    return copy


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    logging.set_verbosity_error()
    print("| directory | result |\n| --- | --- |")
    for name in sys.argv[1:]:
        directory = Path(name)
        print(f"| {directory.name} | {check(directory, _base_of(directory))} |", flush=True)


if __name__ == "__main__":
    main()
