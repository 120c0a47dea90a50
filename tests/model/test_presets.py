"""The presets, against the figures of the published config.json files and the keys of their
checkpoints. Nothing is allocated."""

from __future__ import annotations

import jax
import pytest
import torch
from transformers import PaliGemmaConfig as HFConfig
from transformers import PaliGemmaForConditionalGeneration

from convert import config as config_json
from convert import huggingface
from convert.match import file_shapes, huggingface_weights
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig
from paligemma_jax.model.tree import parameters

# hidden size, layers, heads, key heads, head size, MLP size, query_pre_attn_scalar, softcap of
# scores, final softcap, window, parameters in millions
FIGURES = {
    "3b": (2304, 26, 8, 4, 256, 9216, 256, 50.0, 30.0, 4096, 3032),
    "10b": (3584, 42, 16, 8, 256, 14336, 256, 50.0, 30.0, 4096, 9663),
    "28b": (4608, 46, 32, 16, 128, 36864, 144, 50.0, 30.0, 4096, 27650),
    "pg1-3b": (2048, 18, 8, 1, 256, 16384, 256, None, None, None, 2924),
}
NAMES = [name for name in PRESETS if name != "tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_figures(name):
    size, pixels = name.rsplit("-", 1)
    config = PaliGemmaConfig.preset(name)
    d, v = config.decoder, config.vision
    figures = (
        d.hidden_size,
        d.num_hidden_layers,
        d.num_attention_heads,
        d.num_key_value_heads,
        d.head_dim,
        d.intermediate_size,
    )
    figures += (
        d.query_pre_attn_scalar,
        d.attn_logit_softcapping,
        d.final_logit_softcapping,
        d.sliding_window,
    )
    assert figures == FIGURES[size][:-1]
    assert (d.vocab_size, config.image_token_id, d.rms_norm_eps, d.rope_theta) == (
        257216,
        257152,
        1e-6,
        1e4,
    )
    assert (
        v.hidden_size,
        v.num_hidden_layers,
        v.num_attention_heads,
        v.head_dim,
        v.intermediate_size,
    ) == (1152, 27, 16, 72, 4304)
    assert (v.image_size, v.num_patches, v.layer_norm_eps) == (
        int(pixels),
        {224: 256, 448: 1024, 896: 4096}[int(pixels)],
        1e-6,
    )


@pytest.mark.parametrize("name", NAMES)
def test_parameters_match_the_key_list_of_transformers(name):
    """Every tensor of the transformers model has one counterpart of the same shape here."""
    config = PaliGemmaConfig.preset(name)
    hf_config = HFConfig.from_dict(config_json.config_to_json(config, "bfloat16"))
    with torch.device("meta"):
        reference = PaliGemmaForConditionalGeneration(hf_config)
    theirs = {
        huggingface.canonical_name(key): tuple(value.shape)
        for key, value in reference.state_dict().items()
        if key != "lm_head.weight"
    }
    assert file_shapes(huggingface_weights(config)) == theirs
    ours = jax.eval_shape(lambda: abstract_model(config))
    count = sum(leaf.size for leaf in parameters(ours).values())
    assert count == reference.num_parameters()
    assert (
        abs(count / 1e6 - FIGURES[name.rsplit("-", 1)[0]][-1]) < 6
    )  # 896 pixels have 4.4 million positions more than 224


def test_config_json_round_trip():
    for name, config in PRESETS.items():
        written = config_json.config_to_json(config, "float32")
        assert config_json.config_from_json(written) == config, name
