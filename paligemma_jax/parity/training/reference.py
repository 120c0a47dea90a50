"""The training run of transformers, torch.optim.AdamW and peft.

The schedule, the loss, clipping and the groups of parameters are written here once more, so that
nothing is shared with this project's own training but the initial weights and the rows.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from convert import peft
from convert.huggingface import canonical_name
from convert.layout import reorder
from convert.match import Weight, huggingface_weights
from convert.peft_names import A, B, part_layouts, split_key
from convert.tensor import from_array
from paligemma_jax import lora
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.parity import torch_loading, torch_model
from paligemma_jax.parity.training.case import TrainingCase
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig

if TYPE_CHECKING:
    import torch

Values = dict[str, np.ndarray]  # by path, in the layouts of this project
PARTS = {A: "lora_a", B: "lora_b"}  # and the magnitude of DoRA
ADAPTER_NAMES = r"\.modules_to_save\.default"


@dataclass(frozen=True)
class Snapshot:
    """Trained parameters and the two moments of AdamW."""

    parameters: Values
    first_moments: Values
    second_moments: Values


@dataclass(frozen=True)
class ReferenceStep:
    """One step: what it started from, what it computed, and what it resulted in."""

    before: Snapshot
    loss: float
    gradient: Values  # before clipping
    norm: float  # of the gradient
    rate: float
    after: Snapshot
    exact: Values | None = None  # in bfloat16, the gradient in float32 of the same parameters


class TorchRun:
    """A run that is stepped from outside.

    Args:
        case: Weights and settings.
        model: This project's model before the first step, with its adapter, if any.
        trainable: Paths of the parameters to train.
        dtype: Dtype of the computation; parameters are in float32, or in float64 for float64.

    Raises:
        ValueError: transformers or peft cannot load the model, or has no such parameter.
    """

    def __init__(self, case: TrainingCase, model: PaliGemma, trainable: list[str], dtype: str):
        import torch

        torch_loading.prepare_torch(1 if case.weights.checkpoint.nbytes < 2**27 else None)
        self.case, self.config, self.dtype = case, case.config, dtype
        self.profile = case.weights.checkpoint.config.profile
        self.model: torch.nn.Module = torch_model.build_model(
            case.weights, "float32", "float32", keep=True
        )
        first = self._inputs(case.batch(0).inputs, torch.float32)
        with torch.no_grad():  # reads weights that are read on use
            self.model(**first)  # type: ignore[arg-type]
        if case.config.lora:
            self.model = _with_adapter(self.model, case, model)
        self.float = torch.float64 if dtype == "float64" else torch.float32
        self.model.to(self.float)  # type: ignore[arg-type]
        if dtype == "float64":
            _exact_buffers(self.model)
        self.names = self._trained(trainable)
        self.optimizer = torch.optim.AdamW(
            self._groups(), betas=(self.config.beta1, self.config.beta2)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, _schedule(self.config, case.steps)
        )

    def step(self, batch: Batch) -> ReferenceStep:
        """Train on a batch."""
        before, exact = self.snapshot(), None
        if self.dtype == "bfloat16":
            self._backward(batch, dtype="float32")
            exact = self._by_path(lambda p: p.grad)
        loss = self._backward(batch, self.dtype)
        gradient = self._by_path(lambda p: p.grad)
        rate = self.config.learning_rate * self.schedule.lr_lambdas[0](self.schedule.last_epoch)
        norm = self._update()
        return ReferenceStep(before, loss, gradient, norm, rate, self.snapshot(), exact)

    def loss(self, batch: Batch) -> float:
        """Train on a batch; return its loss only."""
        loss = self._backward(batch, self.dtype)
        self._update()
        return loss

    def _backward(self, batch: Batch, dtype: str) -> float:
        """Compute the gradient; return the loss."""
        import torch

        self.optimizer.zero_grad()
        number = getattr(torch, dtype)
        # In bfloat16, the model computes with rounded copies of float32 parameters.
        copies = {name: p.to(number) for name, p in self.model.named_parameters()}
        inputs = self._inputs(batch.inputs, number)
        with _in_float64() if dtype == "float64" else nullcontext():
            output = torch.func.functional_call(self.model, copies, kwargs=inputs)
        loss = _loss(output.logits.to(self.float), batch, self.config)
        loss.backward()
        return loss.item()

    def _update(self) -> float:
        """Clip the gradient and take a step; return the gradient's norm."""
        import torch

        parameters = [parameter for _, parameter, _ in self.names]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)
        self.optimizer.step()
        self.schedule.step()
        return norm.item()

    def snapshot(self) -> Snapshot:
        """Copies of the present state."""
        state = self.optimizer.state
        return Snapshot(
            self._by_path(lambda p: p.detach()),
            self._by_path(lambda p: state[p].get("exp_avg")),
            self._by_path(lambda p: state[p].get("exp_avg_sq")),
        )

    def _by_path(self, value: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Values:
        values = {}
        for path, parameter, to_layout in self.names:
            tensor = value(parameter)
            array = np.zeros(parameter.shape) if tensor is None else tensor.numpy().copy()
            values[path] = to_layout(array.astype(parameter.detach().numpy().dtype, copy=False))
        return values

    def _inputs(self, inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        images = inputs.images
        if images is not None:
            images = np.asarray(images).reshape(-1, *images.shape[-3:])
        arrays = vars(inputs) | {"images": images}
        batch = torch_model.model_inputs(Inputs(**arrays), self.profile)
        floats = {name: x.to(dtype) for name, x in batch.items() if x.is_floating_point()}
        return batch | floats

    def _trained(self, trainable: list[str]) -> list[tuple[str, torch.nn.Parameter, Callable]]:
        """(path, parameter, function to this project's layout) of what is trained; the other
        parameters are frozen."""
        weights = huggingface_weights(self.case.weights.checkpoint.config)
        by_key = {weight.key: weight for weight in weights}
        found, missing = [], set(trainable)
        for name, parameter in self.model.named_parameters():
            layer, part = split_key(re.sub(ADAPTER_NAMES, "", name))
            weight = by_key.get(canonical_name(f"{layer}.weight" if part else layer))
            path = weight and _path(weight, part)
            parameter.requires_grad_(path in missing)
            if weight is not None and path in missing:
                missing.remove(path)
                found.append((path, parameter, _to_layout(weight, part)))
        if missing:
            raise ValueError(f"transformers does not train {', '.join(sorted(missing)[:5])}")
        return found

    def _groups(self) -> list[dict]:
        """Groups of AdamW: matrices are decayed, and some parameters have rates of their own."""
        config, groups = self.config, []
        for path, parameter, _ in self.names:
            vector = path.endswith(("scale", "bias", "magnitude"))
            rate = config.vision_rate if path.startswith("vision") else 1.0
            rate *= config.loraplus_lr_ratio if vector or path.endswith("lora_b") else 1.0
            decay = 0.0 if vector else config.weight_decay
            lr = config.learning_rate * rate
            groups.append({"params": [parameter], "weight_decay": decay, "lr": lr})
        return groups


def _with_adapter(model: torch.nn.Module, case: TrainingCase, ours: PaliGemma) -> torch.nn.Module:
    """The model with the initial adapter of this project, as peft loads it."""
    from peft import PeftModel

    from paligemma_jax.model.patterns import matches
    from paligemma_jax.model.tree import parameters

    pattern = case.config.saved_pattern
    ours = jax.tree.map(lambda x: x.astype(jnp.float32), ours)  # files have no float64
    saved = {p: np.asarray(x) for p, x in parameters(ours).items() if matches(pattern, p)}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        peft.save_adapter(directory, lora.lora_factors(ours), ours.config, "base", saved)
        with torch_loading.reported_by_transformers("load the initial adapter"):
            return PeftModel.from_pretrained(model, str(directory), is_trainable=True).eval()  # type: ignore[arg-type]


@contextmanager
def _in_float64() -> Iterator[None]:
    """Compute in float64 where transformers asks for float32: norms, RoPE, softmax."""
    import torch

    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _exact_buffers(model: torch.nn.Module) -> None:
    """Recompute the frequencies of RoPE and the scale of embeddings, which transformers keeps in
    float32."""
    import torch

    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if frequencies is not None:
            base = module.config.rope_parameters["rope_theta"]  # type: ignore[union-attr, index]
            exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
            module.inv_freq = base**-exponents
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)


def _path(weight: Weight, part: str | None) -> str:
    if part is None:
        return weight.path
    return f"{weight.path.removesuffix('/kernel')}/{PARTS.get(part, 'lora_magnitude')}"


def _to_layout(weight: Weight, part: str | None) -> Callable[[np.ndarray], np.ndarray]:
    if part is None:
        return lambda array: weight.from_file(from_array(array)).load()

    def reordered(array: np.ndarray) -> np.ndarray:
        layout, ours = part_layouts(weight)[part]
        sizes = dict(zip(layout.split(), array.shape, strict=False)) | weight.sizes
        return reorder(array, layout, ours, sizes)

    return reordered


def _schedule(config: FinetuneConfig, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step, counted from 0."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    warmup = min(round(warmup), steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        shapes: Mapping[str, float] = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "constant": 1.0,
        }
        return shapes[config.schedule]

    return factor


def _loss(logits: torch.Tensor, batch: Batch, config: FinetuneConfig) -> torch.Tensor:
    """The mean over all targets, as transformers computes it, or over the rows' means."""
    import torch

    inputs = batch.inputs
    labels = torch.from_numpy(np.where(inputs.targets, inputs.tokens, -100)).long()[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels.flatten(),
        reduction="none",
        label_smoothing=config.label_smoothing,
    ).view(labels.shape)
    totals, counts = losses.sum(1), (labels != -100).sum(1)
    weights = torch.from_numpy(np.asarray(batch.weights)).to(losses.dtype)
    if config.reduction == "examples":
        return (weights * totals / counts.clamp(min=1)).sum() / weights.sum()
    return (weights * totals).sum() / (weights * counts).sum()
