"""The parity report: planted defects are located; what it prints, writes and exits with."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_models import random_inputs
from support.paths import GOLDEN

from convert import formats
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.losses.tokens import cross_entropy
from paligemma_jax.model import decoder, masks, stages, vision
from paligemma_jax.model.stages import stage
from paligemma_jax.parity import jax_model, stage_errors, torch_model, torch_stages
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.parity.reference import compute_reference

GOLDEN = GOLDEN / "pg2"


@pytest.fixture(scope="module")
def compared(random_checkpoint):
    """A case with both kinds of padding and rows of one and two images, and its reference."""
    model, directory, _ = random_checkpoint("pg2", 0)
    inputs = random_inputs(model, ((1, 5, 12), (2, 3, 4)), 0, order="mixed")
    case = ParityCase(formats.read(directory), inputs, inputs, resolve(directory))
    return case, compute_reference(case)


def decoder_config(**changes):
    """Build every decoder layer with these changes."""

    def broken(config):
        return abstract_model(replace(config, decoder=replace(config.decoder, **changes)))

    return mock.patch.object(jax_model, "abstract_model", broken)


def module(path: str, call):
    """Replace the call of the module at `path` by call(module, original call, *arguments)."""

    def broken(config):
        child = model = abstract_model(config)
        for name in path.split("/"):
            child = child[int(name)] if name.isdigit() else getattr(child, name)
        kind = type(child)
        methods = {"__call__": lambda self, *args: call(self, kind.__call__, *args)}
        child.__class__ = type(f"Broken{kind.__name__}", (kind,), methods)
        return model

    return mock.patch.object(jax_model, "abstract_model", broken)


@contextmanager
def mask(change):
    """Change the mask in all decoder layers, which have to be compiled again."""
    jax_model.run_layer.clear_cache()
    rule = mock.patch.object(
        masks.Mask, "__call__", lambda self: change(self.queries, self.keys, self.window)
    )
    with rule:
        yield
    jax_model.run_layer.clear_cache()


def erf_gelu(self, _, x):
    gate = self.gate(x)
    return self.down(gate * 0.5 * (1 + jax.scipy.special.erf(gate * 0.5**0.5)) * self.up(x))


def quick_gelu(self, _, x):
    y = self.up(x)
    return self.down(y * jax.nn.sigmoid(1.702 * y))


def norm_after_the_sum(self, _, x, queries, window, cache):
    with stages.scope("attention"):
        y, kv = self.attention(self.pre_attention_norm(x), queries, window, cache)
        x = self.post_attention_norm(x + stage("output", y, "branch"))
    with stages.scope("mlp"):
        y = self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))
        return x + stage("output", y, "branch"), kv


def doubled_residual_stream(self, _, x, queries, window, cache):
    """The branches are correct, but their sum is not."""
    with stages.scope("attention"):
        y, kv = self.attention(self.pre_attention_norm(x), queries, window, cache)
        x = x + stage("output", self.post_attention_norm(y), "branch")
    with stages.scope("mlp"):
        y = self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))
        return 2 * x + stage("output", y, "branch"), kv


def w_for_1_w(self, call, x):
    return call(self, x) / (1 + self.scale[...]) * self.scale[...]


def causal(queries, keys, window):
    return masks.prefix_lm_mask(replace(queries, prefix=queries.prefix & False), keys, window)


def wider(queries, keys, window):
    return masks.prefix_lm_mask(queries, keys, window + 1)


def left_out(self, call, x):
    return x


def divided(self, call, x):
    return call(self, x) * 56**-0.5


def unscaled(self, tokens, dtype):
    return self.table[...][tokens]


def transposed(images, size):
    return PATCHES(jnp.swapaxes(images, 1, 2), size)


PATCHES = vision.patches
FIRST_WEIGHTS = "decoder/layers/0/attention/weights"
# The planted defects, and the first stage that must diverge.
DEFECTS = {
    "none": (nullcontext, None),
    "image height and width swapped": (
        lambda: mock.patch.object(vision, "patches", transposed),
        "vision/patches",
    ),
    "quick gelu in one vision layer": (
        lambda: module("vision/layers/1/mlp", quick_gelu),
        "vision/layers/1/mlp/output",
    ),
    "last vision norm left out": (lambda: module("vision/norm", left_out), "vision/output"),
    "features divided by sqrt(D)": (lambda: module("projector", divided), "projector"),
    "embeddings not scaled": (
        lambda: mock.patch.object(decoder.Embedder, "encode", unscaled),
        "decoder/embeddings",
    ),
    "window off by one": (lambda: mask(wider), FIRST_WEIGHTS),
    "prefix is causal": (lambda: mask(causal), FIRST_WEIGHTS),
    "attention softcap left out": (
        lambda: decoder_config(attn_logit_softcapping=None),
        FIRST_WEIGHTS,
    ),
    "scaled by the head size": (lambda: decoder_config(query_pre_attn_scalar=20), FIRST_WEIGHTS),
    "rope base": (lambda: decoder_config(rope_theta=1e6), FIRST_WEIGHTS),
    "eps": (lambda: decoder_config(rms_norm_eps=1e-5), FIRST_WEIGHTS),
    "erf gelu in one layer": (
        lambda: module("decoder/layers/3/mlp", erf_gelu),
        "decoder/layers/3/mlp/output",
    ),
    "w for 1 + w in one norm": (
        lambda: module("decoder/layers/2/pre_mlp_norm", w_for_1_w),
        "decoder/layers/2/mlp/output",
    ),
    "norm after the sum in one layer": (
        lambda: module("decoder/layers/1", norm_after_the_sum),
        "decoder/layers/1/attention/output",
    ),
    "residual stream doubled in one layer": (
        lambda: module("decoder/layers/4", doubled_residual_stream),
        "decoder/layers/4",
    ),
    "w for 1 + w in the last norm": (lambda: module("decoder/norm", w_for_1_w), "decoder/norm"),
    "final softcap left out": (lambda: decoder_config(final_logit_softcapping=None), "logits"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_located(compared, name):
    """On transformers' input, the broken stage is the first that diverges. If only one place is
    broken, no other layer diverges."""
    case, reference = compared
    plant, place = DEFECTS[name]
    with plant(), jax.default_matmul_precision("highest"):
        model, read = jax_model.build_model(case.checkpoint, "float32")
        local = jax_model.compute_stages(model, read, case.inputs, True, reference.fed)
    rows = stage_errors.stage_errors(case, local, local, reference)
    diverging = [row.stage for row in rows if row.diverges and row.stage != "loss"]
    assert diverging[:1] == ([place] if place else []), diverging
    if place and ("in one" in name or "layers" not in place):
        prefix = re.match(r"\w+/layers/\d+|.*", place)[0]
        assert all(stage.startswith(prefix) for stage in diverging), diverging


@pytest.mark.parametrize("reader", ["transformers", "this project"])
def test_streaming_changes_no_bit_of_transformers_and_frees_its_weights(compared, reader):
    case, reference = compared
    if reader == "this project":
        case = replace(case, source=None)
    profile = case.checkpoint.config.profile
    model = torch_model.build_model(case, "float32", "float32", keep=False)
    streamed = torch_stages.compute_stages(model, case.inputs, profile, True)
    for name, value in streamed.items():
        np.testing.assert_array_equal(value, reference.stages[name], name)
    prompts = random_inputs(model, ((1, 5, 0),), 0)
    tokens, _ = torch_model.generate_greedily(model, prompts, profile, 3)
    assert tokens.shape == (1, 3)
    assert not any(parameter.numel() for parameter in model.parameters())


def test_the_limit_of_a_small_loss_allows_for_rounding_only(compared, monkeypatch):
    """The small loss of a confident model has few significant digits in float32. A loss of the
    first target only is still detected."""
    case, reference = compared
    inputs, logits = case.inputs, reference.stages["logits"].copy()
    rows, columns = np.nonzero(inputs.targets)
    logits[rows, columns - 1, inputs.tokens[rows, columns]] += 18
    changed = {"logits": logits}
    sharp = replace(reference, stages=reference.stages | changed, exact=reference.exact | changed)
    row = stage_errors.loss_error(case, logits, sharp, False)
    assert 1e-6 < row.limits[1] < 0.1 and not row.diverges

    def first_target_loss(logits, tokens, targets):
        return cross_entropy(logits, tokens, targets & (jnp.cumsum(targets, axis=1) == 1))

    monkeypatch.setattr(stage_errors, "cross_entropy", first_target_loss)
    assert stage_errors.loss_error(case, logits, sharp, False).diverges


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--image", GOLDEN.parent / "image.png"), "--prompt is missing"),
        (("--model", "3b-224", "--prompt", "caption en"), "random weights"),
        (("--depth", "2"), "a preset with random weights"),
        (("--gradients", "--dtype", "bfloat16"), "float32"),
        (("--model", "28b-896", "--new", 1000), "--new 0"),
        (("--numerics", "jax"), "numerics must be transformers or big_vision, got 'jax'"),
    ],
)
def test_impossible_comparisons_are_refused_in_one_line(command, arguments, message):
    code, out, err = command("parity", *arguments)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_the_command_reports_parity_and_names_a_divergence(command, tmp_path):
    """On a complete checkpoint, checks the table, the JSON, the page, and exit code 1 with the name
    of a broken stage."""
    page = tmp_path / "parity.html"
    inputs = ("--model", GOLDEN, "--image", GOLDEN.parent / "image.png")
    inputs += ("--prompt", "caption en", "detect cat")
    inputs += ("--suffix", "a cat", "<loc0003><loc0100> cat")
    options = ("--new", 4, "--gradients", "--json", "--html", page)
    code, out, err = command("parity", *inputs, *options)
    assert (code, err) == (0, "")
    report = json.loads(out)
    rows = {row["stage"]: row for row in report["stages"]}
    assert report["first_divergence"] is None
    assert report["tokens"]["ours"] == report["tokens"]["transformers"]
    assert {
        *("pixels", "ids", "vision/patches", "projector", "decoder/layers/3/mlp/output"),
        *("logits", "loss", "logits, one program"),
    } <= set(rows)
    assert rows["pixels"]["accumulated"]["max"] == rows["ids"]["accumulated"]["max"] == 0
    assert sum(name.startswith("gradient, decoder/layers") for name in rows) == 4
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 4
    assert "within tolerance" in html and "http" not in html
    with decoder_config(rope_theta=1e6):
        code, out, err = command("parity", *inputs, "--new", 0)
    assert code == 1 and FIRST_WEIGHTS in err and err.count("\n") == 1
    assert "<- diverges" in out
    assert max(map(len, out.split("\n\n")[1].splitlines())) <= 120
