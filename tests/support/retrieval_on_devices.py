"""A retriever on several devices, for `on_devices.call`."""

from __future__ import annotations

import numpy as np

QUERIES = ["4 3 2 3", "a cat", "no digits at all on this page"]


def embedding_errors(meshes: list[str]) -> dict[str, dict]:
    """For each mesh, the largest differences of vectors and scores from those of one device,
    whether masks and digests are equal, and the number of parameters that are split."""
    import jax

    from paligemma_jax.retrieval import retriever

    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(5)]

    def embed(mesh: str | None) -> tuple:
        loaded = retriever.load("tiny", dtype="float32", size=32, mesh=mesh)
        queries = loaded.embed_queries(QUERIES, batch_size=2)
        embedded = loaded.embed_pages(pages, batch_size=4)
        arrays = queries.vectors, embedded.vectors, loaded.score(queries, embedded)
        return arrays, (queries.valid, embedded.valid), loaded

    single, valid, one = embed(None)
    results = {}
    for mesh in meshes:
        arrays, masks, loaded = embed(mesh)
        split = [not a.sharding.is_fully_replicated for a in jax.tree.leaves(loaded.model)]
        results[mesh] = {
            "errors": [float(np.abs(a - b).max()) for a, b in zip(arrays, single, strict=True)],
            "same_masks": all(np.array_equal(a, b) for a, b in zip(masks, valid, strict=True)),
            "same_digest": loaded.digest == one.digest,
            "split": sum(split),
        }
    return results
