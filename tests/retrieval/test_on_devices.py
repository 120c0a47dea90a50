"""A retriever on eight devices."""

from __future__ import annotations

import pytest
from support.on_devices import call


@pytest.mark.thorough
def test_eight_devices_embed_as_one():
    """Batches that the rows' axes divide or not; an index of one can be searched on the others."""
    meshes = ["auto", "data=4,tensor=2", "fsdp=2,tensor=4"]
    results = call(8, "support.retrieval_on_devices.embedding_errors", meshes)
    assert list(results) == meshes
    for mesh, result in results.items():
        vectors_of_queries, vectors_of_pages, scores = result["errors"]
        assert 0 < max(vectors_of_queries, vectors_of_pages) < 1e-5, (mesh, result)
        assert scores < 1e-4, (mesh, result)  # sums over some 30 tokens
        assert result["same_masks"] and result["same_digest"] and result["split"] > 10
