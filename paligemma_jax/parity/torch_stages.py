"""Record the stages of transformers' model with forward hooks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from paligemma_jax.model.config import Numerics
from paligemma_jax.parity.torch_loading import reported_by_transformers
from paligemma_jax.parity.torch_model import model_inputs
from paligemma_jax.processing.processor import Inputs

if TYPE_CHECKING:
    import torch
    from transformers import PaliGemmaForConditionalGeneration as TorchModel


def compute_stages(
    model: TorchModel,
    inputs: Inputs,
    numerics: Numerics,
    attention: bool,
    fed: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Every stage's output as float32, named and fed as in `collect_stages` with branches."""
    import torch

    recorder = StageRecorder(fed or {})
    with recorder.hooks, torch.no_grad():
        recorder.attach(model, attention)
        with reported_by_transformers("run on these inputs"):
            logits = model(**model_inputs(inputs, numerics)).logits
    return recorder.stages | {"logits": logits.float().numpy()}


class StageRecorder:
    """Hooks that record every stage, and replace it by the value fed in its place."""

    def __init__(self, fed: Mapping[str, np.ndarray]):
        self.fed = fed
        self.stages: dict[str, np.ndarray] = {}
        self.hooks = ExitStack()  # removes them

    def attach(self, model: TorchModel, attention: bool) -> None:
        """Hook every module whose output is a stage."""
        vision, text = model.model.vision_tower, model.model.language_model
        vision = getattr(vision, "vision_model", vision)

        def record_patches(_module, _inputs, output: torch.Tensor) -> torch.Tensor:
            # [M, W, rows, columns] there, [M, P, W] here
            patches = self.record("vision/patches", output.flatten(2).transpose(1, 2))
            return patches.transpose(1, 2).reshape(output.shape)

        def record_embeddings(_module, args: tuple) -> tuple:
            return self.record("decoder/embeddings", args[0]), *args[1:]

        patch_embedding = vision.embeddings.patch_embedding
        self.hooks.callback(patch_embedding.register_forward_hook(record_patches).remove)
        first = text.layers[0]
        self.hooks.callback(first.register_forward_pre_hook(record_embeddings).remove)
        self.after(vision.embeddings, "vision/embeddings")
        self.after(vision.post_layernorm, "vision/output")
        self.after(model.model.multi_modal_projector, "projector")
        self.after(text.norm, "decoder/norm")
        for tower, layers in (("vision", vision.encoder.layers), ("decoder", text.layers)):
            for i, layer in enumerate(layers):
                self.attach_layer(f"{tower}/layers/{i}", layer, attention)

    def attach_layer(self, name: str, layer: torch.nn.Module, attention: bool) -> None:
        weights = f"{name}/attention/weights" if attention else None
        part = layer.get_submodule
        if hasattr(layer, "post_feedforward_layernorm"):  # Gemma 2 normalises its branches
            self.after(part("self_attn"), None, weights)
            self.after(part("post_feedforward_layernorm"), f"{name}/mlp/output")
            self.after(part("post_attention_layernorm"), f"{name}/attention/output")
        else:
            self.after(part("self_attn"), f"{name}/attention/output", weights)
            self.after(part("mlp"), f"{name}/mlp/output")
        self.after(layer, name)

    def after(self, module: torch.nn.Module, name: str | None, weights: str | None = None) -> None:
        """Record a module's output as stage `name`, and the second of a tuple as `weights`."""

        def hook(_module, _inputs, output):
            if not isinstance(output, tuple):
                return self.record(name, output)
            if weights:
                self.stages[weights] = output[1].float().numpy()
            return self.record(name, output[0]), *output[1:]

        self.hooks.callback(module.register_forward_hook(hook).remove)

    def record(self, name: str | None, value: torch.Tensor) -> torch.Tensor:
        """Record a stage, if it has a name, and return the value that the model continues with."""
        import torch

        if name is None:
            return value
        self.stages[name] = value.float().numpy()
        if name in self.fed:
            return torch.from_numpy(self.fed[name]).to(value.dtype)
        return value
