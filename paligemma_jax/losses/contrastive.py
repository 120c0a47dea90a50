"""Losses that tell pairs from non-pairs. Row i of one side belongs to row i of the other; all other
rows of the batch are negatives. On a mesh the batch is one array, so negatives are those of all
devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32


def softmax_contrastive(
    images: Float[Array, "B E"], texts: Float[Array, "B E"], scale: Float[Array, ""] | float
) -> Float32[Array, ""]:
    """CLIP's loss (arXiv:2103.00020): each image chooses its text, and each text its image.

    Args:
        images: Unit vectors.
        texts: Unit vectors.
        scale: Factor of the cosines, 1 / temperature.
    """
    logits = _products(images, texts) * scale
    return (_choose_own(logits) + _choose_own(logits.T)) / 2


def sigmoid_contrastive(
    images: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
) -> Float32[Array, ""]:
    """SigLIP's loss (arXiv:2303.15343, algorithm 1): each of the B * B pairs is judged alone. The
    sum over pairs is divided by B.

    Args:
        images: Unit vectors.
        texts: Unit vectors.
        scale: Factor of the cosines; starts at 10.
        bias: Starts at -10, since most pairs do not belong together.
    """
    logits = _products(images, texts) * scale + bias
    signs = 2 * jnp.eye(len(logits)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / len(logits)


def max_similarity(
    queries: Float[Array, "Q T E"],
    query_valid: Bool[Array, "Q T"],
    pages: Float[Array, "P S E"],
    page_valid: Bool[Array, "P S"],
) -> Float32[Array, "Q P"]:
    """ColBERT's score (arXiv:2004.12832): each token of a query takes the most similar token of the
    page, and these are summed. Pads do not count."""

    def score(query: Array, valid: Array) -> Array:
        products = jnp.einsum("TE,PSE->PTS", query, pages, preferred_element_type=jnp.float32)
        best = jnp.where(page_valid[:, None], products, -jnp.inf).max(axis=-1)
        return jnp.where(valid, best, 0).sum(axis=-1)

    return jax.lax.map(lambda row: score(*row), (queries, query_valid))


def late_interaction(
    queries: Float[Array, "B T E"],
    query_valid: Bool[Array, "B T"],
    pages: Float[Array, "B S E"],
    page_valid: Bool[Array, "B S"],
    temperature: float = 0.02,
    normalize: bool = True,
) -> tuple[Float32[Array, ""], Float32[Array, "B B"]]:
    """ColPali's loss with in-batch negatives: each query chooses its page.

    Args:
        queries: Unit vectors.
        pages: Unit vectors.
        temperature: Divides the scores.
        normalize: Divide each score by the length of the query first (colpali-engine's
            `ColbertLoss`, whose defaults these are).

    Returns:
        The loss, and the scores that it chooses by, without temperature.
    """
    scores = max_similarity(queries, query_valid, pages, page_valid)
    if normalize:
        scores /= query_valid.sum(axis=1, keepdims=True)
    return _choose_own(scores / temperature), scores


def late_interaction_pairwise(
    queries: Float[Array, "B T E"],
    query_valid: Bool[Array, "B T"],
    pages: Float[Array, "B S E"],
    page_valid: Bool[Array, "B S"],
    temperature: float = 1.0,
) -> tuple[Float32[Array, ""], Float32[Array, "B B"]]:
    """The loss of the ColPali paper (arXiv:2407.01449, equation 2): softplus of how much the best
    wrong page is ahead of the right one.

    Returns:
        The loss, and the scores.
    """
    scores = max_similarity(queries, query_valid, pages, page_valid)
    own = jnp.diagonal(scores)
    wrong = jnp.where(jnp.eye(len(scores), dtype=bool), -jnp.inf, scores).max(axis=1)
    return jax.nn.softplus((wrong - own) / temperature).mean(), scores


def _products(a: Array, b: Array) -> Array:
    return jnp.einsum("AE,BE->AB", a, b, preferred_element_type=jnp.float32)


def _choose_own(scores: Float32[Array, "B B"]) -> Float32[Array, ""]:
    """Mean cross entropy of each row's own column."""
    return -jnp.diagonal(jax.nn.log_softmax(scores)).mean()
