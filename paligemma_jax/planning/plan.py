"""Whether a workload fits a slice of accelerators that nobody has to own, and how fast it can be at best.

The programs are those that `inference/generate.py` and `training/trainer.py` run, compiled from shapes: by the TPU's own compiler (libtpu) for a
slice that is only described, or, where there is none, by that of CPUs for as many devices, which is an estimate.
"""

from __future__ import annotations

import importlib.util
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.inference import generate
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.stack import stack_model
from paligemma_jax.planning import chips, hlo
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.processing.processor import Inputs, round_up
from paligemma_jax.quantization.quantize import quantize_model, weight_formats
from paligemma_jax.sharding.arrays import batch_shapes
from paligemma_jax.sharding.mesh import (
    batch_shards,
    check_batch_size,
    padded_batch_size,
    resolve_mesh,
)
from paligemma_jax.sharding.rules import sharded_shapes
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import trainer_shapes


@dataclass(frozen=True)
class ProgramCost:
    """One compiled program, on each chip. `memory` is all of it: arguments, temporaries, and results that take no argument's place."""

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    memory_bytes: int
    flops: float
    bytes: float  # that have to move at least: arguments and results once, temporaries written and read
    sent_bytes: dict[str, float]  # to other chips
    compile_seconds: float
    seconds: float = 0.0  # at best


@dataclass(frozen=True)
class PlanResult:
    """What came out; without the figures of programs that the compiler found too large to compile."""

    work: PlanConfig
    mesh: dict[str, int]
    estimate: bool  # by the compiler for CPUs, which computes bfloat16 in float32: needs rather less than told
    chip_bytes: int  # that programs may use
    fits: bool = False
    bytes_per_chip: int = 0  # of the largest program; where it does not fit, what its compiler says
    compile_seconds: float = 0.0
    flops: float = 0.0  # on each chip: of a step; to generate, of images, first token and one more
    bytes: float = 0.0
    seconds: float = 0.0  # at best: of a step; to generate, of the whole answers
    rows_s: float = 0.0  # at best
    programs: dict[str, ProgramCost] = field(default_factory=dict)


def plan(work: PlanConfig) -> PlanResult:
    """Compiles what `work` runs. ValueError if it cannot be asked for; what does not fit is an answer."""
    where = chips.find_slice(work.on)
    estimate = work.estimate or not where.chip.axes
    model = abstract_model_by_name(work.model, work.dtype)
    if work.training and not work.lora and weight_formats(model):
        raise ValueError(f"--model {work.model} is quantized, and codes do not learn: give --lora RANK to adapt it")
    mesh = resolve_mesh(work.mesh, model.config, work.training, _devices(where, estimate), (work.batch or 0) // work.parts)
    assert mesh
    if mesh.size < where.count:
        raise ValueError(f"--mesh {work.mesh} is of {mesh.size} chips, {work.on} has {where.count}")
    if work.training:
        each = work.parts * batch_shards(mesh)
        work = replace(work, batch=work.batch or -(-work.rows // each) * each)
        check_batch_size("--batch", work.rows, work.parts, mesh)
    else:
        work = replace(work, batch=padded_batch_size(work.rows, mesh))
    done = PlanResult(work, dict(mesh.shape), estimate, chip_bytes=int(where.chip.memory))
    start, found = time.perf_counter(), {}
    try:
        for name, one in _training(work, model, mesh) if work.training else _generation(work, model, mesh):
            found[name] = replace(one, seconds=_seconds(one, where.chip))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = re.search(r"Used ([\d.]+[KMG]) of|\(([\d.]+[KMG])\) exceeds", str(error))
        needed = _bytes(told[1] or told[2]) if told else 0
        return replace(done, programs=found, bytes_per_chip=needed, compile_seconds=time.perf_counter() - start)
    step, needed = found.get("step") or found["prefill"], max(one.memory_bytes for one in found.values())
    seconds = step.seconds if work.training else found["encode"].seconds + step.seconds + (work.new - 1) * found["decode"].seconds
    done = replace(done, programs=found, fits=needed <= done.chip_bytes, bytes_per_chip=needed, seconds=seconds, rows_s=work.rows / seconds)
    total = lambda name: sum(getattr(one, name) for one in found.values())
    return replace(done, compile_seconds=total("compile_seconds"), flops=total("flops"), bytes=total("bytes"))


def search(work: PlanConfig, batches: tuple[int, ...] = ()) -> Iterator[PlanResult]:
    """The plans of `work` on every mesh of all its chips, with every remat and batch that divides over it, larger ones while smaller ones fit."""
    count = chips.find_slice(work.on).count
    ways = [n for n in range(1, count + 1) if count % n == 0]
    meshes = [(d, f, count // d // f) for d in ways for f in ways if count % (d * f) == 0]
    for (data, fsdp, tensor), remat in product(meshes, ("none", "dots", "full") if work.training else (work.remat,)):
        mesh = f"data={data},fsdp={fsdp},tensor={tensor}"
        for batch in sorted(batches) or [work.batch]:
            if batch and batch % (data * fsdp * work.parts):
                continue
            try:
                found = plan(replace(work, mesh=mesh, remat=remat, batch=batch))
            except ValueError as error:
                warnings.warn(f"{mesh}: {error}", stacklevel=2)
                break
            yield found
            if not found.fits:
                break


def _training(work: PlanConfig, model: Any, mesh: Mesh) -> Iterator[tuple[str, ProgramCost]]:
    """The step of `training/trainer.py`."""
    config = FinetuneConfig(
        "", "", train="lora" if work.lora else "all", lora_rank=work.lora or 16, quantize=work.quantize, batch_size=work.rows, remat=work.remat,
        accumulate=work.accumulate, optimizer=work.optimizer, dtype=work.dtype, layers=work.layers or "stack",
    )  # fmt: skip
    trainer, state, frozen = trainer_shapes(model, config)
    inputs, images = _inputs(work, model.config, round_up(model.config.vision.num_patches + work.text))
    batch = Batch(replace(inputs, images=images), jax.ShapeDtypeStruct((work.batch,), jnp.float32))
    trainer.mesh = mesh
    yield (
        "step",
        _compiled(
            trainer.step, sharded_shapes(state, mesh), sharded_shapes(frozen, mesh), batch_shapes(batch, mesh), max_targets=round_up(work.new)
        )[0],
    )


def _generation(work: PlanConfig, model: Any, mesh: Mesh) -> Iterator[tuple[str, ProgramCost]]:
    """The three programs of `inference/generate.py`: images, first token, later tokens, of which a run of the last counts one."""
    model = jax.eval_shape(partial(quantize_model, how=work.quantize), model) if work.quantize else model
    model = jax.eval_shape(partial(stack_model, delete=False), model) if work.layers == "stack" else model
    model = sharded_shapes(model, mesh)
    inputs, images = _inputs(work, model.config, round_up(model.config.vision.num_patches + work.text))
    images = jax.ShapeDtypeStruct((work.batch, *images.shape[2:]), images.dtype)
    request = jax.eval_shape(partial(make_request, model, work.rows))
    one, encode = _compiled(generate.encode_images, model, images)
    yield "encode", one
    features = jax.ShapeDtypeStruct((work.batch, 1, *encode.out_info.shape[1:]), encode.out_info.dtype)
    slots = inputs.tokens.shape[1] + round_up(work.new)
    one, prefill = _compiled(generate.prefill, model, inputs, features, request, slots=slots, sampler=Greedy())
    yield "prefill", one
    state = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), prefill.out_info, prefill.output_shardings)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    yield "decode", _compiled(generate.decode, model, state, request, limit, size=round_up(work.new), sampler=Greedy())[0]


def _inputs(work: PlanConfig, config: Any, tokens: int) -> tuple[Inputs, Any]:
    yes = jax.ShapeDtypeStruct((work.batch, tokens), jnp.bool_)
    S = config.vision.image_size
    inputs = Inputs(jax.ShapeDtypeStruct(yes.shape, jnp.int32), jax.ShapeDtypeStruct((0, S, S, 3), jnp.float32), yes, yes, yes)
    return inputs, jax.ShapeDtypeStruct((work.batch, 1, S, S, 3), jnp.float32)


def _compiled(function: Any, *args: Any, **static: Any) -> tuple[ProgramCost, Any]:
    start = time.perf_counter()
    done = function.lower(*args, **static).compile()
    seconds, sizes = time.perf_counter() - start, done.memory_analysis()
    arguments, temporary, output = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    found = hlo.program_work(done.as_text())
    moved = arguments + output + 2 * temporary
    return ProgramCost(arguments, temporary, output, arguments + temporary + output, found.flops, moved, dict(found.sent), seconds), done


def _seconds(one: ProgramCost, chip: chips.Chip) -> float:
    """The roofline: the slowest of products, memory and links, each at its published rate."""
    return max(one.flops / chip.flops, one.bytes / chip.bandwidth, sum(one.sent_bytes.values()) / chip.links)


def _bytes(text: str) -> int:
    return int(float(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])


def _devices(where: chips.Slice, estimate: bool) -> list[Any]:
    if estimate:
        if len(devices := jax.devices("cpu")) < where.count:
            raise ValueError(
                f"{where.name} stands for {where.count} devices, this process has {len(devices)}: set {chips.flag(where.count)} in XLA_FLAGS"
            )
        return devices[: where.count]
    if importlib.util.find_spec("libtpu") is None:
        wanted = "pip install 'paligemma-jax[plan]' into an environment of its own, or --estimate"
        raise ValueError(f"the compiler for TPUs is not installed: {wanted}")
    from jax.experimental import topologies

    alone: Any = {"chips_per_host_bounds": [1, 1, 1]} if where.count == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=where.name, **alone).devices)
    except Exception as error:  # of every kind, for a shape that no slice has
        raise ValueError(f"--on {where.name}: {str(error).splitlines()[0]}") from None
