"""The parity report: planted defects are found, each where it was planted; what it prints, writes and exits with."""

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
from paligemma_jax.model import attention, decoder, masks, stages, vision
from paligemma_jax.model.stages import stage
from paligemma_jax.parity import ours, run
from paligemma_jax.parity.inputs import ParityCase
from paligemma_jax.parity.run import ParityConfig, reference_of, stage_rows
from paligemma_jax.training.losses import token_loss

GOLDEN = GOLDEN / "pg2"


@pytest.fixture(scope="module")
def compared(random_checkpoint):
    """A random checkpoint with inputs of both kinds of padding and of two images, and what transformers computes."""
    model, directory, _ = random_checkpoint("pg2", 0)
    inputs = random_inputs(model, ((1, 5, 12), (2, 3, 4)), 0, order="mixed")
    case = ParityCase(formats.read(directory), directory, inputs, inputs)
    return case, reference_of(case, ParityConfig(new=0))


def decoder_config(**changes):
    """Every decoder layer is built with these changes."""

    def planted(config):
        return abstract_model(replace(config, decoder=replace(config.decoder, **changes)))

    return mock.patch.object(ours, "abstract_model", planted)


def module(path: str, call):
    """`call(module, its own call, *arguments)` in the place of the call of the one module at `path`."""

    def planted(config):
        child = model = abstract_model(config)
        for name in path.split("/"):
            child = child[int(name)] if name.isdigit() else getattr(child, name)
        kind = type(child)
        child.__class__ = type(f"Broken{kind.__name__}", (kind,), {"__call__": lambda self, *args: call(self, kind.__call__, *args)})
        return model

    return mock.patch.object(ours, "abstract_model", planted)


@contextmanager
def mask(change):
    """In all decoder layers, which are compiled again for it."""
    ours.run_layer.clear_cache()
    with mock.patch.object(attention, "prefix_lm_mask", change):
        yield
    ours.run_layer.clear_cache()


def erf_gelu(self, _, x):
    gate = self.gate(x)
    return self.down(gate * 0.5 * (1 + jax.scipy.special.erf(gate * 0.5**0.5)) * self.up(x))


def quick_gelu(self, _, x):
    y = self.up(x)
    return self.down(y * jax.nn.sigmoid(1.702 * y))


def norm_after_the_sum(self, _, x, queries, window, cache):
    with stages.scope("attention"):
        y, kv = self.attention(self.pre_attention_norm(x), queries, window, cache)
        x = self.post_attention_norm(x + stage("output", y, branch=True))
    with stages.scope("mlp"):
        return x + stage("output", self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))), branch=True), kv


def post_norm_on_the_stream(self, _, x, queries, window, cache):
    """The parts are right, the sum is not."""
    with stages.scope("attention"):
        y, kv = self.attention(self.pre_attention_norm(x), queries, window, cache)
        x = x + stage("output", self.post_attention_norm(y), branch=True)
    with stages.scope("mlp"):
        return 2 * x + stage("output", self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))), branch=True), kv


def w_for_1_w(self, call, x):
    return call(self, x) / (1 + self.scale[...]) * self.scale[...]


def causal(queries, keys, window):
    return masks.prefix_lm_mask(replace(queries, prefix=queries.prefix & False), keys, window)


PATCHES = vision.patches
DEFECTS = {  # -> what is planted, and the first stage of which it is to be found
    "none": (nullcontext, None),
    "image height and width swapped": (
        lambda: mock.patch.object(vision, "patches", lambda images, size: PATCHES(jnp.swapaxes(images, 1, 2), size)), "vision/patches",
    ),
    "quick gelu in one vision layer": (lambda: module("vision/layers/1/mlp", quick_gelu), "vision/layers/1/mlp/output"),
    "last vision norm left out": (lambda: module("vision/norm", lambda self, call, x: x), "vision/output"),
    "features divided by sqrt(D)": (lambda: module("projector", lambda self, call, x: call(self, x) * 56**-0.5), "projector"),
    "embeddings not scaled": (
        lambda: mock.patch.object(decoder.Embedder, "encode", lambda self, tokens, dtype: self.table[...][tokens]), "decoder/embeddings",
    ),
    "window off by one": (lambda: mask(lambda q, k, w: masks.prefix_lm_mask(q, k, w + 1)), "decoder/layers/0/attention/weights"),
    "prefix is causal": (lambda: mask(causal), "decoder/layers/0/attention/weights"),
    "attention softcap left out": (lambda: decoder_config(attn_logit_softcapping=None), "decoder/layers/0/attention/weights"),
    "scaled by the head size": (lambda: decoder_config(query_pre_attn_scalar=20), "decoder/layers/0/attention/weights"),
    "rope base": (lambda: decoder_config(rope_theta=1e6), "decoder/layers/0/attention/weights"),
    "eps": (lambda: decoder_config(rms_norm_eps=1e-5), "decoder/layers/0/attention/weights"),
    "erf gelu in one layer": (lambda: module("decoder/layers/3/mlp", erf_gelu), "decoder/layers/3/mlp/output"),
    "w for 1 + w in one norm": (lambda: module("decoder/layers/2/pre_mlp_norm", w_for_1_w), "decoder/layers/2/mlp/output"),
    "norm after the sum in one layer": (lambda: module("decoder/layers/1", norm_after_the_sum), "decoder/layers/1/attention/output"),
    "residual stream doubled in one layer": (lambda: module("decoder/layers/4", post_norm_on_the_stream), "decoder/layers/4"),
    "w for 1 + w in the last norm": (lambda: module("decoder/norm", w_for_1_w), "decoder/norm"),
    "final softcap left out": (lambda: decoder_config(final_logit_softcapping=None), "logits"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_located(compared, name):
    """On transformers' own input of every stage, the first that is off was broken; if it is broken in one place, no other layer is."""
    case, reference = compared
    plant, where = DEFECTS[name]
    with plant(), jax.default_matmul_precision("highest"):
        found = ours.stages(*ours.build(case.checkpoint, "float32"), case.inputs, True, reference.fed)
    off = [row.stage for row in stage_rows(case, (found, found), reference) if row.diverges and row.stage != "loss"]
    assert off[:1] == ([where] if where else []), off
    if where and ("in one" in name or "layers" not in where):
        place = re.match(r"\w+/layers/\d+|.*", where)[0]
        assert all(stage.startswith(place) for stage in off), off


def test_streamed(compared):
    """A module at a time, transformers computes the same to the bit, and holds nothing afterwards; it generates too."""
    case, reference = compared
    profile = case.checkpoint.config.profile
    model = reference.adapted(reference.build(case.checkpoint, case.directory, "float32", keep=False), profile)
    for name, value in reference.stages(model, case.inputs, profile, True).items():
        np.testing.assert_array_equal(value, reference.run[name], name)
    asked = random_inputs(model, ((1, 5, 0),), 0)
    tokens, _ = reference.greedy(model, asked, profile, 3)
    assert tokens.shape == (1, 3) and not any(parameter.numel() for parameter in model.parameters())


def test_a_small_loss(compared, monkeypatch):
    """Of a model that is sure of its answers float32 keeps few digits of the loss; a loss of the first target only is told from that."""
    case, reference = compared
    inputs, logits = case.inputs, reference.run["logits"].copy()
    rows, places = np.nonzero(inputs.targets)
    logits[rows, places - 1, inputs.tokens[rows, places]] += 18
    sure = replace(reference, run=reference.run | {"logits": logits}, exact=reference.exact | {"logits": logits})
    row = run._loss(case, logits, sure, False)
    assert 1e-6 < row.limits[1] < 0.1 and not row.diverges
    monkeypatch.setattr(run, "token_loss", lambda logits, tokens, targets: token_loss(logits, tokens, targets & (jnp.cumsum(targets, axis=1) == 1)))
    assert run._loss(case, logits, sure, False).diverges


@pytest.mark.parametrize("given,told", [
    (("--image", GOLDEN.parent / "image.png"), "no prompt"),
    (("--model", "3b-224", "--prompt", "caption en"), "random weights"),
    (("--depth", "2"), "random weights of a preset"),
    (("--gradients", "--dtype", "bfloat16"), "float32"),
    (("--model", "28b-896", "--new", 1000), "--new 0"),
    (("--numerics", "jax"), "unknown numerics"),
])  # fmt: skip
def test_what_cannot_be_compared(command, given, told):
    code, out, err = command("parity", *given)
    assert code == 2 and not out and told in err and err.count("\n") == 1


def test_report(command, tmp_path, monkeypatch):
    """All of it on a whole checkpoint, from the command on: a table, numbers, a page; exit code 1 and the stage's name where it is broken."""
    page = tmp_path / "parity.html"
    image = str(GOLDEN.parent / "image.png")
    given = ("--model", GOLDEN, "--image", image, "--prompt", "caption en", "detect cat", "--suffix", "a cat", "<loc0003><loc0100> cat", "--new", 4)
    code, out, err = command("parity", *given, "--gradients", "--json", "--html", page)
    assert (code, err) == (0, "")
    report = json.loads(out)
    stages = {row["stage"]: row for row in report["stages"]}
    assert report["first_divergence"] is None and report["tokens"]["ours"] == report["tokens"]["theirs"]
    assert {"pixels", "ids", "vision/patches", "projector", "decoder/layers/3/mlp/output", "logits", "loss", "logits, one program"} <= set(stages)
    assert stages["pixels"]["accumulated"]["max"] == stages["ids"]["accumulated"]["max"] == 0
    assert sum(name.startswith("gradient, decoder/layers") for name in stages) == 4
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 4 and "within tolerance" in html and "http" not in html
    with decoder_config(rope_theta=1e6):
        code, out, err = command("parity", *given[:-1], 0)
    assert code == 1 and "decoder/layers/0/attention/weights" in err and err.count("\n") == 1
    assert "<- diverges" in out and max(map(len, out.split("\n\n")[1].splitlines())) <= 120
