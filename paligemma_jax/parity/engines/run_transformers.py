"""Run any release of transformers on a job. Needs numpy, torch and transformers only, so that it
runs in an environment without this project.

    python run_transformers.py JOB

A job is a directory with inputs.npz (see `job.py`) and job.json: checkpoint, dtype, call, new.
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

import inspect
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
    (r"(?:.*\.)?language_model\.(?:model\.)?norm", "norm"),
)


def load(checkpoint: str, dtype: str) -> PaliGemmaForConditionalGeneration:
    """Read a checkpoint. transformers fills missing parameters at random; here that is an error."""
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model, found = PaliGemmaForConditionalGeneration.from_pretrained(
        checkpoint,
        attn_implementation="eager",
        output_loading_info=True,
        **{name: getattr(torch, dtype)},
    )
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
                hooks.append(module.register_forward_hook(keep(stages, stage.format(*match.groups()))))
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
    steps = [as_numpy(step) for step in output.logits]
    length = inputs["tokens"].shape[1]
    return {
        "tokens": output.sequences[:, length:].numpy().astype(np.int32),
        "prefill": steps[0],
        "decode": np.stack(steps[1:], 1) if steps[1:] else np.zeros((len(steps[0]), 0, steps[0].shape[-1])),
    }


def arguments(inputs) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.from_numpy(inputs["tokens"]).long(),
        "attention_mask": torch.from_numpy(inputs["valid"]).long(),
        "token_type_ids": torch.from_numpy(inputs["targets"]).long(),
        "pixel_values": torch.from_numpy(np.moveaxis(inputs["images"], 3, 1).copy()),
    }


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
        length = inputs["prompt_length"].item()
        prompts = {k: v[:, :length] if v.ndim == 2 else v for k, v in inputs.items()}
        outputs |= generate(model, prompts, job["new"])
    np.savez(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
