"""Adapters that peft saves: the same numbers, or a refusal that names the setting."""

from __future__ import annotations

import copy
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.hf_models import hf_inputs, random_inputs

from convert import peft as adapters
from paligemma_jax.checkpoints.load import load_model

peft = pytest.importorskip("peft", reason="the reference is peft: install the extra test")

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def save(reference, base, directory, **options):
    """An adapter of random numbers that peft saved, of the checkpoint `base`."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options
    model = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(directory))
    return edit(directory, base_model_name_or_path=str(base))


def edit(directory, **changes):
    file = directory / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def load_peft(reference, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(reference), str(directory)).eval()


def check_logits(reference, plain, directory):
    """Our logits with an adapter are those of peft, and not those of the base."""
    inputs = random_inputs(reference, seed=3)
    arguments = map(jnp.asarray, (inputs.tokens, inputs.images, inputs.valid, inputs.prefix))
    arguments = list(arguments)
    with torch.no_grad():
        model = load_peft(reference, directory)
        expected = model(**hf_inputs(inputs)).logits.numpy()[inputs.valid]
    logits = np.asarray(load_model(directory)(*arguments))[inputs.valid]
    assert np.abs(expected - np.asarray(plain(*arguments))[inputs.valid]).max() > 0.1
    atol = 2e-4 * max(1, np.abs(expected).max() / 10)
    np.testing.assert_allclose(logits, expected, atol=atol)


# Of ranks and alphas. The rules that a suffix or a literal name would follow give other scales.
PATTERNS = [
    ({}, {"q_proj": 1}),
    ({"q_proj": 2}, {"k_proj": 3}),
    ({}, {".*layers\\.0.*": 3}),
    ({"language_model.*layers\\.1\\.self_attn\\.q_proj": 2}, {".*layers\\.0.*": 3}),
    ({}, {"layers\\.[02]\\.self_attn\\.(q|k)_proj": 5}),
    ({}, {"^model\\.language_model\\.layers\\.2\\.self_attn\\.k_proj$": 5}),
    ({}, {"self_attn": 5}),  # no module ends in this
    ({}, {"proj": 5}),  # nor in this, after a dot
    ({}, {"._proj": 5, "q_proj": 7}),  # the first that matches
    ({"vision_tower.*": 3}, {"(?!.*vision).*k_proj": 9}),
    ({}, {"model.layers.1.self_attn.q_proj": 5}),  # the released name is not the module's
    ({}, {"q_proj|layers\\.3\\..*": 5}),
]


def test_patterns_of_rank_and_alpha_follow_the_rule_of_peft(random_checkpoint, tmp_path):
    reference, base, plain = random_checkpoint("pg2", 0)
    for i, (ranks, alphas) in enumerate(PATTERNS):
        options = dict(target_modules=["q_proj", "k_proj"], use_rslora=i % 2 == 0)
        options |= dict(rank_pattern=ranks, alpha_pattern=alphas)
        directory = save(reference, base, tmp_path / str(i), **options)
        modules = load_peft(reference, directory).base_model.model.named_modules()
        expected = {name: m.scaling["default"] for name, m in modules if hasattr(m, "lora_A")}
        factors = adapters.load_adapter(directory, plain.config).values()
        scales = {f.a.tobytes(): f.scale for f in factors}
        for key, value in load_file(directory / adapters.WEIGHTS).items():
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if name in expected:
                scale = scales.pop(value.tobytes())
                assert scale == pytest.approx(expected.pop(name)), (ranks, alphas, name)
        assert not scales and not expected
    check_logits(reference, plain, tmp_path / "3")


def test_patterns_match_the_names_in_the_file(random_checkpoint, tmp_path):
    """Under transformers 4.57, the image encoder has one module more in its names."""
    reference, base, plain = random_checkpoint("pg2", 0)
    directory = save(reference, base, tmp_path / "a", target_modules=["q_proj"])
    file = directory / adapters.WEIGHTS
    tensors = load_file(file)
    renamed = {
        k.replace("vision_tower.", "vision_tower.vision_model."): tensors[k] for k in tensors
    }
    save_file(renamed, file)
    for pattern, alpha in (("vision_model.*q_proj", 8), ("vision_tower.encoder.*", 6)):
        edit(directory, alpha_pattern={pattern: 8})
        factors = adapters.load_adapter(directory, plain.config)
        scales = {path.split("/")[0]: f.scale for path, f in factors.items()}
        assert scales == {"vision": alpha / 4, "decoder": 6 / 4}


@pytest.mark.parametrize(
    "pattern,message",
    [
        ("(.*.*)*z", "takes too long to match; write it without nested quantifiers"),
        ("(", r"alpha_pattern: must be a regular expression, got '\('"),
        ("a{99999999999}", "must be a regular expression"),
        ("(" * 5000 + ")" * 5000, "must be a regular expression"),
    ],
)
def test_unusable_patterns_are_refused(random_checkpoint, tmp_path, pattern, message):
    reference, base, plain = random_checkpoint("pg2", 0)
    directory = save(reference, base, tmp_path / "a", target_modules=["q_proj"])
    edit(directory, alpha_pattern={pattern: 8})
    with pytest.raises(ValueError, match=message):
        adapters.load_adapter(directory, plain.config)
