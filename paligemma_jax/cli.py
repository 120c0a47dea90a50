"""The command `paligemma-jax`: one function a subcommand. Errors of the user are one line on stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import tyro

Some = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")]


def generate(
    image: Some,
    prompt: Some,
    model: str = "tiny",
    max_new_tokens: int = 128,
    dtype: str | None = None,
    numerics: str = "transformers",
    json: bool = False,
) -> None:
    """Answer prompts about images.

    Example: paligemma-jax generate --image photo.jpg --prompt "caption en"

    Args:
        image: Image files, one for each prompt. A single one serves all prompts. For several images in one prompt, write <image> into
            the prompt once for each.
        prompt: What to ask, as "caption en", "answer en where is the cat?", "detect cat". A single one serves all images.
        model: "tiny" (embedded), a directory in Hugging Face layout, or a hub id like google/paligemma2-3b-mix-224.
        max_new_tokens: The longest answer, in tokens.
        dtype: float32, bfloat16 or float16; by default the checkpoint's, and float32 on a CPU.
        numerics: transformers or big_vision, where the two compute different numbers.
        json: Print one JSON object a prompt instead of text.
    """
    from paligemma_jax import load  # here, so that --help need not wait for jax

    images, prompts = _pair(list(image), list(prompt))
    answers = load(model, dtype=dtype, numerics=numerics).generate(images, prompts, max_new_tokens)
    for i, (asked, answer) in enumerate(zip(prompts, answers)):
        shown = images[i] if len(images) == len(prompts) else images
        print(_json({"image": shown, "prompt": asked, "answer": answer}) if json else answer)


def _pair(images: list[str], prompts: list[str]) -> tuple[list[str], list[str]]:
    if any("<image>" in prompt for prompt in prompts):
        return images, prompts
    if len(prompts) == 1:
        prompts = prompts * len(images)
    if len(images) == 1:
        images = images * len(prompts)
    return images, prompts


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


COMMANDS = {"generate": generate}


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="paligemma-jax", description="PaliGemma 2 in JAX.")
    except ValueError as error:
        print(f"paligemma-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
