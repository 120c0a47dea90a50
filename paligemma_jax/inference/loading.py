"""`load`: from the name of a checkpoint to a `Predictor`."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.sharding import devices


def load(
    source: str | Path = "tiny",
    *,
    dtype: str | None = None,
    numerics: str | None = None,
    mesh: Mesh | str | None = None,
    quantize: str | None = None,
) -> Predictor:
    """A `Predictor` from "tiny" (the embedded default), a Hugging Face directory, a converted checkpoint, a LoRA adapter, or a hub id.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint, and float32 on a CPU.
        numerics: "transformers" (release 5.23) or "big_vision", where the two differ (`paligemma_jax.model.config.Numerics`); by default
            the one that the checkpoint was converted from, or means.
        mesh: over which devices the model is spread: "data=2,fsdp=4,tensor=2", "auto", or a `jax.sharding.Mesh` of such axes
            (`paligemma_jax.sharding.mesh`). Each device gets its slices of the parameters only, and only they are read.
        quantize: what to hold in 8 or 4 bits: "int8", "int4", "nf4" for the decoder's projections, or more in words, such as
            "nf4-32-double,embedding=int8,vision=int8" (`paligemma_jax.model.precision.Quantization`).

    Compiled programs are kept for the next process (`keep_programs`). ValueError says in one line what is wrong with the source.
    """
    devices.check_devices()
    enable_compilation_cache()
    checkpoint = resolve(source)
    processor = make_processor(checkpoint)  # before the weights, so that errors come at once
    model = load_model(checkpoint, dtype, numerics, mesh, quantize=quantize)
    return Predictor(model, processor, checkpoint.codec_file)


def make_processor(source: CheckpointSource) -> Processor:
    """The processor of a checkpoint. ValueError if its tokenizer and its config disagree."""
    config = source.config
    tokenizer = Tokenizer(source.tokenizer_dir / "tokenizer.model", config.image_token_id)
    words = tokenizer.vocab_size - (tokenizer.image_id == tokenizer.vocab_size - 1)  # the id of <image>, if it is the last, needs no row
    if words > config.decoder.vocab_size:
        raise ValueError(f"{source.reference}: tokenizer.model has {words} ids, config.json {config.decoder.vocab_size}; take both from one checkpoint")
    return Processor(tokenizer, config.vision.image_size, config.vision.num_patches, config.max_context)


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, in $PALIGEMMA_JAX_CACHE or ~/.cache/paligemma_jax; PALIGEMMA_JAX_CACHE=off leaves it alone.

    So does a directory that is set already, by JAX_COMPILATION_CACHE_DIR or jax.config.
    """
    place = os.environ.get("PALIGEMMA_JAX_CACHE", str(Path.home() / ".cache" / "paligemma_jax"))
    if place != "off" and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", place)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
