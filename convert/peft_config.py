"""adapter_config.json of peft: the settings that decide what an adapter computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from convert.peft_names import CONFIG
from convert.typed_json import JsonObject, Positive, check, describe, load_json

Alpha = Annotated[float, Meta(ge=-1e30, le=1e30)]  # far from the largest float32

# Settings of the training, of the choice of layers, and for layers that PaliGemma does not have.
IGNORED = {
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "runtime_config", "target_modules", "task_type", "velora_config"),
}
# Initial values (`init_lora_weights`) that leave the base unchanged. With others, such as pissa,
# peft changes the base whenever it loads the adapter.
INITIALIZATIONS = None, True, False, "gaussian", "eva", "orthogonal", "mica"
PROMPT_TUNING, PREFIX_TUNING = "PROMPT_TUNING", "PREFIX_TUNING"
MERGE = "merge the adapter with peft (merge_and_unload), and load the result"
# Settings that peft's merge_and_unload refuses or ignores.
NOT_MERGEABLE = {"alora_invocation_tokens", "arrow_config", "lora_bias", "monteclora_config"}


class PromptConfig(msgspec.Struct, kw_only=True):
    """The settings of peft's `PromptTuningConfig` and `PrefixTuningConfig` that decide what an
    adapter computes. With `prefix_projection`, peft saves what the projection returns."""

    peft_type: str
    num_virtual_tokens: Positive
    num_transformer_submodules: int | None = None


class AdapterConfig(msgspec.Struct, kw_only=True):
    """The supported settings of peft's `LoraConfig`."""

    peft_type: str
    r: Positive
    lora_alpha: Alpha
    base_model_name_or_path: str | None = None
    revision: str | None = None
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    modules_to_save: list[str] | None = None


def load_adapter_config(directory: Path) -> AdapterConfig | PromptConfig:
    """Read adapter_config.json.

    Raises:
        ValueError: It is not valid, or has a setting that is not supported and that changes what
            the adapter computes.
    """
    file = directory / CONFIG
    settings = load_json(file)
    kind = settings.get("peft_type")
    if kind in (PROMPT_TUNING, PREFIX_TUNING):
        return check(settings, PromptConfig, str(file))
    if kind != "LORA":
        raise ValueError(
            f"{file}: peft_type must be LORA, {PROMPT_TUNING} or {PREFIX_TUNING}, got "
            f"{describe(kind)}; if peft can merge this kind of adapter (merge_and_unload), load "
            "the merged model"
        )
    config = check(settings, AdapterConfig, str(file))
    for name, value in _unsupported(settings, config).items():
        hint = "only peft can run this adapter" if name in NOT_MERGEABLE else MERGE
        raise ValueError(f"{file}: {name} {describe(value)} is not supported; {hint}")
    return config


def _unsupported(settings: JsonObject, config: AdapterConfig) -> JsonObject:
    """The settings that would change the result in a way that is not implemented."""
    known = IGNORED | set(AdapterConfig.__struct_fields__)
    found = {name: value for name, value in settings.items() if value and name not in known}
    if config.bias not in (None, "none"):
        found["bias"] = config.bias
    if config.init_lora_weights not in INITIALIZATIONS:
        found["init_lora_weights"] = config.init_lora_weights
    return found


def scales(config: AdapterConfig, ranks: Mapping[str, int], file: Path) -> dict[str, float]:
    """The factor of every update, alpha / rank or alpha / sqrt(rank), by module.

    Args:
        config: The settings.
        ranks: The rank of every module in the weights, under the name that the weights have.
        file: The file of the settings, for errors.

    Raises:
        ValueError: A rank differs from the settings, or a pattern is not usable.
    """
    declared = _lookup(ranks, config.rank_pattern or {}, config.r, f"{file}: rank_pattern")
    alphas = _lookup(ranks, config.alpha_pattern or {}, config.lora_alpha, f"{file}: alpha_pattern")
    for module, rank in ranks.items():
        if rank != declared[module]:
            raise ValueError(
                f"{file}: {module} must have rank {declared[module]}, but its weights have {rank}"
            )
    power = 0.5 if config.use_rslora else 1.0
    return {module: alphas[module] / rank**power for module, rank in ranks.items()}


def _lookup(
    modules: Iterable[str], patterns: Mapping[str, float], default: float, source: str
) -> dict[str, float]:
    """The value of the first pattern that matches each module, or `default`."""
    modules = list(modules)
    values = dict.fromkeys(modules, default)
    for pattern, matches in reversed(_match_all(list(patterns), modules, source).items()):
        values |= {
            name: patterns[pattern] for name, fits in zip(modules, matches, strict=True) if fits
        }
    return values


# peft's own rule (`get_pattern_key`). It runs in a process of its own, because a pattern with
# nested quantifiers can take forever, and Python's `re` cannot be stopped.
MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))  # seconds; 300 usual patterns take 0.3
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        line = [re.match(rf"(.*\\.)?({pattern})$", name) is not None for name in names]
    except (re.error, OverflowError, RecursionError) as error:
        line = str(error)
    print(json.dumps(line), flush=True)
"""


def _match_all(patterns: list[str], names: list[str], source: str) -> dict[str, list[bool]]:
    """Whether each pattern matches each name, by pattern."""
    if not patterns:
        return {}
    command = [sys.executable, "-I", "-S", "-c", MATCHER]
    question = json.dumps([patterns, names]).encode()
    try:
        result = subprocess.run(command, input=question, capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        slow = patterns[error.stdout.count(b"\n")]
        reason = f"{describe(slow)} takes too long to match"
        raise ValueError(f"{source}: {reason}; write it without nested quantifiers") from None
    matches = dict(zip(patterns, map(json.loads, result.stdout.splitlines()), strict=True))
    for pattern, line in matches.items():
        if isinstance(line, str):
            message = f"must be a regular expression, got {describe(pattern)}: {line}"
            raise ValueError(f"{source}: {message}")
    return matches
