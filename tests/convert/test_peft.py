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
from support.hf_models import hf_inputs, random_inputs, save_checkpoint

from convert import convert, inspect, read
from convert import peft as adapters
from convert.match import huggingface_weights
from convert.peft_names import peft_name
from paligemma_jax.checkpoints.load import load_model

peft = pytest.importorskip("peft", reason="the reference is peft: install the extra test")


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


# Of `LoraConfig`, for adapters that load.
LOADED = {
    "dora": dict(
        use_dora=True,
        use_rslora=True,
        target_modules=["q_proj", "out_proj", "down_proj", "fc1", "linear", "patch_embedding"],
        rank_pattern={"down_proj": 2},
    ),
    "modules": dict(
        target_modules=["v_proj"],
        modules_to_save=["projector", "1.input_layernorm", "post_layernorm", "layers.0.mlp"],
        fan_in_fan_out=True,  # of no meaning for these layers
        init_lora_weights="orthogonal",
    ),
    "convolution": dict(target_modules=["patch_embedding"], init_lora_weights="gaussian"),
}


@pytest.mark.parametrize("name", LOADED)
def test_the_logits_are_those_of_peft(random_checkpoint, tmp_path, name):
    reference, base, plain = random_checkpoint("pg2", 0)
    check_logits(reference, plain, save(reference, base, tmp_path / "a", **LOADED[name]))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not supported; merge"),
        (dict(init_lora_weights="olora"), "init_lora_weights 'olora' is not supported; merge"),
        (dict(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' is not supported; merge"),
        (dict(lora_bias=True), "lora_bias true is not supported; only peft can run"),
        (dict(bias="all"), "bias 'all' is not supported; merge the adapter with peft"),
    ],
)
def test_what_is_not_supported_is_named(random_checkpoint, tmp_path, options, message):
    reference, base, plain = random_checkpoint("pg2", 0)
    options = {"init_lora_weights": False, "target_modules": ["q_proj"]} | options
    directory = save(reference, base, tmp_path / "a", **options)
    with pytest.raises(ValueError, match=message):
        adapters.read(directory, plain.config)
    assert any(message in note for note in inspect(directory)["notes"])


@pytest.mark.parametrize("name", ["init_lora_weights", "layer_replication", "new"])
def test_other_settings_are_named(random_checkpoint, tmp_path, name):
    reference, base, plain = random_checkpoint("pg2", 0)
    directory = save(reference, base, tmp_path / "a", target_modules=["q_proj"])
    for value in ("loftq", "corda", "lora_ga", ["x"], {"a": 1}):
        edit(directory, **{name: value})
        is_text = name != "init_lora_weights" or isinstance(value, str)
        message = f"{name} .* is not supported" if is_text else f"{name} must be"
        with pytest.raises(ValueError, match=message):
            adapters.read(directory, plain.config)


JSON_VALUES = [None, True, -1, 1e400, 10**30, "x", [], [1], {}, {"x": 1}, {"q_proj": "8"}]


def test_settings_of_any_type_give_the_numbers_or_one_line(random_checkpoint, tmp_path):
    reference, base, plain = random_checkpoint("pg2", 0)
    directory = save(reference, base, tmp_path / "a", target_modules=["q_proj"])
    file = directory / adapters.CONFIG
    settings = json.loads(file.read_text())
    expected = {path: f.scale for path, f in adapters.load_adapter(directory, plain.config).items()}
    refused = 0
    for name in settings:
        for value in JSON_VALUES:
            file.write_text(json.dumps(settings | {name: value}).replace("Infinity", "1e400"))
            try:
                factors = adapters.read(directory, plain.config).factors
            except ValueError as error:
                named = (name, "number out of range", "a lora_magnitude_vector")
                assert any(words in str(error) for words in named), error
                assert "\n" not in str(error)
                refused += 1
            else:
                scales = {path: f.scale for path, f in factors.items()}
                assert scales == expected or name in ("use_rslora", "lora_alpha"), (name, value)
    assert refused > 150


def test_an_adapter_is_converted_and_described(random_checkpoint, tmp_path):
    """Merged into a bfloat16 base, each number is rounded once, as peft's own merge rounds it."""
    reference, _, _ = random_checkpoint("pg2", 0)
    base = save_checkpoint(reference, tmp_path / "base", dtype=torch.bfloat16)
    directory = save(reference, base, tmp_path / "a", **LOADED["modules"])
    convert(directory, tmp_path / "merged", "huggingface", verify=True)
    half = copy.deepcopy(reference).to(torch.bfloat16)
    merged = load_peft(half, directory).merge_and_unload().state_dict()
    written = read(tmp_path / "merged")
    for weight in huggingface_weights(written.config):
        expected = merged[peft_name(weight.key)].float().numpy()
        array = weight.to_file(written.tensors[weight.path]).numpy().astype(np.float32)
        np.testing.assert_allclose(array, expected, rtol=2**-7, atol=1e-3, err_msg=weight.path)
    description = inspect(directory)
    assert description["format"] == "peft adapter, LoRA"
    assert description["base"] == str(base) and description["rank"] == {"4": 8}
    assert description["layers"] == [
        "model.language_model.layers.*.self_attn.v_proj",
        "model.vision_tower.encoder.layers.*.self_attn.v_proj",
    ]
    assert "model.multi_modal_projector.linear.bias" in description["replaces"]
    assert description["notes"] == []
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a has no adapter_model\.safetensors$"):
        inspect(directory)
