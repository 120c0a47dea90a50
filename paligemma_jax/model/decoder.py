"""The Gemma 1 and 2 decoder (transformers `modeling_gemma.py`, `modeling_gemma2.py`; big_vision
`models/ppp/gemma.py`)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from paligemma_jax.model.attention import attend
from paligemma_jax.model.cache import CachedArray, CachedLayers, KVCache
from paligemma_jax.model.config import AttentionForm, DecoderConfig
from paligemma_jax.model.constrain import constrain, over_all_tokens, ways
from paligemma_jax.model.decode_attention import attend_cached
from paligemma_jax.model.dropout import dropout, with_layer_keys
from paligemma_jax.model.layers import (
    FullFloat,
    Linear,
    RMSNorm,
    full_dtype,
    identity,
    matrix_product,
    place_prefix,
    rope,
)
from paligemma_jax.model.masks import (
    Mask,
    MaskRule,
    TokenSpan,
    prefix_lm_mask,
    two_sided_mask,
    windowed_mask,
)
from paligemma_jax.model.numerics import Numerics, Window
from paligemma_jax.model.stack import scan_layers
from paligemma_jax.model.stages import branch, scope, stage

KeyValue = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]
MASK_RULES: dict[Window, MaskRule] = {
    "none": prefix_lm_mask,
    "causal": prefix_lm_mask,
    "all": windowed_mask,
    "both": two_sided_mask,
}
LayerCache = tuple[CachedArray, CachedArray, TokenSpan, Array]  # k, v, key span, new token's slot


class Attention(nnx.Module):
    def __init__(
        self, config: DecoderConfig, numerics: Numerics, form: AttentionForm, rngs: nnx.Rngs
    ):
        self.config, self.numerics = config, numerics
        self.form: AttentionForm = form
        self.mask_rule = MASK_RULES[numerics.window]
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.q = Linear("NHD", (N, H, D), rngs=rngs)
        self.k = Linear("KHD", (K, H, D), rngs=rngs)
        self.v = Linear("KHD", (K, H, D), rngs=rngs)
        self.o = Linear("DNH", (D, N, H), contracted=2, rngs=rngs)
        self.prefix: nnx.Param | None = nnx.data(None)  # see `with_prefix`

    @over_all_tokens
    def __call__(
        self,
        x: Float[Array, "B T D"],
        queries: TokenSpan,
        window: Array | int,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Attend among the tokens of x, or, with a cache, from one new token to its slots. Also
        returns the keys and values of x."""
        scale = self.config.attention_scale(self.numerics)
        rotate = partial(rope, positions=queries.positions, theta=self.config.rope_theta)
        q, k, v = (stage(name, getattr(self, name)(x), "detail") for name in "qkv")
        q, k = rotate(q), rotate(k)
        if self.prefix is not None and cache is None:
            index = queries.positions - self.numerics.first_position
            k, v = place_prefix(self.prefix[...], index, k, v)
        if self.numerics.scale_query:
            q, scale = q * scale, 1.0
        softcap = self.config.attn_logit_softcapping
        if cache is None:
            mask = Mask(queries, queries, window, self.mask_rule)
            out = attend(q, k, v, scale=scale, softcap=softcap, mask=mask, form=self.form)
        else:
            keys, slot = cache[2:]
            mask = Mask(queries, keys, window, self.mask_rule)
            out = attend_cached(q, (k, v), cache[:2], slot, scale=scale, softcap=softcap, mask=mask)
        return self.o(stage("heads", out, "detail")), (k, v)


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = Linear("FD", (F, D), rngs=rngs)
        self.up = Linear("FD", (F, D), rngs=rngs)
        self.down = Linear("DF", (D, F), rngs=rngs)

    @over_all_tokens
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gated = jax.nn.gelu(self.gate(x), approximate=True) * self.up(x)
        return self.down(stage("activations", gated, "detail"))


class Block(nnx.Module):
    def __init__(
        self, config: DecoderConfig, numerics: Numerics, form: AttentionForm, rngs: nnx.Rngs
    ):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.pre_attention_norm, self.pre_mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.post_norms else identity
        self.post_mlp_norm = norm() if config.post_norms else identity
        self.attention = Attention(config, numerics, form, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        queries: TokenSpan,
        window: Array | int,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        y, kv = self.attend(x, queries, window, cache)
        x = x + y
        return x + self.feed_forward(x), kv

    @branch("attention")
    def attend(self, x, queries, window, cache) -> tuple[Array, KeyValue]:
        y, kv = self.attention(self.pre_attention_norm(x), queries, window, cache)
        return dropout(self.post_attention_norm(y), 0), kv

    @branch("mlp")
    def feed_forward(self, x: Array) -> Array:
        y = dropout(self.mlp(self.pre_mlp_norm(x)), 1)  # before the norm, as in big_vision
        return self.post_mlp_norm(y)


class Embedder(nnx.Module):
    """A table [V, D]: input embedding (scaled by sqrt(D)), output head, or both."""

    axes = "VD"

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5
        self.table = nnx.Param(jax.random.normal(rngs.params(), self.shape) * std)

    def rows(self, tokens: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
        """Table rows of `tokens`, unscaled.

        On a mesh they are first split along D, as the table is, and then by batch: only activations
        move between devices, not the table.
        """
        return constrain("B", constrain("B - D", self.table[...][tokens])).astype(dtype)

    def encode(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """Embed tokens. sqrt(D) is rounded to `dtype` first, as in transformers and big_vision
        (in bfloat16 59.75 instead of 59.87)."""
        return self.rows(tokens, dtype) * jnp.asarray(self.shape[1] ** 0.5, dtype)

    def decode(self, x: Float[Array, "... D"]) -> FullFloat[Array, "... V"]:
        """Compute the logits of all tokens."""
        return matrix_product(x, self.table[...].astype(x.dtype), full_dtype(x.dtype))

    def split(self, parts: int, dtype: DTypeLike) -> Embedder:
        """A stack of `parts` embedders, to `decode` one after the other (see `split_rows`)."""
        return jax.tree.map(lambda table: split_rows(table.astype(dtype), parts), self)

    def decode_at(
        self, x: Float[Array, "*B D"], tokens: Int[Array, "*B"]
    ) -> FullFloat[Array, "*B"]:
        """Compute the logit of one token for each x."""
        rows, dtype = self.rows(tokens, x.dtype), full_dtype(x.dtype)
        return jnp.einsum("...D,...D->...", x, rows, preferred_element_type=dtype)


def split_rows(table: Float[Array, "V ..."], parts: int) -> Float[Array, "parts Z ..."]:
    """Split the rows of a table. On one device, parts are views of it.

    On a mesh, each part has rows of every slice of the table, so that all devices have a share.
    Devices that have the same rows exchange them for all of D in fewer rows, once, which is less
    than to gather each part.
    """
    V, *rest = table.shape
    slices = ways("V", V)
    slices = slices if V % (slices * parts) == 0 else 1
    table = jnp.moveaxis(table.reshape(slices, parts, -1, *rest), 1, 0)
    return constrain("- Z D", table.reshape(parts, -1, *rest))


class Decoder(nnx.Module):
    def __init__(
        self, config: DecoderConfig, numerics: Numerics, form: AttentionForm, rngs: nnx.Rngs
    ):
        self.config, self.numerics = config, numerics
        self.embedder = Embedder(config, rngs)
        self.head = None if config.tie_word_embeddings else Embedder(config, rngs)
        count = config.num_hidden_layers
        layers = [Block(config, numerics, form, rngs) for _ in range(count)]
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @scope("decoder")
    def __call__(
        self, x: Float[Array, "B T D"], queries: TokenSpan, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], CachedLayers, CachedLayers]:
        """Run all layers and the final norm.

        Args:
            x: Embeddings.
            queries: Span of the tokens.
            cache: Without it the tokens attend to each other. With it (T = 1, the cache already
                extended by this token) they attend to its slots.

        Returns:
            Hidden states, and every layer's keys and values of these tokens (see `KVCache`).
        """
        windows = jnp.array(self.config.windows(self.numerics, cache is not None), jnp.int32)

        def block(layer, x, window, *kv):
            return layer(x, queries, window, (*kv, cache.span, cache.length - 1) if cache else None)

        cached = (cache.k, cache.v) if cache else ()
        block, keys = with_layer_keys(block, len(windows))
        x, kv = scan_layers(block, x, self.layers, windows, *cached, *keys)
        k, v = map(list, zip(*kv, strict=True)) if isinstance(kv, list) else kv
        return stage("norm", self.norm(x)), k, v

    @property
    def output(self) -> Embedder:
        """The embedder whose table is the output head."""
        return self.embedder if self.head is None else self.head

    def logits(self, x: Float[Array, "... D"], capped: bool) -> FullFloat[Array, "... V"]:
        """Compute logits, with the final softcap if `capped` and the config has one."""
        return self._cap(self.output.decode(x), capped)

    def log_probabilities(
        self,
        x: Float[Array, "*B D"],
        tokens: Int[Array, "*B"],
        capped: bool,
        chunk: int = 2**15,
        smoothing: float = 0.0,
    ) -> FullFloat[Array, "*B"]:
        """Compute the log-probability of one token for each x. Arguments are those of
        `scores_and_normalizers`."""
        scores, normalizers = self.scores_and_normalizers(x, tokens, capped, chunk, smoothing)
        return scores - normalizers

    def scores_and_normalizers(
        self,
        x: Float[Array, "*B D"],
        tokens: Int[Array, "*B"],
        capped: bool,
        chunk: int = 2**15,
        smoothing: float = 0.0,
    ) -> tuple[FullFloat[Array, "*B"], FullFloat[Array, "*B"]]:
        """Compute the logit of one token, and the log of the softmax's denominator, for each x.

        The vocabulary is processed in chunks, so that [..., V] never exists, forward or backward,
        and the table is read once.

        Args:
            capped: As in `logits`.
            chunk: Largest number of tokens in a chunk.
            smoothing: Fraction of the target that is spread over the vocabulary (torch's
                `label_smoothing`).
        """
        V = self.config.vocab_size
        parts = next(n for n in range(1, V + 1) if V % n == 0 and n * chunk >= V)

        @jax.checkpoint
        def accumulate(carry: tuple[Array, Array], output: Embedder):
            total, summed = carry
            logits = constrain("B - Z", output.decode(x))
            logits = self._cap(logits, capped)
            total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=-1))
            return (total, summed + logits.sum(axis=-1) if smoothing else summed), None

        zeros = jnp.zeros(tokens.shape, full_dtype(x.dtype))
        start = zeros - jnp.inf, zeros
        (total, summed), _ = jax.lax.scan(accumulate, start, self.output.split(parts, x.dtype))
        chosen = self._cap(self.output.decode_at(x, tokens), capped)
        return (1 - smoothing) * chosen + smoothing / V * summed, total

    def _cap(self, logits: Array, capped: bool) -> Array:
        cap = self.config.final_logit_softcapping
        return jnp.tanh(logits / cap) * cap if cap is not None and capped else logits
