"""Gemma 1 and 2 (transformers `modeling_gemma.py`, `modeling_gemma2.py`; big_vision `models/ppp/gemma.py`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from paligemma_jax.model.attention import attend, attend_cached
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.config import DecoderConfig, Numerics
from paligemma_jax.model.layers import Einsum, RMSNorm, fold, joined, parted, place, rope, scope, stage
from paligemma_jax.model.masks import Span


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.config, self.numerics = config, numerics
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q = Einsum("BTD,NHD->BTNH", (N, H, D), rngs=rngs)
        self.k = Einsum("BTD,KHD->BTKH", (K, H, D), rngs=rngs)
        self.v = Einsum("BTD,KHD->BTKH", (K, H, D), rngs=rngs)
        self.o = Einsum("BTNH,DNH->BTD", (D, N, H), rngs=rngs)

    def __call__(self, x: Array, queries: Span, window: Array | int, cache: tuple | None) -> tuple[Array, tuple[Array, Array]]:
        """x [B, T, D] -> the same shape, and the keys and values of these tokens.

        cache: None (they look at each other), or (k, v, keys: Span, slot) of earlier tokens, among which the one new one belongs at `slot`.
        """
        config, scale = self.config, self.config.query_pre_attn_scalar**-0.5
        turn = lambda x: rope(x, queries.positions, config.rope_theta)
        q, k, v = turn(self.q(x)), turn(self.k(x)), self.v(x)
        if self.numerics.scale_query:
            q, scale = q * scale, 1.0
        options = dict(scale=scale, softcap=config.attn_logit_softcapping)
        if cache is None:
            out = attend(q, k, v, **options, mask=(queries, queries, window))
        else:
            cached_k, cached_v, keys, slot = cache
            out = attend_cached(q, (k, v), (cached_k, cached_v), slot, **options, mask=(queries, keys, window))
        return self.o(out), (k, v)


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = Einsum("BTD,FD->BTF", (F, D), rngs=rngs)
        self.up = Einsum("BTD,FD->BTF", (F, D), rngs=rngs)
        self.down = Einsum("BTF,DF->BTD", (D, F), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_attention_norm, self.pre_mlp_norm = norm(), norm()
        self.post_attention_norm, self.post_mlp_norm = (norm(), norm()) if config.post_norms else (None, None)
        self.attention = Attention(config, numerics, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array, queries: Span, window: Array | int, cache: tuple | None) -> tuple[Array, tuple[Array, Array]]:
        with scope("attention"):
            y, kv = self.attention(joined(self.pre_attention_norm(x)), queries, window, cache)
            y = parted(y)
            x = x + stage("output", self.post_attention_norm(y) if self.post_attention_norm else y, branch=True)
        with scope("mlp"):
            y = parted(self.mlp(joined(self.pre_mlp_norm(x))))
            return x + stage("output", self.post_mlp_norm(y) if self.post_mlp_norm else y, branch=True), kv


class Embedder(nnx.Module):
    """The table [V, D] that is both the input embedding (scaled by sqrt(D)) and the output head (unscaled)."""

    axes = "VD"

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.shape = (config.vocab_size, config.hidden_size)
        self.table = nnx.Param(jax.random.normal(rngs.params(), self.shape) * config.hidden_size**-0.5)

    def rows(self, tokens: Array, dtype: Any) -> Array:
        """int32[B, T] -> [B, T, D], first split as the table is, for all rows that share it: only then do rows and D change places."""
        return place("rows", place("replicas T D", self.table[...][tokens])).astype(dtype)

    def encode(self, tokens: Array, dtype: Any) -> Array:
        """int32[B, T] -> [B, T, D]; sqrt(D) is rounded to `dtype` first, as transformers and big_vision do (bfloat16: 59.75 for 59.87)."""
        return self.rows(tokens, dtype) * jnp.asarray(self.shape[1] ** 0.5, dtype)

    def decode(self, x: Array, part: Array | int = 0, parts: int = 1) -> Array:
        """[..., D] -> float32[..., V], or every `parts`-th column from `part` on: a part of every slice, where devices hold slices of the table."""
        table = self.table[...]
        table = table if parts == 1 else table.reshape(-1, parts, table.shape[1])[:, part]
        return jnp.einsum("...D,VD->...V", x, table.astype(x.dtype), preferred_element_type=jnp.float32)

    def decode_at(self, x: Array, tokens: Array) -> Array:
        """[..., D] and int32[...] -> float32[...]: of each logits row the one at its token."""
        return jnp.einsum("...D,...D->...", x, self.rows(tokens, x.dtype), preferred_element_type=jnp.float32)


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.config, self.numerics = config, numerics
        self.embedder = Embedder(config, rngs)
        self.layers = nnx.List([Block(config, numerics, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: Array, queries: Span, cache: KVCache | None = None) -> tuple[Array, Any, Any]:
        """Embeddings [B, T, D] -> the last layer's, normalised, and every layer's k and v of these tokens (see `KVCache`).

        Without a cache the tokens look at each other. With one (T = 1, its span already extended by this token) they look at its slots.
        """
        windows = jnp.array(self.config.windows(self.numerics), jnp.int32)
        if cache is None:
            block = lambda layer, x, window: layer(x, queries, window, None)
            x, kv = fold(block, x, self.layers, windows)
        else:
            block = lambda layer, x, window, k, v: layer(x, queries, window, (k, v, cache.span, cache.length - 1))
            x, kv = fold(block, x, self.layers, windows, cache.k, cache.v)
        k, v = ([k for k, _ in kv], [v for _, v in kv]) if isinstance(kv, list) else kv
        return stage("norm", self.norm(x)), k, v

    def logits(self, x: Array, capped: bool) -> Array:
        """[..., D] -> float32[..., V], with the final softcap if the config has one and `capped`."""
        return self._cap(self.embedder.decode(x), capped)

    def log_probabilities(self, x: Array, tokens: Array, capped: bool, chunk: int = 2**15, smoothing: float = 0.0) -> Array:
        """[..., D] and int32[...] -> float32[...], the log-probability of each token.

        With `smoothing`, that part of it is the mean of the whole vocabulary's (torch's `label_smoothing`).
        The vocabulary goes by in chunks, so that [..., V] never exists, forward or backward, and the table is read once.
        """
        V = self.config.vocab_size
        parts = next(n for n in range(1, V + 1) if V % n == 0 and n * chunk >= V)

        @jax.checkpoint
        def one(carry: tuple[Array, Array], part: Array) -> tuple[tuple[Array, Array], None]:
            logits = self._cap(place("rows S V", self.embedder.decode(x, part, parts)), capped)
            total = jnp.logaddexp(carry[0], jax.nn.logsumexp(logits, axis=-1))
            return (total, carry[1] + logits.sum(axis=-1) if smoothing else carry[1]), None

        none = jnp.zeros(tokens.shape, jnp.float32)
        (total, summed), _ = jax.lax.scan(one, (none - jnp.inf, none), jnp.arange(parts))
        chosen = self._cap(self.embedder.decode_at(x, tokens), capped)
        return (1 - smoothing) * chosen + smoothing / V * summed - total

    def _cap(self, logits: Array, capped: bool) -> Array:
        cap = self.config.final_logit_softcapping
        return jnp.tanh(logits / cap) * cap if cap is not None and capped else logits
