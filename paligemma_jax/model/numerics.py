"""Profiles: what each program, and each release of transformers, computes from the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# Which queries the window of local layers narrows: none; "causal": those of the answer, since image
# and prompt attend to each other at any distance; "all": those of image and prompt, too, looking
# back; "both": looking back and ahead.
Window = Literal["none", "causal", "all", "both"]


@dataclass(frozen=True)
class Numerics:
    """What differs between programs. Each row of `NUMERICS` is tested against the program itself
    (`tests/parity/engines`).

    Sources: transformers `models/gemma2/modeling_gemma2.py` and
    `models/paligemma/modeling_paligemma.py`; big_vision `models/ppp/gemma.py`; keras-hub
    `models/gemma/gemma_attention.py` and `models/pali_gemma/pali_gemma_decoder_block.py`.
    """

    window: Window  # over complete sequences; matters beyond 4,096 tokens (896 pixels)
    window_decode: bool  # and whether generated tokens have one
    capped_prefill: bool  # final softcap on teacher-forced logits and the first generated token's
    capped_decode: bool  # and on later tokens' (big_vision caps there if the config says so)
    scaled_features: bool  # image features are divided by sqrt(D), then multiplied by it, rounded
    first_position: int  # RoPE position of the first token; equal in exact arithmetic
    scale_query: bool  # scale the query (big_vision, keras-hub) or the scores
    head_dim_scale: bool  # by head_dim**-0.5, whatever the config says: differs for 28B
    float32_activations: bool  # big_vision computes in float32 for any weight dtype
    # How transformers masks prompt and answer in one call without labels, and one without token
    # types (`visible_prefix`). Arguments of this project's model say it themselves.
    prefix_without_labels: bool  # the answer is causal; before 5.0 it is part of the prefix
    bidirectional_without_types: bool  # all tokens are prefix; since 5.9 all are causal


def _profiles() -> dict[str, Numerics]:
    """transformers by its releases, each with what changed in it; then other programs."""
    profiles = {}
    profiles["transformers-4.47"] = Numerics(
        window="all",
        window_decode=True,
        capped_prefill=True,
        capped_decode=True,
        scaled_features=True,
        first_position=1,
        scale_query=False,
        head_dim_scale=False,
        float32_activations=False,
        prefix_without_labels=False,
        bidirectional_without_types=True,
    )

    def release(name: str, since: str, **changes) -> None:
        profiles[name] = replace(profiles[since], **changes)

    release("transformers-4.52", "transformers-4.47", capped_prefill=False, capped_decode=False)
    release("transformers-4.53", "transformers-4.52", window="none", window_decode=False)
    release("transformers-4.56", "transformers-4.53", window_decode=True)
    release("transformers-5.0", "transformers-4.56", window="causal", prefix_without_labels=True)
    release("transformers-5.4", "transformers-5.0", scaled_features=False)
    release("transformers-5.9", "transformers-5.4", bidirectional_without_types=False)
    release("transformers", "transformers-5.9", capped_prefill=True, capped_decode=True)
    profiles["big_vision"] = replace(
        profiles["transformers"],
        window="none",
        window_decode=False,
        capped_prefill=False,
        first_position=0,
        scale_query=True,
        float32_activations=True,
    )
    # keras-hub 0.32; its scale has been that of head_dim since it has Gemma 2.
    profiles["keras"] = replace(
        profiles["transformers"],
        window="both",
        first_position=0,
        scale_query=True,
        head_dim_scale=True,
    )
    return profiles


NUMERICS = _profiles()
