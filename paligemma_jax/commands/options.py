"""What several subcommands ask for, in the same words. Nothing here imports jax, so that --help need not wait for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from paligemma_jax.inference.predictor import Predictor
    from paligemma_jax.inference.sampling import Strategy

Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")]
Numerics = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the one that the checkpoint means)")]
Dtype = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the checkpoint's; float32 on a CPU)")]
Quantize = Annotated[str | None, tyro.conf.arg(metavar="FORMAT", help_behavior_hint="(default: as the checkpoint is)")]
Mesh = Annotated[str | None, tyro.conf.arg(metavar="SIZES", help_behavior_hint="(default: one device)")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: off)")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: off)")]
Stops = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(default: none)")]
File = Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]
Depth = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")]
Hosts = Annotated[str | None, tyro.conf.arg(metavar="WHO", help_behavior_hint="(default: this process alone)")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is held: the flags of every subcommand that loads one."""

    model: Name = "tiny"
    """tiny (embedded), a directory in Hugging Face layout, a converted checkpoint, an adapter, or a hub id like google/paligemma2-3b-mix-224."""
    dtype: Dtype = None
    """float32, bfloat16 or float16."""
    numerics: Numerics = None
    """transformers or big_vision, where the two compute different numbers."""
    quantize: Quantize = None
    """What to hold in 8 or 4 bits: int8, int4, nf4 (the decoder's projections), or more in words: nf4-32-double,embedding=int8,vision=int8"""
    mesh: Mesh = None
    """Devices to spread the model over: data=2,fsdp=4,tensor=2 (what is left out is 1), or auto for all of this process."""
    hosts: Hosts = None
    """Of several processes, who they are: auto (a TPU pod, Slurm, Open MPI tell), or HOST:PORT,N,I for process I of N; or set PALIGEMMA_JAX_HOSTS."""

    def load(self) -> Predictor:
        from paligemma_jax import load

        self.part()  # by auto all meet, before jax looks for devices
        return load(self.model, dtype=self.dtype, numerics=self.numerics, mesh=self.mesh, quantize=self.quantize)

    def part(self) -> tuple[int, int]:
        """(I, N): this process answers as the I-th of N."""
        from paligemma_jax.sharding import hosts

        return hosts.process_part(self.hosts)

    def settings(self) -> dict[str, Any]:
        """What has to be the same to go on with answers; devices and processes may be others."""
        return {name: value for name, value in asdict(self).items() if name not in ("mesh", "hosts")}


Loaded = Annotated[ModelOptions, tyro.conf.arg(name="")]  # the flags of a `Source` beside the others


@dataclass(frozen=True)
class DecodingFlags:
    """How an answer is chosen, greedily unless a flag says otherwise, and when it ends."""

    temperature: Number = None
    """Sample, at this temperature. So does any of the next four, and --best-of."""
    top_k: Count = None
    """Only among the K likeliest tokens."""
    top_p: Number = None
    """Only among the likeliest tokens that together have this probability."""
    min_p: Number = None
    """Only among tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: Number = None
    """Divides the logits of what was said before, in the prompt too; 1 is none."""
    best_of: Count = None
    """Of so many samples the likeliest."""
    beams: Count = None
    """Beam search of this width instead."""
    length_penalty: float = 1.0
    """Its scores are divided by the length to this power."""
    seed: int = 0
    """Samples depend on their prompt and its seed: this number and its place, or that of its line in a data set."""
    min_new_tokens: int = 0
    """No end before so many tokens."""
    stop: Stops = ()
    """End an answer before the first of these texts."""

    def options(self) -> dict[str, Any]:
        """Those of `Predictor.answers` but for the seeds. ValueError for what makes no sense, or not together."""
        return {"sampler": self._strategy(), "min_new_tokens": self.min_new_tokens, "stop": self.stop}

    def _strategy(self) -> Strategy:
        from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample

        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "best_of")
        drawn = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.beams is not None:
            if drawn:
                raise ValueError(f"--beams and --{next(iter(drawn)).replace('_', '-')}: beam search draws no samples, leave out one of them")
            return Beam(self.beams, self.length_penalty)
        if self.length_penalty != 1:
            raise ValueError(f"--length-penalty {self.length_penalty} is for beam search: give --beams too")
        width = drawn.pop("best_of", None)
        return Greedy() if width is None and not drawn else Sample(**drawn) if width is None else BestOf(width, Sample(**drawn))


Decoded = Annotated[DecodingFlags, tyro.conf.arg(name="")]  # as `Loaded`


def existing(flag: str, file: str) -> None:
    """ValueError, before a model is loaded, if there is no file that `flag` names."""
    if not Path(file).is_file():
        raise ValueError(f"{flag} {file}: no such file")


def placed(flag: str, file: str | None) -> None:
    """ValueError, before anything is computed, if there is no directory for the file that `flag` names."""
    if file and not Path(file).parent.is_dir():
        raise ValueError(f"{flag} {file}: there is no directory {Path(file).parent}")


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
