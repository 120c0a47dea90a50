"""The command `paligemma-jax`: one function a subcommand. Errors of the user are one line on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from typing import Annotated, Literal

import tyro

from paligemma_jax.training.config import Finetune

Images = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Numerics = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the one that the checkpoint means)")]
Dtype = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the checkpoint's; float32 on a CPU)")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")]
BenchDtype = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: float32 on a CPU, else bfloat16)")]
Depth = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")]
Chart = Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]


def generate(
    image: Images,
    prompt: Texts,
    model: Name = "tiny",
    max_new_tokens: int = 128,
    dtype: Dtype = None,
    numerics: Numerics = None,
    quantize: Literal["nf4", "int8"] | None = None,
    json: bool = False,
) -> None:
    """Answer prompts about images.

    Example: paligemma-jax generate --image photo.jpg --prompt "caption en"

    Args:
        image: Image files, one for each prompt, or one for all of them. For several images in one prompt write <image> into it for each.
        prompt: What to ask: "caption en", "answer en where is the cat?", "detect cat". One for each image, or one for all of them.
        model: tiny (embedded), a directory in Hugging Face layout, a converted checkpoint, an adapter, or a hub id like
            google/paligemma2-3b-mix-224.
        max_new_tokens: The longest answer, in tokens.
        dtype: float32, bfloat16 or float16.
        numerics: transformers or big_vision, where the two compute different numbers.
        quantize: Hold the decoder's projections in 4 or 8 bits.
        json: Print one JSON object a line, with image, prompt and answer, instead of text.
    """
    from paligemma_jax import load  # here, so that --help need not wait for jax
    from paligemma_jax.processing.image import load_image

    images, prompts = _pair(list(image), list(prompt))
    opened = {path: load_image(path) for path in image}  # before the model, so that a wrong path is told at once
    predictor = load(model, dtype=dtype, numerics=numerics, quantize=quantize)
    answers = predictor.generate([[opened[path] for path in group] for group in images], prompts, max_new_tokens)
    for shown, asked, answer in zip(images, prompts, answers):
        shown = shown[0] if len(shown) == 1 else shown
        print(_json({"image": shown, "prompt": asked, "answer": answer}) if json else answer)


def _pair(images: list[str], prompts: list[str]) -> tuple[list[list[str]], list[str]]:
    """The images of each prompt, and the prompts: as many as it has `<image>`, else one; a single prompt or image serves all of the others."""
    if missing := [name for name, given in (("image", images), ("prompt", prompts)) if not given]:
        raise ValueError(f"no {missing[0]}: give at least one after --{missing[0]}")
    wanted = [max(prompt.count("<image>"), 1) for prompt in prompts]
    if set(wanted) == {1}:
        prompts = prompts * len(images) if len(prompts) == 1 else prompts
        images = images * len(prompts) if len(images) == 1 else images
        wanted = [1] * len(prompts)
    if sum(wanted) != len(images):
        raise ValueError(
            f"{len(images)} images do not fit {len(prompts)} prompts, which take {sum(wanted)}: "
            "give one for all prompts, one for each, or one for every <image> in them"
        )
    remaining = iter(images)
    return [list(islice(remaining, n)) for n in wanted], prompts


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def bench(
    model: Names = ("tiny",),
    batch: Numbers = (1,),
    prompt: Numbers = (32,),
    new: int = 64,
    layers: tuple[Literal["list", "stack"], ...] = ("list",),
    cached: Numbers = (),
    against: tuple[Literal["transformers", "transformers-compile"], ...] = (),
    dtype: BenchDtype = None,
    depth: Depth = None,
    repeats: int = 5,
    train: tuple[Literal["all", "lora", "qlora"], ...] = (),
    remat: Literal["none", "full", "dots"] = "none",
    chart: Chart = None,
    json: bool = False,
) -> None:
    """Measure speed against what the machine can do, and against transformers.

    Example: paligemma-jax bench --model 3b-224 --batch 1 8 --dtype bfloat16

    Args:
        model: A preset (3b-224, 10b-448, 28b-896, pg1-3b-224, ...) or "small" with random weights, or a checkpoint as for generate.
        batch: Rows at a time.
        prompt: Text tokens after those of the image (256 at 224 pixels).
        new: Tokens to generate.
        layers: How the layers are held: list (compiled one by one) or stack (compiled once, looped over).
        cached: Decode also with so many tokens in the cache, to see what each costs.
        against: transformers, transformers-compile (with torch.compile): the same weights, dtype and inputs, in turn.
        dtype: float32, bfloat16 or float16.
        depth: Only so many layers in each tower, at full width, where both models would not fit into memory.
        repeats: Runs after the first, which warms up.
        train: Measure training steps instead: of all weights, of LoRA, of LoRA on nf4. With --repeats 0 only compile, and tell the memory.
        remat: What of each layer such a step computes again in its backward pass: nothing, all, or all but the products with weights.
        chart: Draw tokens/s to this file, as in speed.png.
        json: Print one JSON object instead of the table; times in seconds.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part of a GPU
    from paligemma_jax import bench_report, bench_train
    from paligemma_jax.bench import Plan, run

    plan = Plan(model, batch, prompt, new, layers, cached, against, dtype, depth, repeats, train, remat)
    report = bench_train.run(plan) if train else run(plan)
    print(_json(report) if json else bench_report.table(report))
    if chart and not train:
        bench_report.chart(report, chart)


def finetune(config: Annotated[Finetune, tyro.conf.arg(name="")]) -> None:
    """Fine-tune on images and texts; a stopped run continues with --resume.

    Example: paligemma-jax finetune --data train.jsonl --output run --steps 1000
    """
    from paligemma_jax.training.finetune import finetune

    print(finetune(config))


COMMANDS = {"generate": generate, "finetune": finetune, "bench": bench}


def main() -> None:
    """Runs what sys.argv asks for; alone, the command shows its help."""
    try:
        _run(sys.argv[1:] or ["--help"])
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:  # the reader, as in `| head`, has had enough: not even the flush at exit may complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        _stop(reason, 2)


def _run(arguments: list[str]) -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="paligemma-jax", description="PaliGemma 2 in JAX.", args=arguments)
    finally:
        sys.stdout.flush()  # here, so that a closed pipe shows while main can still catch it


def _reason(error: Exception) -> str | None:
    """What to tell of an error that its user can mend; None for any other, whose traceback is worth having."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory: give fewer images at once, fewer new tokens, --dtype bfloat16 or a smaller checkpoint"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return str(error) if isinstance(error, ValueError) else None


def _stop(reason: str, code: int) -> None:
    print(f"paligemma-jax: {reason}", file=sys.stderr)
    raise SystemExit(code) from None
