"""Load a checkpoint as a `Predictor`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.checkpoints.stacked import stack_loaded
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.model.config import AttentionForm, PaliGemmaConfig
from paligemma_jax.processing.image_settings import read_image_settings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.processing.vocabulary import find_tokenizer
from paligemma_jax.sharding import devices


def load(
    source: str | Path | CheckpointSource = "tiny",
    *,
    dtype: str | None = None,
    numerics: str | None = None,
    mesh: Mesh | str | None = None,
    quantize: str | None = None,
    attention: AttentionForm | None = None,
    layers: Literal["list", "stack"] = "list",
    base: str | Path | None = None,
    revision: str | None = None,
) -> Predictor:
    """Load a checkpoint. Compiled programs are cached on disk (`enable_compilation_cache`).

    Args:
        source: "tiny" (the embedded model), a Hugging Face directory, a converted checkpoint, a
            LoRA adapter, a run or one of its checkpoints (RUN/checkpoints/200), or a Hub id, also
            with a revision (ORG/NAME@REVISION).
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint, and float32 on
            a CPU. Or "float64", a reference for the others, which needs JAX_ENABLE_X64=1.
        numerics: A profile of `NUMERICS`: "transformers" (release 5.23), "big_vision", "keras" or
            an older release, such as "transformers-4.52", which differ in details
            (`paligemma_jax.model.numerics.Numerics`); by default that of the checkpoint.
        mesh: Devices to shard the model over: "data=2,fsdp=4,tensor=2", "auto", or a
            `jax.sharding.Mesh` with these axes (`paligemma_jax.sharding.axes.rename_axes` renames
            others). Each device reads its slices only.
        quantize: Weights to store in 8 or 4 bits: "int8", "w8a8", "int4" or "nf4" for the
            decoder's projections, or a list by part, such as
            "nf4-32-double,embedding=int8,vision=int8"
            (`paligemma_jax.model.precision.Quantization`).
        attention: "fused" keeps the scores of attention on the chip, on TPUs and GPUs; "plain" runs
            everywhere. By default the fastest of them.
        layers: "list" decodes fastest. "stack" has one block of stacked weights per tower, whose
            compile time does not grow with depth. Stacking briefly needs more memory.
        base: The base checkpoint of an adapter or a run, if it is no longer where they say.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        ValueError: The checkpoint or an option cannot be used.
    """
    if layers not in ("list", "stack"):
        raise ValueError(f"layers must be 'list' or 'stack', got {layers!r}")
    devices.check_devices()
    enable_compilation_cache()
    checkpoint = resolve(source, base=base, revision=revision)
    processor = make_processor(checkpoint)  # before the weights, so that errors are raised early
    processor = replace(processor, soft_tokens=checkpoint.soft_tokens)
    model = load_model(checkpoint, dtype, numerics, mesh, quantize=quantize, attention=attention)
    if layers == "stack":
        model = stack_loaded(model)
    return Predictor(model, processor, checkpoint.codec_file)


def make_processor(source: CheckpointSource, config: PaliGemmaConfig | None = None) -> Processor:
    """Make the processor of a checkpoint, without its soft prompt, or of one with another config.

    Raises:
        ValueError: Its tokenizer and config disagree.
    """
    if source.weights.is_file():  # an .npz, whose arrays all have to be read for its config
        find_tokenizer(source.tokenizer_dir)
    config = config or source.config
    tokenizer = Tokenizer(source.tokenizer_dir, config.image_token_id)
    ids, rows = tokenizer.vocab_size, config.decoder.vocab_size
    if tokenizer.image_id == ids - 1:  # as the last id, <image> needs no row of the table
        ids -= 1
    if ids > rows:
        raise ValueError(
            f"{source.reference}: {tokenizer.file.name} has {ids} ids, but vocab_size in "
            f"config.json is {rows}: use files of one checkpoint"
        )
    size, patches = config.vision.image_size, config.vision.num_patches
    settings = read_image_settings(source.tokenizer_dir, size, patches)
    return Processor(tokenizer, size, patches, config.max_context, settings)


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache.

    Its directory is $PALIGEMMA_JAX_CACHE, by default ~/.cache/paligemma_jax. Nothing changes if
    PALIGEMMA_JAX_CACHE=off, or if a directory is configured already, by JAX_COMPILATION_CACHE_DIR
    or jax.config.
    """
    default = str(Path.home() / ".cache" / "paligemma_jax")
    directory = os.environ.get("PALIGEMMA_JAX_CACHE", default)
    if directory != "off" and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
