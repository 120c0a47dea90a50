"""Architecture: frozen dataclasses with the field names of Hugging Face's config.json, and the
published presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from paligemma_jax.model.numerics import NUMERICS, Numerics

# How attention over whole sequences is computed: in plain JAX, which runs everywhere, or by kernels
# that keep the scores on the chip (`kernels/attention.py`), on TPUs and GPUs.
AttentionForm = Literal["plain", "fused"]

NO_WINDOW = 2**30  # the window of a global layer: longer than any sequence


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP image encoder; defaults are So400m/14 at 224 pixels (arXiv:2303.15343, big_vision
    `models/vit.py`)."""

    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    patch_size: int = 14
    image_size: int = 224
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class DecoderConfig:
    """A Gemma 1 ("gemma") or Gemma 2 ("gemma2") decoder; defaults are Gemma 2 2B
    (arXiv:2408.00118)."""

    model_type: Literal["gemma", "gemma2"] = "gemma2"
    hidden_size: int = 2304
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    intermediate_size: int = 9216
    vocab_size: int = 257216
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True  # whether the embedding table is the output head too

    @property
    def post_norms(self) -> bool:
        """Gemma 2 also normalizes the outputs of attention and MLP, before the residual."""
        return self.model_type == "gemma2"

    @property
    def prefix_shape(self) -> tuple[int, int, int, int]:
        """The axes L, 2, K, H of a prefix, after those of its tokens: keys, then values."""
        return self.num_hidden_layers, 2, self.num_key_value_heads, self.head_dim

    def attention_scale(self, numerics: Numerics) -> float:
        """Factor of the scores. keras-hub takes it from the size of a head in any case."""
        return (self.head_dim if numerics.head_dim_scale else self.query_pre_attn_scalar) ** -0.5

    def windows(self, numerics: Numerics, decoding: bool = False) -> tuple[int, ...]:
        """For each layer, how many keys (itself included) a query attends to. Layers 0, 2, 4, ...
        are local."""
        windowed = numerics.window_decode if decoding else numerics.window != "none"
        local = (self.sliding_window if windowed else None) or NO_WINDOW
        return tuple(local if i % 2 == 0 else NO_WINDOW for i in range(self.num_hidden_layers))


@dataclass(frozen=True)
class PaliGemmaConfig:
    """The configuration of a PaliGemma model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    image_token_id: int = 257152
    eos_token_ids: tuple[int, ...] = (1,)  # any of them ends an answer
    pad_token_id: int = 0
    numerics: str = "transformers"  # a key of NUMERICS
    # Of activations and KV cache: "float32", "bfloat16", "float16", or "float64" as a reference.
    dtype: str = "float32"
    cache: Literal["int8"] | None = None  # dtype of the KV cache, if not `dtype`
    attention: AttentionForm = "plain"

    @property
    def profile(self) -> Numerics:
        return NUMERICS[self.numerics]

    @property
    def activation_dtype(self) -> str:
        if self.profile.float32_activations and self.dtype != "float64":
            return "float32"
        return self.dtype

    @property
    def max_context(self) -> int:
        """Tokens that the published models support, image tokens included (Gemma's
        `max_position_embeddings`)."""
        return 8192

    def soft_tokens(self, count: int) -> range:
        """The ids that stand for a soft prompt of `count` vectors: the first that are neither text
        nor image."""
        first = max(self.decoder.vocab_size, self.image_token_id + 1)
        return range(first, first + count)

    @classmethod
    def preset(cls, name: str) -> PaliGemmaConfig:
        """Return a config of `PRESETS`, such as "3b-224", "pg1-3b-224" (PaliGemma 1) or "tiny"."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
        return PRESETS[name]


_DECODERS = {
    "3b": DecoderConfig(),
    "10b": DecoderConfig(
        hidden_size=3584,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=14336,
    ),
    "28b": DecoderConfig(
        hidden_size=4608,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=36864,
        query_pre_attn_scalar=144,  # hidden_size / num_attention_heads, not head_dim
    ),
    "pg1-3b": DecoderConfig(
        model_type="gemma",
        hidden_size=2048,
        num_hidden_layers=18,
        num_key_value_heads=1,
        intermediate_size=16384,
        sliding_window=None,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
}
_TINY = PaliGemmaConfig(
    vision=VisionConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=344,
        image_size=112,
    ),
    decoder=DecoderConfig(
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        vocab_size=1664,
        query_pre_attn_scalar=40,
        sliding_window=32,
    ),
    image_token_id=1600,
)
PRESETS = {
    f"{name}-{size}": PaliGemmaConfig(VisionConfig(image_size=size), decoder)
    for name, decoder in _DECODERS.items()
    for size in (224, 448, 896)
} | {"tiny": _TINY}


def with_resolution(config: PaliGemmaConfig, image_size: int) -> PaliGemmaConfig:
    """Return `config` for square images of `image_size` pixels."""
    return replace(config, vision=replace(config.vision, image_size=image_size))
