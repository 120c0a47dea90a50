"""Vectors of texts and pages, by a ColPali checkpoint.

Late interaction has a vector for each token: an embedding is a list of vectors. The official client
asks for base64 and makes one flat list of it, so each embedding says its shape.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from threading import Lock

import numpy as np

from paligemma_jax.retrieval.retriever import Embeddings
from paligemma_jax.serving.errors import ApiError, JsonObject
from paligemma_jax.serving.pictures import open_picture
from paligemma_jax.serving.schema import EmbeddingRequest
from paligemma_jax.serving.service import Service

_lock = Lock()  # one at a time, beside the engine


def embed(request: EmbeddingRequest, service: Service) -> JsonObject:
    """Answer a request for embeddings of queries (texts) and pages (pictures)."""
    retriever = service.retriever
    if retriever is None:
        raise ApiError(
            404,
            "this server has no embeddings: start it with --embed and a ColPali checkpoint",
            "model_not_found",
            "model",
        )
    if request.model != service.retriever_name:
        raise ApiError(
            404,
            f"model must be {service.retriever_name} for embeddings, got {request.model[:100]!r}",
            "model_not_found",
            "model",
        )
    inputs = [request.input] if isinstance(request.input, str) else request.input
    pages = {
        n: open_picture(entry.image_url.url, f"input {n}", service.pictures, service.allow_urls)
        for n, entry in enumerate(inputs)
        if not isinstance(entry, str)
    }
    texts = {n: entry for n, entry in enumerate(inputs) if isinstance(entry, str)}
    vectors: dict[int, np.ndarray] = {}
    with _lock:
        if texts:
            vectors |= _by_number(texts, retriever.embed_queries(list(texts.values())))
        if pages:
            vectors |= _by_number(pages, retriever.embed_pages(list(pages.values())))
    data = [
        _entry(n, vectors[n].astype(np.float32), request.encoding_format)
        for n in range(len(inputs))
    ]
    tokens = sum(len(vectors[n]) for n in vectors)
    usage = dict(prompt_tokens=tokens, total_tokens=tokens)
    return dict(object="list", data=data, model=request.model, usage=usage)


def _by_number(numbers: Iterable[int], found: Embeddings) -> dict[int, np.ndarray]:
    rows = zip(numbers, found.vectors, found.valid, strict=True)
    return {n: vectors[valid] for n, vectors, valid in rows}


def _entry(index: int, vectors: np.ndarray, form: str) -> JsonObject:
    is_base64 = form == "base64"
    encoded = base64.b64encode(vectors.tobytes()).decode() if is_base64 else vectors.tolist()
    return dict(object="embedding", index=index, shape=list(vectors.shape), embedding=encoded)
