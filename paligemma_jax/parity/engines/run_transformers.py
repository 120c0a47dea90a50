"""Run any release of transformers on a job. Needs numpy, torch and transformers only, so that it
runs in an environment without this project.

    python run_transformers.py JOB

A job is a directory with job.json (checkpoint, dtype, calls, new) and inputs.npz: tokens, valid and
targets [B, T], images [M, S, S, 3], and for `new` also prompt_tokens, prompt_valid, prompt_targets.
Calls of the model:

    labels   forward(..., token_type_ids, labels)
    forward  forward(..., token_type_ids)
    plain    forward(...) without token types
    train    as labels, of a model in training mode

The result is outputs.npz: logits float32[B, T, V] of the call, and with `new` tokens, those of
greedy decoding from the prompts: tokens int32[B, new], prefill float32[B, V] and decode
float32[B, new - 1, V]. Stages are captured by hooks.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PaliGemmaForConditionalGeneration

# In the names of every release: the modules whose outputs are stages, and the names here.
STAGES = (
    (r"(?:.*\.)?vision_tower\.(?:.*\.)?layers\.(\d+)", "vision/layers/{}"),
    (r"(?:.*\.)?multi_modal_projector", "projector"),
    (r"(?:.*\.)?language_model\.(?:model\.)?layers\.(\d+)", "decoder/layers/{}"),
    (r"(?:.*\.)?language_model\.(?:model\.)?norm", "decoder/norm"),
)


def load(checkpoint: str, dtype: str) -> PaliGemmaForConditionalGeneration:
    """Read a checkpoint. transformers fills missing parameters at random; here that is an error."""
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    loaded = PaliGemmaForConditionalGeneration.from_pretrained(
        checkpoint,
        attn_implementation="eager",
        output_loading_info=True,
        **{name: getattr(torch, dtype)},
    )
    model, found = loaded  # type: ignore[misc]
    missing = [key for key in found["missing_keys"] if not key.endswith("lm_head.weight")]
    if missing:
        raise SystemExit(f"the checkpoint has no {', '.join(sorted(missing))}")
    return model.eval()


def forward(model, inputs, call: str) -> dict[str, np.ndarray]:
    """The stages of one call, in order."""
    stages: dict[str, np.ndarray] = {}
    hooks = []
    for name, module in model.named_modules():
        for pattern, stage in STAGES:
            match = re.fullmatch(pattern, name)
            if match:
                hooks.append(
                    module.register_forward_hook(keep(stages, stage.format(*match.groups())))
                )
    batch = arguments(inputs)
    if call == "plain":
        del batch["token_type_ids"]
    if call in ("labels", "train"):
        is_target = batch["token_type_ids"].bool()
        batch["labels"] = torch.where(is_target, batch["input_ids"], -100)
    if call == "train":
        model.train()
    with torch.no_grad():
        logits = model(**batch).logits
    model.eval()
    for hook in hooks:
        hook.remove()
    return {**stages, "logits": as_numpy(logits)}


def keep(stages, name):
    def hook(_module, _inputs, output):
        stages[name] = as_numpy(output[0] if isinstance(output, tuple) else output)

    return hook


def generate(model, inputs, new: int) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = model.generate(
            **arguments(inputs),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    steps = np.stack([as_numpy(step) for step in output.logits], axis=1)
    length = inputs["tokens"].shape[1]
    tokens = output.sequences[:, length:].numpy().astype(np.int32)
    return {"tokens": tokens, "prefill": steps[:, 0], "decode": steps[:, 1:]}


def arguments(inputs) -> dict[str, torch.Tensor]:
    batch = {
        "input_ids": torch.from_numpy(inputs["tokens"]).long(),
        "attention_mask": torch.from_numpy(inputs["valid"]).long(),
        "token_type_ids": torch.from_numpy(inputs["targets"]).long(),
    }
    if "images" in inputs:
        batch["pixel_values"] = torch.from_numpy(np.moveaxis(inputs["images"], 3, 1).copy())
    return batch


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    model = load(job["checkpoint"], job["dtype"])
    outputs = {}
    for call in job["calls"]:
        outputs |= {f"{call}/{name}": value for name, value in forward(model, inputs, call).items()}
    if job["new"]:
        names = ("tokens", "valid", "targets")
        prompts = inputs | {name: inputs[f"prompt_{name}"] for name in names}
        outputs |= generate(model, prompts, job["new"])
    np.savez(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
