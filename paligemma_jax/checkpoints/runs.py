"""The directory of a fine-tuning run as a source of models.

RUN/config.json          settings
RUN/model/, adapter/     the result after the last step
RUN/best/                model/ or adapter/ of the best step on validation, if it is another
RUN/checkpoints/200/     a training state: the trained parameters and those of the optimizer
RUN/damaged/             checkpoints that could not be read
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import msgspec
import numpy as np

from convert.adapter import Adapter, Factors
from convert.checkpoint import Checkpoint
from convert.orbax import open_tree
from convert.quantized import quantize_checkpoint
from convert.tensor import Tensor
from convert.typed_json import load_json
from paligemma_jax.model.precision import Quantization

CONFIG, LOG = "config.json", "log.jsonl"
CHECKPOINTS, BEST, DAMAGED = "checkpoints", "best", "damaged"
SOFT_PROMPT = "soft_prompt"  # its path in a model
PREFIX = r"decoder/layers/(?:\d+/)?attention/prefix"  # the paths of its layers
ADDED = rf".*/lora_\w+|{SOFT_PROMPT}|{PREFIX}"  # what only an adapter has
STATE = "default"  # Orbax's name for the only item of a checkpoint


class RunSettings(msgspec.Struct):
    """The settings of a run that determine its model."""

    model: str
    base: str | None = None
    numerics: str | None = None
    quantize: str | None = None
    lora_alpha: float = 16.0
    rslora: bool = False


def is_run(directory: Path) -> bool:
    has_output = (directory / CHECKPOINTS).is_dir() or (directory / LOG).is_file()
    is_model = any(directory.glob("*.safetensors"))
    return has_output and (directory / CONFIG).is_file() and not is_model


def is_state(directory: Path) -> bool:
    """Whether it is RUN/checkpoints/STEP."""
    folder = directory.parent
    return directory.name.isdigit() and folder.name == CHECKPOINTS and is_run(folder.parent)


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, in order."""
    names = [path.name for path in (run / CHECKPOINTS).glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def find_result(run: Path) -> tuple[Path, str]:
    """The directory of the model that stands for a run, and what it is: the best on validation, the
    result of the last step, or the newest checkpoint.

    Raises:
        ValueError: The run has none of them yet.
    """
    for folder, name in ((run / BEST, "the best on validation"), (run, "the result of the run")):
        for result in (folder / "model", folder / "adapter"):
            if result.is_dir():
                return result, name
    steps = checkpoint_steps(run)
    if not steps:
        raise ValueError(f"{run} is a run without a checkpoint yet; continue it with --resume")
    return run / CHECKPOINTS / str(steps[-1]), "the newest checkpoint"


@dataclass(frozen=True)
class RunState:
    """RUN/checkpoints/STEP: the trained parameters, or their moving average, after some step."""

    directory: Path

    @cached_property
    def settings(self) -> RunSettings:
        return load_json(self.directory.parents[1] / CONFIG, RunSettings)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters by path, those of a stack by layer. Under LoRA, the path of an
        adapted kernel has "/base", unlike in a base checkpoint."""
        groups: dict[str, dict[str, Tensor]] = {"trainable": {}, "average": {}}
        for (group, *path), entry in open_tree(self.directory / STATE).items():
            if group in groups:
                groups[group] |= _unstacked("/".join(path).replace("/base/", "/"), entry.open())
        if not groups["trainable"]:
            raise ValueError(f"{self.directory} has no trained parameters")
        return groups["average"] or groups["trainable"]

    @cached_property
    def adapter(self) -> Adapter | None:
        """The LoRA adapter, soft prompt or prefix of the state, if they were trained."""
        layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path, tensor in self.tensors.items():
            layer, _, part = path.rpartition("/lora_")
            if layer:
                layers[layer][part] = tensor
        factors = {path: self._factors(parts) for path, parts in layers.items()}
        prompt = self.tensors.get(SOFT_PROMPT)
        soft_prompt = None if prompt is None else prompt.numpy().astype(np.float32)
        adapter = Adapter(factors, soft_prompt=soft_prompt, prefix=self._prefix())
        return adapter if factors or adapter.soft_tokens else None

    def apply(self, base: Checkpoint) -> Checkpoint:
        """The base with its trained parameters replaced. The adapter is separate."""
        base = base.with_numerics(self.settings.numerics)
        if not self.adapter:
            base = quantize_checkpoint(base, Quantization.parse(self.settings.quantize))
        new = {path: x for path, x in self.tensors.items() if not re.fullmatch(ADDED, path)}
        unknown = new.keys() - base.tensors.keys()
        if unknown:
            raise ValueError(
                f"{self.directory} does not fit {self.settings.model}: it has {min(unknown)}, "
                "which the base checkpoint lacks; pass the right one with --base"
            )
        checkpoint = replace(base, tensors=base.tensors | new)
        return replace(
            checkpoint, config=replace(checkpoint.config, dtype=checkpoint.largest_dtype)
        )

    def _prefix(self) -> np.ndarray | None:
        layers = {p.split("/")[2]: x for p, x in self.tensors.items() if re.fullmatch(PREFIX, p)}
        if not layers:
            return None
        arrays = [layers[number].numpy() for number in sorted(layers, key=int)]  # [2, N, K, H]
        return np.moveaxis(np.stack(arrays).astype(np.float32), 2, 0)

    def _factors(self, parts: dict[str, Tensor]) -> Factors:
        a, b = parts["a"].load(), parts["b"].load()
        scale = self.settings.lora_alpha / len(a) ** (0.5 if self.settings.rslora else 1)
        magnitude = parts.get("magnitude")
        return Factors(a, b, scale, magnitude.load() if magnitude else None)


def _unstacked(path: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter as those of single layers, if its first axis is the layers."""
    if not re.match(r"\w+/layers/(?!\d)", path):
        return {path: tensor}
    stack = cache(tensor.load)  # Orbax compresses a stack as one block, which all layers share

    def layer(i: int) -> Tensor:
        return Tensor(tensor.shape[1:], tensor.dtype, lambda index: stack()[(i, *index)])

    return {path.replace("/layers/", f"/layers/{i}/"): layer(i) for i in range(tensor.shape[0])}
