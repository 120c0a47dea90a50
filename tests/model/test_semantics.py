"""The semantics of PaliGemma: each test compares with transformers in float32, and would show one
particular mistake. (Pixels and prompts: tests/processing; losses: tests/training.)"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.decoding import prefill, seen_ids, tokens_of
from support.hf_models import (
    IMAGE,
    hf_inputs,
    hf_logits,
    hf_stages,
    old_config,
    random_inputs,
    random_model,
    save_checkpoint,
)
from support.rows import one_row, replace_config
from transformers import GenerationConfig, PaliGemmaForConditionalGeneration

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.inference import scoring
from paligemma_jax.inference.sampling import Sample
from paligemma_jax.model.masks import prefix_lm_mask, token_span

KINDS = pytest.mark.parametrize("kind", ["pg2", "pg1"])


def assert_logits(reference, model, inputs, limit=2e-4):
    expected = hf_logits(reference, inputs)
    error = np.abs(np.asarray(scoring.forward(model, inputs)) - expected)[inputs.valid]
    assert error.max() <= limit and error.mean() <= 2e-5
    return expected


@KINDS
def test_norms_of_one_layer(random_checkpoint, kind):
    """Random norm weights show w instead of 1 + w, missing post-norms, and the two roles of
    post_attention_layernorm."""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((1, 5, 6),))
    expected = hf_stages(reference, inputs)["decoder/layers/0"]
    np.testing.assert_allclose(
        scoring.forward_stages(model, inputs)["decoder/layers/0"], expected, atol=2e-5
    )


def test_interventions(random_checkpoint, monkeypatch):
    """A layer, a branch and the attention weights of three layers are replaced at once, in
    transformers by hooks."""
    reference, _, model = random_checkpoint("pg2", 3)
    inputs = random_inputs(reference, ((1, 5, 6),))
    own = hf_stages(reference, inputs)
    fed = {
        "vision/layers/0": own["vision/layers/0"][:, ::-1],
        "decoder/layers/0/attention/weights": own["decoder/layers/0/attention/weights"][:, ::-1],
        "decoder/layers/1/mlp/output": own["decoder/layers/1"] * 0.5,
        "decoder/layers/2": own["decoder/layers/2"] + own["decoder/layers/1"],
    }
    tensors = {name: torch.tensor(value.copy()) for name, value in fed.items()}
    vision, text = reference.model.vision_tower, reference.model.language_model
    vision = getattr(vision, "vision_model", vision)
    softmax, inside = torch.nn.functional.softmax, []

    def replaced(*args, **options):
        return (
            tensors["decoder/layers/0/attention/weights"] if inside else softmax(*args, **options)
        )

    def replace_by(module, name):
        return module.register_forward_hook(lambda *_: tensors[name])

    monkeypatch.setattr(torch.nn.functional, "softmax", replaced)
    hooks = [
        replace_by(vision.encoder.layers[0], "vision/layers/0"),
        text.layers[0].register_forward_pre_hook(lambda *_: inside.append(True)),
        text.layers[0].register_forward_hook(lambda *_: inside.clear()),
        replace_by(text.layers[1].post_feedforward_layernorm, "decoder/layers/1/mlp/output"),
        replace_by(text.layers[2], "decoder/layers/2"),
    ]
    expected = hf_stages(reference, inputs)
    for hook in hooks:
        hook.remove()
    actual = scoring.forward_stages(model, inputs, fed=fed)
    assert np.abs(expected["logits"] - own["logits"]).max() > 0.1
    for name in ("projector", "decoder/layers/0", "decoder/layers/1", "logits"):
        np.testing.assert_allclose(actual[name], expected[name], atol=2e-4, err_msg=name)


def test_query_scale(random_checkpoint):
    """Tests query_pre_attn_scalar 18, head_dim 20, and heads * head_dim != hidden."""
    reference, _, model = random_checkpoint("pg2", 3)
    config = model.config.decoder
    assert (
        config.query_pre_attn_scalar,
        config.head_dim,
        config.num_attention_heads * config.head_dim,
    ) == (18, 20, 80) and config.hidden_size == 56
    assert_logits(reference, model, random_inputs(reference, ((1, 5, 6),)))


def test_window_does_not_narrow_the_prefix(random_checkpoint):
    """Tests a prompt alone, with a window of 8 and 16 image tokens."""
    reference, _, model = random_checkpoint("pg2", 3)
    assert_logits(reference, model, random_inputs(reference, ((1, 9, 0),)))


@pytest.mark.parametrize("window", [7, 8, 9])
def test_window_on_the_suffix(random_checkpoint, window):
    """Each window must match its own: missing, off by one, wrong layers."""
    reference, _, model = random_checkpoint("pg2", 3, text=(("sliding_window", window),))
    inputs = random_inputs(reference, ((1, 5, 10),))
    expected = assert_logits(reference, model, inputs)
    wrong = random_checkpoint("pg2", 3, text=(("sliding_window", window + 1),))[2]
    assert np.abs(np.asarray(scoring.forward(wrong, inputs)) - expected)[inputs.targets].max() > 0.1


@KINDS
def test_suffix_is_causal_and_prefix_is_not(random_checkpoint, kind):
    """Changing the last suffix token changes nothing before it; changing the last prompt token
    changes the image positions."""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((1, 5, 6),))

    def run(place, name):
        tokens = changed(inputs.tokens, place)
        return np.asarray(scoring.forward_stages(model, replace(inputs, tokens=tokens))[name])

    assert (run(-1, "logits")[0, :-1] == run(None, "logits")[0, :-1]).all()
    assert (run(-1, "logits")[0, -1] != run(None, "logits")[0, -1]).any()
    assert (
        np.abs(run(-8, "decoder/layers/0") - run(None, "decoder/layers/0"))[0, :16].max(axis=1)
        > 1e-4
    ).all()


def changed(tokens, place):
    tokens = tokens.copy()
    if place is not None:
        tokens[0, place] = 7 if tokens[0, place] != 7 else 8
    return tokens


@KINDS
@pytest.mark.parametrize("prefix", [False, True])
def test_all_suffix_all_prefix(random_checkpoint, kind, prefix):
    """token_type_ids all one is plain causal attention; all zero is full attention."""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((1, 5, 6),))
    assert_logits(
        reference,
        model,
        replace(
            inputs,
            prefix=np.full_like(inputs.prefix, prefix),
            targets=np.full_like(inputs.targets, not prefix),
        ),
    )


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(random_checkpoint, kind, side):
    """A row in a batch equals the row alone; positions start at 1 and skip pads."""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((1, 9, 8), (1, 3, 2)), side=side)
    assert_logits(reference, model, inputs)
    for row in (0, 1):
        alone = one_row(inputs, row, slice(row, row + 1))
        batched = np.asarray(scoring.forward(model, inputs))[row][inputs.valid[row]]
        np.testing.assert_allclose(
            batched, scoring.forward(model, alone)[0], atol=1e-5 * np.abs(batched).max()
        )
        np.testing.assert_allclose(batched, reference_alone(reference, alone), atol=2e-4)


def reference_alone(reference, inputs):
    with torch.no_grad():  # without position_ids transformers takes arange + 1
        return reference(**hf_inputs(inputs)).logits[0].numpy()


def test_cached_decoding_across_the_window(random_checkpoint):
    """20 greedy tokens of a left-padded batch equal transformers', and their logits a full pass."""
    reference, _, model = random_checkpoint("pg2", 3)
    inputs = random_inputs(reference, ((1, 9, 0), (1, 3, 0)))
    tokens = tokens_of(model, inputs, 20)
    expected = reference.generate(**hf_inputs(inputs), max_new_tokens=20, do_sample=False)[
        :, inputs.tokens.shape[1] :
    ].numpy()
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)

    def grown(old, new):
        return np.concatenate([old, new], axis=1)

    all_true, all_false = np.ones_like(tokens, bool), np.zeros_like(tokens, bool)
    full = replace(
        inputs,
        tokens=grown(inputs.tokens, tokens),
        valid=grown(inputs.valid, all_true),
        prefix=grown(inputs.prefix, all_false),
        targets=grown(inputs.targets, all_true),
    )
    expected = hf_logits(reference, full)
    logits, cache = prefill(model, inputs, inputs.tokens.shape[1] + 24)
    for step in range(20):
        np.testing.assert_allclose(
            logits, expected[:, inputs.tokens.shape[1] + step - 1], atol=2e-4
        )
        logits, cache = model.decode_step(jnp.asarray(tokens[:, step]), cache)


@KINDS
def test_right_padded_generation(random_checkpoint, kind):
    """transformers fails here; the oracle is each row alone."""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((1, 9, 0), (2, 3, 0), (1, 1, 0)), side="right")
    actual = tokens_of(model, inputs, 16)
    for row, images in enumerate((slice(0, 1), slice(1, 3), slice(3, 4))):
        alone = one_row(inputs, row, images)
        expected = reference.generate(**hf_inputs(alone), max_new_tokens=16, do_sample=False)[
            0, alone.tokens.shape[1] :
        ].numpy()
        np.testing.assert_array_equal(actual[row, : len(expected)], expected)


def test_image_features_are_not_scaled(random_checkpoint):
    """The projector's output is not scaled; text embeddings are table * sqrt(D)."""
    reference, _, model = random_checkpoint("pg2", 3)
    inputs = random_inputs(reference, ((1, 5, 6),))
    stages = {
        name: np.asarray(value) for name, value in scoring.forward_stages(model, inputs).items()
    }
    with torch.no_grad():
        features = reference.get_image_features(
            hf_inputs(inputs)["pixel_values"]
        ).pooler_output.numpy()
    np.testing.assert_allclose(stages["projector"].reshape(features.shape), features, atol=1e-5)
    image = inputs.tokens[0] == IMAGE
    np.testing.assert_array_equal(stages["decoder/embeddings"][0, image], stages["projector"][0])
    np.testing.assert_array_equal(
        stages["decoder/embeddings"][0, ~image],
        hf_stages(reference, inputs)["decoder/embeddings"][0, ~image],
    )


def test_bfloat16_embedding_scale(random_checkpoint, tmp_path):
    """D = 56: sqrt(D) is not a bfloat16 (7.4833 -> 7.46875). The table must match bit for bit."""
    reference = random_checkpoint("pg2", 3)[0]
    directory = save_checkpoint(reference, tmp_path, dtype=torch.bfloat16)
    model = load_model(directory, "bfloat16")
    ids = np.arange(model.config.decoder.vocab_size)[None]
    with torch.no_grad():
        narrow = PaliGemmaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.bfloat16
        ).model.language_model
        expected = narrow.embed_tokens(torch.tensor(ids)).float().numpy()
    np.testing.assert_array_equal(
        np.asarray(model.embed(jnp.asarray(ids), None), np.float32), expected
    )


@KINDS
def test_images_between_words(random_checkpoint, kind):
    """Two images with text between them, and a row with one: features follow the reading order."""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((2, 5, 4), (1, 4, 3)), order="mixed")
    expected = assert_logits(reference, model, inputs)
    swapped = replace(inputs, images=inputs.images[[1, 0, 2]])
    assert np.abs(np.asarray(scoring.forward(model, swapped)) - expected)[0].max() > 0.1


@KINDS
def test_image_ids_without_pixels(random_checkpoint, kind):
    """Without pixels `<image>` is an ordinary token, as in transformers. (Mismatched counts:
    tests/processing/test_processor.py.)"""
    reference, _, model = random_checkpoint(kind, 3)
    inputs = random_inputs(reference, ((1, 5, 4),))
    with torch.no_grad():
        expected = reference(
            **{key: value for key, value in hf_inputs(inputs).items() if key != "pixel_values"}
        ).logits.numpy()
    actual = scoring.forward(model, replace(inputs, images=None))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_image_id_beyond_the_table(random_checkpoint):
    """An `<image>` id beyond the table looks up row 0, which the features then replace."""
    reference, _, model = random_checkpoint("pg2", 3, image_id=505)
    inputs = random_inputs(reference, ((1, 5, 4),))
    assert inputs.tokens.max() == 505 >= model.config.decoder.vocab_size
    assert_logits(reference, model, inputs)


@pytest.mark.parametrize("size", [56, 70])
def test_vision_tower(random_checkpoint, size):
    """Tanh gelu (erf changes logits by only 0.01), eps 1e-6, a final norm with random weights,
    biases, the order of pixels in a patch."""
    reference, _, model = random_checkpoint("pg2", 3, vision=(("image_size", size),))
    inputs = random_inputs(reference, ((1, 5, 0),))
    expected, actual = hf_stages(reference, inputs), scoring.forward_stages(model, inputs)
    for name in (
        "vision/patches",
        "vision/embeddings",
        "vision/layers/2",
        "vision/output",
        "projector",
    ):
        np.testing.assert_allclose(actual[name], expected[name], atol=2e-5, err_msg=name)


@KINDS
@pytest.mark.parametrize("layout", ["released", "v5", "memory"])
@pytest.mark.parametrize("form", ["whole", "shards", "head", "old config", "bfloat16", "float16"])
def test_loading(random_checkpoint, tmp_path, kind, layout, form):
    """Logits are identical from all layouts, from shards, with or without the tied head, in all
    dtypes, and with both generations of config.json."""
    reference, _, model = random_checkpoint(kind, 3)
    dtype = getattr(torch, form) if "float" in form else torch.float32
    save_checkpoint(
        reference, tmp_path, layout, dtype, shards=form == "shards", head=form == "head"
    )
    if form == "old config":
        old_config(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    inputs = random_inputs(reference, ((1, 5, 4),))
    if dtype != torch.float32:
        model = jax.tree.map(lambda a: a.astype(form).astype(jnp.float32), model)
    np.testing.assert_array_equal(scoring.forward(loaded, inputs), scoring.forward(model, inputs))


FILTERS = [
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.9),
    dict(min_p=0.05),
    dict(repetition_penalty=1.2),
    dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    dict(temperature=1.7, top_k=40, top_p=0.5),
    dict(top_p=0.01),
    dict(top_k=1000),
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_sampling_filters(random_checkpoint, settings):
    """Filtered logits equal those of transformers' processors, with ties, repeated ids and
    `<image>` in the prompt."""
    reference, _, model = random_checkpoint("pg2", 3)
    inputs = random_inputs(reference, ((1, 9, 0), (2, 9, 0)))
    logits = (
        np.random.default_rng(0)
        .normal(size=(2, model.config.decoder.vocab_size))
        .astype(np.float32)
        * 3
    )
    logits[:, 20:40] = np.sort(logits)[:, -4:-3]  # ties across the k-th place
    config = GenerationConfig(do_sample=True, **{"top_k": None} | settings)
    processors = reference._get_logits_processor(
        config, input_ids_seq_length=inputs.tokens.shape[1]
    )
    for row in (0, 1):  # one by one, without pads, which transformers would mask
        ids = torch.tensor(inputs.tokens[row : row + 1][:, inputs.valid[row]]).long()
        expected = processors(ids, torch.tensor(logits[row : row + 1])).numpy()
        actual = Sample(**settings).filter(
            jnp.asarray(logits[row : row + 1]), seen_ids(model, inputs)[row : row + 1]
        )
        if (
            "top_p" in settings
        ):  # torch sorts ties in no particular order: compare how many are kept
            actual, expected = np.sort(actual), np.sort(expected)
        assert np.isfinite(actual).sum() >= 1
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@KINDS
def test_softcaps_saturate(random_checkpoint, kind):
    """With weights four times as large, tanh saturates; logits stay within 30."""
    reference, _, model = random_checkpoint(kind, 3, scale=4.0)
    inputs = random_inputs(reference, ((1, 5, 6),))
    expected = hf_logits(reference, inputs)
    actual = np.asarray(scoring.forward(model, inputs))
    if kind == "pg2":
        assert 29 < np.abs(actual).max() <= 30
    # The softmax is much sharper with such weights: rounding errors grow by their square.
    assert np.abs(actual - expected).max() / np.abs(expected).max() < 3e-3
    assert np.mean(np.argmax(actual, -1) == np.argmax(expected, -1)) == 1


def test_eos_ends_one_row(random_checkpoint):
    """After eos, which is kept, a row continues with pads and does not disturb the other."""
    reference, _, model = random_checkpoint("pg2", 3)
    inputs = random_inputs(reference, ((1, 9, 0), (1, 3, 0)))
    free = tokens_of(model, inputs, 16)
    eos = int(next(token for token in free[0, 2:8] if token not in free[1]))
    stopped = tokens_of(replace_config(model, eos_token_ids=(eos, 450)), inputs, 16)
    end = list(free[0]).index(eos)
    np.testing.assert_array_equal(stopped[0], [*free[0, : end + 1], *[0] * (15 - end)])
    np.testing.assert_array_equal(stopped[1], free[1])
    expected = reference.generate(
        **hf_inputs(inputs), max_new_tokens=16, do_sample=False, eos_token_id=[eos, 450]
    )
    np.testing.assert_array_equal(
        stopped[:, : expected.shape[1] - inputs.tokens.shape[1]],
        expected[:, inputs.tokens.shape[1] :].numpy(),
    )


def test_first_token_after_a_prompt_longer_than_the_window():
    """At 896 pixels, 4,096 image tokens fill the window. The first generated token attends to W
    keys in local layers and to all keys in global layers."""
    valid = np.ones((1, 20), bool)
    tokens = token_span(jnp.asarray(valid), jnp.asarray(valid & (np.arange(20) < 19)), 1)
    last = jax.tree.map(lambda a: a[:, -1:], tokens)
    assert prefix_lm_mask(last, tokens, 16).sum() == 16
    assert prefix_lm_mask(last, tokens, 2**30).sum() == 20
    assert prefix_lm_mask(tokens, tokens, 16)[0, :19, :19].all()


def test_generation_after_a_prompt_longer_than_the_window(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 3, text=(("sliding_window", 16),))
    inputs = random_inputs(reference, ((1, 3, 0),))
    expected = reference.generate(**hf_inputs(inputs), max_new_tokens=12, do_sample=False)[
        :, inputs.tokens.shape[1] :
    ].numpy()
    np.testing.assert_array_equal(tokens_of(model, inputs, 12)[:, : expected.shape[1]], expected)


def test_every_weight_of_the_random_models_is_random():
    """No norm is one and no bias zero, which would hide mistakes."""
    for name, p in random_model("pg2", 3).named_parameters():
        assert len(p.unique()) > p.numel() // 2, name
