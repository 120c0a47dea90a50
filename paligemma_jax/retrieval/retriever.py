"""Embed pages and queries, and score how well they match."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32

from convert import colpali, colpali_adapter
from convert.files import companion_files, user_path
from paligemma_jax.checkpoints.load import read_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.inference.loading import enable_compilation_cache, make_processor
from paligemma_jax.inference.options import Texts
from paligemma_jax.losses.contrastive import max_similarity
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor, round_up
from paligemma_jax.retrieval.model import ColPali
from paligemma_jax.sharding.arrays import distribute, to_host
from paligemma_jax.sharding.compiled import mesh_jit
from paligemma_jax.sharding.mesh import resolve_mesh

# Of transformers' ColPaliProcessor. Ten pads after a query are room for the model to think.
PAGE_PROMPT, QUERY_PREFIX, AUGMENTATION = "<image>Describe the image.", "Question: ", 10
CHUNK = 256  # pages to score at a time


@dataclass(frozen=True)
class Embeddings:
    """The vectors of N pages or queries; zero where not valid."""

    vectors: Float[np.ndarray, "N T E"]
    valid: Bool[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Retriever:
    """A ColPali with its processor."""

    model: ColPali
    processor: Processor

    @cached_property
    def digest(self) -> str:
        """A text that tells models apart whose vectors cannot be compared."""
        leaves = jax.tree.leaves(self.model)
        rows = [np.asarray(leaf[(0,) * (leaf.ndim - 1)], np.float32) for leaf in leaves]
        shapes = repr([leaf.shape for leaf in leaves])
        content = shapes.encode() + b"".join(row.tobytes() for row in rows)
        return hashlib.sha256(content).hexdigest()[:16]

    def embed_pages(self, pages: Sequence[ImageSource], batch_size: int = 8) -> Embeddings:
        """Embed images of pages, one vector for each patch and token of the prompt.

        Raises:
            ValueError: An image cannot be read.
        """
        return self._embed(self._encode_pages(pages), batch_size)

    def embed_queries(self, queries: Texts, batch_size: int = 32) -> Embeddings:
        """Embed queries, one vector for each token."""
        return self._embed(self._encode_queries(queries), batch_size)

    def page_inputs(self, pages: Sequence[ImageSource]) -> Inputs:
        """The inputs of a batch of pages, to train on."""
        return self._inputs(self._encode_pages(pages))

    def query_inputs(self, queries: Texts) -> Inputs:
        """The inputs of a batch of queries, to train on."""
        return self._inputs(self._encode_queries(queries))

    def _encode_pages(self, pages: Sequence[ImageSource]) -> list[EncodedPrompt]:
        return self.processor.encode(list(pages), [PAGE_PROMPT] * len(pages)) if pages else []

    def _encode_queries(self, queries: Texts) -> list[EncodedPrompt]:
        listed = [queries] if isinstance(queries, str) else list(queries)
        suffix = self.processor.tokenizer.pad * AUGMENTATION
        texts = [f"{QUERY_PREFIX}{query}{suffix}" for query in listed]
        return self.processor.encode(None, texts) if texts else []

    def _inputs(self, prompts: list[EncodedPrompt], length: int | None = None) -> Inputs:
        """Inputs padded on the right to `length`, by default a bucket of lengths."""
        length = length or round_up(self.processor.padded_length(prompts))
        text = self.processor.pad(prompts, "right", length)
        return Inputs(images=self.processor.prompt_images(prompts), **text)

    def score(self, queries: Embeddings, pages: Embeddings) -> Float32[np.ndarray, "Q P"]:
        """The late interaction of every query with every page: the higher, the better they match.
        Pages are scored some at a time, so that memory does not grow with their number."""
        check_vectors(queries, pages)
        parts = []
        for start in range(0, len(pages), CHUNK):
            rows = slice(start, start + CHUNK)
            vectors, valid = _padded(pages.vectors[rows], pages.valid[rows], CHUNK)
            scores = to_host(_score(queries.vectors, queries.valid, vectors, valid))
            parts.append(scores[:, : len(pages.vectors[rows])])
        return np.concatenate(parts, axis=1)

    def match(self, query: str, page: ImageSource) -> Float32[np.ndarray, "T P"]:
        """How similar each token of a query is to each patch of a page, for a map (`overlay`)."""
        queries, pages = self.embed_queries(query), self.embed_pages([page])
        text = queries.vectors[0, queries.valid[0]]
        patches = pages.vectors[0, pages.valid[0]][: self.processor.image_tokens]
        return np.asarray(text @ patches.T, np.float32)

    def save(
        self, directory: str | Path, like: CheckpointSource | str, force: bool = False
    ) -> None:
        """Write a checkpoint of transformers' `ColPaliForRetrieval`.

        Args:
            like: The checkpoint whose tokenizer and processor files are copied.
        """
        vlm = {path: np.asarray(array) for path, array in parameters(self.model.vlm).items()}
        kernel, bias = self.model.projection.kernel, self.model.projection.bias
        files = companion_files(resolve(like).tokenizer_dir)
        colpali.write(
            user_path(directory),
            self.model.vlm.config,
            vlm,
            np.asarray(kernel[...]),
            np.asarray(bias[...]),  # type: ignore[index]
            files,
            force,
        )

    def _embed(self, prompts: list[EncodedPrompt], batch_size: int) -> Embeddings:
        if not prompts:
            raise ValueError("nothing to embed: give at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        length = round_up(self.processor.padded_length(prompts))
        vectors, valid = [], []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            filled = batch + batch[:1] * (batch_size - len(batch) if start else 0)
            inputs = self._inputs(filled, length)
            vectors.append(to_host(_forward(self.model, inputs))[: len(batch)])
            valid.append(inputs.valid[: len(batch)])
        return Embeddings(np.concatenate(vectors), np.concatenate(valid))


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | str | None = None,
    size: int | None = None,
    seed: int = 0,
    base: str | Path | None = None,
) -> Retriever:
    """Load a ColPali: a checkpoint of transformers (vidore/colpali-v1.3-hf), or of colpali-engine,
    also as a LoRA adapter (vidore/colpali-v1.3), which is merged into its base.

    Args:
        source: Its directory or hub id; or any PaliGemma, together with `size`.
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint, and float32 on
            a CPU.
        mesh: Devices to shard the model over, as in `paligemma_jax.load`.
        size: Start training from a PaliGemma with a new, random projection to vectors of this
            length.
        seed: Seed of the projection.
        base: The base checkpoint of an adapter, if it is no longer where its config says.

    Raises:
        ValueError: The checkpoint or an option cannot be used.
    """
    enable_compilation_cache()
    location = resolve(source, base=base)
    checkpoint = _open(location)
    kernel = bias = None
    if checkpoint is not None:
        if size is not None:
            raise ValueError(f"size must be left out, since {source} has a projection")
        vlm, kernel, bias = checkpoint.vlm, checkpoint.kernel.load(), checkpoint.bias.load()
        size = len(bias)
    elif size is None:
        raise ValueError(
            f"{source} is a PaliGemma without a projection: load a ColPali such as "
            "vidore/colpali-v1.3-hf, or train a projection (size=128)"
        )
    else:
        vlm = location.merged
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else vlm.config.dtype
    config = replace(vlm.config, dtype=dtype)
    devices = resolve_mesh(mesh, config)
    model = ColPali(read_model(vlm, config, devices), size, nnx.Rngs(seed))
    if kernel is not None:
        model.projection.kernel = nnx.Param(jnp.asarray(kernel, dtype))
        model.projection.bias = nnx.Param(jnp.asarray(bias, dtype))
    return Retriever(distribute(model, devices), make_processor(location, config))


def _open(source: CheckpointSource) -> colpali.ColPaliCheckpoint | None:
    """The opened ColPali, with its adapter merged; None for a PaliGemma."""
    weights, adapter = source.weights, source.adapter
    if source.state is not None:
        return None
    if adapter is not None and (
        colpali_adapter.has_projection(adapter) or colpali.is_colpali(weights)
    ):
        return colpali_adapter.read(weights, adapter)
    return colpali.read(weights) if adapter is None and colpali.is_colpali(weights) else None


def check_vectors(queries: Embeddings, pages: Embeddings) -> None:
    """Raise ValueError unless the vectors of both have the same length."""
    sizes = queries.vectors.shape[-1], pages.vectors.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"queries and pages must have vectors of one length, got {sizes[0]} and {sizes[1]}: "
            "embed both with the same model"
        )


@mesh_jit
def _forward(model: ColPali, inputs: Inputs) -> Float32[Array, "B T E"]:
    return model(inputs.tokens, inputs.images, inputs.valid)


@jax.jit
def _score(queries: Array, query_valid: Array, pages: Array, page_valid: Array) -> Array:
    pages, queries = (jnp.asarray(x, jnp.float32) for x in (pages, queries))
    return max_similarity(queries, query_valid, pages, page_valid)


def _padded(
    vectors: Float[np.ndarray, "N T E"], valid: Bool[np.ndarray, "N T"], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows without valid tokens added, so that one program scores every part."""
    missing = rows - len(vectors)
    return (np.pad(vectors, [(0, missing), (0, 0), (0, 0)]), np.pad(valid, [(0, missing), (0, 0)]))
