"""Output heads that are not the embedding table: the same numbers as transformers on the same
directory, in every format, form and loss."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support import checkpoint_sources as sources
from support.decoding import tokens_of
from support.hf_models import hf_inputs, hf_logits, random_inputs
from transformers import PaliGemmaForConditionalGeneration

from convert import convert, inspect, read
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.model.flops import training_flops
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.quantization.quantize import weight_formats
from paligemma_jax.sharding.rules import axis_letters
from paligemma_jax.training.losses import answer_loss

WEIGHTS, HEAD = "model.safetensors", "language_model.lm_head.weight"
TABLE = "language_model.model.embed_tokens.weight"


def make(directory: Path, top: bool | None, text: bool | None = None, without: str = "") -> Path:
    """A checkpoint whose head differs from its table, with these values of tie_word_embeddings, and
    without one of its tensors."""
    sources.huggingface(directory, head=True)
    tensors = sources.tensors(directory)
    rng, shape = np.random.default_rng(1), tensors[HEAD].shape
    tensors[HEAD] = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
    tensors.pop(without, None)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    for section, value in ((config, top), (config["text_config"], text)):
        section.pop("tie_word_embeddings", None)
        if value is not None:
            section["tie_word_embeddings"] = value
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def reference(directory: Path) -> PaliGemmaForConditionalGeneration:
    load = PaliGemmaForConditionalGeneration.from_pretrained
    return load(directory, dtype=torch.float32, attn_implementation="eager").eval()


def check_logits(model, directory: Path) -> None:
    theirs = reference(directory)
    inputs = random_inputs(theirs)
    expected = hf_logits(theirs, inputs)
    actual = sources.logits(model, inputs)[inputs.valid]
    np.testing.assert_allclose(actual, expected[inputs.valid], atol=3e-4)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("heads") / "untied", False, False)


@pytest.fixture(scope="module")
def model(untied):
    return load_model(untied)


def test_logits_and_greedy_tokens(untied, model):
    check_logits(model, untied)
    check_logits(stack_model(model, delete=False), untied)
    theirs = reference(untied)
    inputs = random_inputs(theirs, rows=((1, 5, 0), (1, 3, 0)))
    batch = hf_inputs(inputs)
    expected = theirs.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    tokens = tokens_of(model, inputs, 8, min_new_tokens=8)
    np.testing.assert_array_equal(tokens, expected[:, inputs.tokens.shape[1] :])


@pytest.mark.parametrize(
    "top,text,without",
    [(None, None, ""), (True, False, ""), (None, False, HEAD), (True, None, TABLE)],
)
def test_what_is_tied_is_what_transformers_ties(tmp_path, top, text, without):
    """Only the key at the top counts. A head that differs is not tied in spite of it, and a tied
    head without the table is the table (`save_model` of safetensors)."""
    directory = make(tmp_path / "a", top, text, without)
    check_logits(load_model(directory), directory)
    convert(directory, tmp_path / "b", "huggingface")
    check_logits(load_model(tmp_path / "b"), tmp_path / "b")


@pytest.mark.parametrize("without", [HEAD, TABLE])
def test_an_untied_head_and_the_table_are_required(tmp_path, without):
    with pytest.raises(ValueError, match=f"missing {without}"):
        load_model(make(tmp_path / "a", False, without=without))


def test_every_format(untied, model, tmp_path):
    convert(untied, tmp_path / "jax", "jax", verify=True)
    convert(tmp_path / "jax", tmp_path / "huggingface", "huggingface", max_shard=200_000)
    assert sources.same(sources.tensors(tmp_path / "huggingface"), sources.tensors(untied))
    save_model(tmp_path / "saved", model, to="huggingface")
    assert sources.same(sources.tensors(tmp_path / "saved"), sources.tensors(untied))
    with pytest.raises(ValueError, match=r"a big_vision .npz has no output head"):
        convert(untied, tmp_path / "x.npz", "big_vision")
    assert "its output head is not the embedding table" in inspect(tmp_path / "jax")["notes"]


def test_scores_by_chunks_of_the_vocabulary(model):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 56), np.float32))
    tokens = jnp.asarray(rng.integers(0, 500, (2, 3)))
    logits = jax.nn.log_softmax(model.decoder.logits(x, capped=True))
    expected = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    actual = model.decoder.log_probabilities(x, tokens, capped=True, chunk=100)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_gradients(untied, model):
    """Of the head and of the table, whose gradient comes from the inputs alone."""
    theirs = reference(untied)
    inputs = random_inputs(theirs, rows=((1, 5, 4), (1, 3, 4)))
    batch = hf_inputs(inputs)
    batch["position_ids"] = batch["attention_mask"].cumsum(1).clamp(min=1)
    logits = theirs(**batch).logits[:, :-1]
    targets = torch.tensor(inputs.targets[:, 1:])
    torch.nn.functional.cross_entropy(
        logits[targets], batch["input_ids"][:, 1:][targets]
    ).backward()
    values = parameters(model)
    paths = ("decoder/head/table", "decoder/embedder/table")

    def loss(trained):
        whole = with_parameters(model, (values | trained).__getitem__)
        total, count = answer_loss(whole, inputs, jnp.ones(2), 5)
        return total / count

    inputs = jax.tree.map(jnp.asarray, inputs)
    head, table = map(jax.jit(jax.grad(loss))({path: values[path] for path in paths}).get, paths)
    np.testing.assert_allclose(head, theirs.lm_head.weight.grad, atol=2e-5)
    embeddings = theirs.get_input_embeddings().weight.grad
    np.testing.assert_allclose(table, embeddings, atol=2e-5 * float(embeddings.abs().max()) + 1e-6)


def test_quantized_with_the_embedding(untied, tmp_path):
    convert(untied, tmp_path / "a", "jax", quantize="int8,embedding=int8")
    model = load_model(tmp_path / "a")
    assert {"decoder/head", "decoder/embedder"} <= weight_formats(model).keys()
    inputs = random_inputs(reference(untied))
    full = sources.logits(load_model(untied), inputs)
    assert np.abs(sources.logits(model, inputs) - full)[inputs.valid].mean() < 0.1 * full.std()


def test_sharding_and_cost(untied, model):
    assert axis_letters("decoder/head/table", 2) == ["V", "D"]
    tokens, targets = np.full((1, 20), 5), np.ones((1, 20), bool)
    costs = [
        training_flops(model.config, tokens, targets, {path}, encodes=False)
        for path in ("decoder/head/table", "decoder/embedder/table")
    ]
    assert costs[0] - costs[1] == 2 * 20 * 500 * 56
    assert read(untied).config.decoder.tie_word_embeddings is False
