"""Plan a workload: whether it fits a slice of accelerators, and how fast it runs."""

from __future__ import annotations

import importlib.util
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import jax
from jax.sharding import Mesh

from convert.typed_json import decode
from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.planning.chips import Slice, device_count_flag
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.cost import ProgramCost
from paligemma_jax.planning.programs import generation_programs, training_programs
from paligemma_jax.quantization.quantize import weight_formats
from paligemma_jax.sharding.mesh import (
    Devices,
    batch_shards,
    check_batch_size,
    padded_batch_size,
    resolve_mesh,
)


@dataclass(frozen=True)
class PlanResult:
    """Memory and speed of a workload on a slice, without programs too large to compile."""

    config: PlanConfig
    mesh: dict[str, int]
    estimate: bool  # by the CPU compiler, which computes bfloat16 in float32: real needs are lower
    chip_bytes: int  # available to a program
    fits: bool = False
    bytes_per_chip: int = 0  # of the largest program; if it does not fit, as its compiler reports
    compile_seconds: float = 0.0
    # The next three are per chip, of a training step; to generate, of encode, prefill and one
    # decode step, except that `seconds` counts all new tokens.
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0  # estimate; a lower bound if by the CPU compiler
    rows_s: float = 0.0
    programs: dict[str, ProgramCost] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> PlanResult:
        """Read what `json.dumps(asdict(result))` wrote.

        Raises:
            ValueError: It is something else.
        """
        return decode(text.encode(), cls)


def plan(config: PlanConfig) -> PlanResult:
    """Compile the programs of a workload for a slice.

    Raises:
        ValueError: The request is invalid. Not fitting is a result, not an error.
    """
    chips = Slice.parse(config.on)
    form = config.attention or ("plain" if config.estimated else "fused")
    model = abstract_model_by_name(config.model, config.dtype, attention=form)
    if config.training and not config.lora and weight_formats(model):
        raise ValueError(
            f"--model {config.model} is quantized and cannot be trained; give --lora RANK to "
            "train adapters"
        )
    mesh = _plan_mesh(config, chips, model, _find_devices(chips, config.estimated))
    config = replace(config, batch=_batch_size(config, mesh))
    result = PlanResult(
        config, dict(mesh.shape), config.estimated, chip_bytes=int(chips.chip.memory)
    )
    compile_programs = training_programs if config.training else generation_programs
    programs: dict[str, ProgramCost] = {}
    start = time.perf_counter()
    try:
        for name, cost in compile_programs(config, model, mesh):
            programs[name] = cost
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        needed = _reported_bytes(str(error))
        return replace(result, programs=programs, bytes_per_chip=needed, compile_seconds=seconds)
    costs = programs.values()
    needed = max(cost.memory_bytes for cost in costs)
    seconds = sum(cost.seconds for cost in costs)
    if not config.training:
        seconds += (config.new - 2) * programs["decode"].seconds
    return replace(
        result,
        programs=programs,
        fits=needed <= result.chip_bytes,
        bytes_per_chip=needed,
        compile_seconds=sum(cost.compile_seconds for cost in costs),
        flops=sum(cost.flops for cost in costs),
        bytes=sum(cost.bytes for cost in costs),
        seconds=seconds,
        rows_s=config.rows / seconds,
    )


def search(config: PlanConfig, batches: Sequence[int] = ()) -> Iterator[PlanResult]:
    """Plan every mesh of all chips, every remat policy, and every batch size that the mesh divides,
    smallest first until one does not fit."""
    count = Slice.parse(config.on).count
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    meshes = [(d, f, count // (d * f)) for d in sizes for f in sizes if count % (d * f) == 0]
    policies = ("none", "dots", "outputs", "full") if config.training else (config.remat,)
    for (data, fsdp, tensor), remat in product(meshes, policies):
        mesh = f"data={data},fsdp={fsdp},tensor={tensor}"
        for batch in sorted(batches) or [config.batch]:
            if batch and batch % (data * fsdp * config.parts):
                continue
            try:
                result = plan(replace(config, mesh=mesh, remat=remat, batch=batch))
            except ValueError as error:
                warnings.warn(f"{mesh}: {error}", stacklevel=2)
                break
            yield result
            if not result.fits:
                break


def _plan_mesh(config: PlanConfig, chips: Slice, model: PaliGemma, devices: Devices) -> Mesh:
    rows = (config.batch or 0) // config.parts
    mesh = resolve_mesh(config.mesh, model.config, config.training, devices, rows)
    assert mesh
    if mesh.size < chips.count:
        raise ValueError(
            f"--mesh must use all {chips.count} chips of {config.on}, got {config.mesh}, "
            f"which uses {mesh.size}"
        )
    return mesh


def _batch_size(config: PlanConfig, mesh: Mesh) -> int:
    """The batch size that `finetune` accepts, or that `predict` pads to."""
    if not config.training:
        return padded_batch_size(config.rows, mesh)
    multiple = config.parts * batch_shards(mesh)
    batch = config.batch or -(-config.rows // multiple) * multiple
    check_batch_size("--batch", batch, config.parts, mesh)
    return batch


def _reported_bytes(error: str) -> int:
    """The memory that the compiler reports for a program that is too large; 0 if it does not."""
    match = re.search(r"Used ([\d.]+)([KMG]) of|\(([\d.]+)([KMG])\) exceeds", error)
    if not match:
        return 0
    number, unit = (group for group in match.groups() if group)
    return int(float(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit])


def _find_devices(chips: Slice, estimate: bool) -> Devices:
    """The devices to compile for: CPU devices in place of the chips, or descriptions of TPUs."""
    if estimate:
        devices = jax.devices("cpu")
        if len(devices) < chips.count:
            raise ValueError(
                f"{chips.name} needs {chips.count} CPU devices, got {len(devices)}; "
                f"set XLA_FLAGS={device_count_flag(chips.count)}"
            )
        return devices[: chips.count]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "the TPU compiler is not installed: pip install 'paligemma-jax[plan]' in a separate "
            "environment, or pass --estimate"
        )
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": [1, 1, 1]} if chips.count == 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=chips.name, **options)
    except Exception as error:  # its type depends on the shape
        raise ValueError(f"--on {chips.name}: {str(error).splitlines()[0]}") from None
    return list(topology.devices)
