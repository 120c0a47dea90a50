"""Options that several subcommands share. Nothing here imports jax, so that --help is quick."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from paligemma_jax.inference.predictor import Predictor
    from paligemma_jax.inference.sampling import Strategy


def flag(metavar: str, default: str | None = None):
    """A flag's metavar, and what the help says of a default of None."""
    hint = f"(default: {default})" if default else None
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


Name = Annotated[str, flag("NAME")]
Names = Annotated[tuple[str, ...], flag("NAME [NAME ...]")]
Numbers = Annotated[tuple[int, ...], flag("N [N ...]")]
Numerics = Annotated[str | None, flag("NAME", "the checkpoint's")]
Dtype = Annotated[str | None, flag("NAME", "the checkpoint's; float32 on a CPU")]
Quantize = Annotated[str | None, flag("FORMAT", "the checkpoint's")]
Mesh = Annotated[str | None, flag("SIZES", "one device")]
Number = Annotated[float | None, flag("X", "off")]
Count = Annotated[int | None, flag("N", "off")]
Stops = Annotated[tuple[str, ...], flag("TEXT [TEXT ...]", "none")]
File = Annotated[str | None, flag("FILE", "none")]
Depth = Annotated[int | None, flag("N", "all")]
Hosts = Annotated[str | None, flag("HOSTS", "a single process")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load and how: the flags of every subcommand that loads one."""

    model: Name = "tiny"
    """Checkpoint: tiny (embedded), a Hugging Face directory, a converted checkpoint, a LoRA
    adapter, or a hub id such as google/paligemma2-3b-mix-224."""
    dtype: Dtype = None
    """Dtype of parameters and activations: float32, bfloat16 or float16."""
    numerics: Numerics = None
    """Implementation to match where the two differ: transformers or big_vision."""
    quantize: Quantize = None
    """Storage format of weights: int8, int4, nf4 (the decoder's projections), or a list by part,
    such as nf4-32-double,embedding=int8,vision=int8,cache=int8."""
    mesh: Mesh = None
    """Devices to shard over: data=2,fsdp=4,tensor=2 (1 if left out), or auto for all devices of
    this process."""
    hosts: Hosts = None
    """Multi-process setup: auto (TPU pod, Slurm, Open MPI), or HOST:PORT,COUNT,INDEX. Also read
    from PALIGEMMA_JAX_HOSTS."""

    def load(self) -> Predictor:
        """Load the model."""
        from paligemma_jax import load

        self.process_part()  # "auto" connects all processes, before jax looks for devices
        return load(
            self.model,
            dtype=self.dtype,
            numerics=self.numerics,
            mesh=self.mesh,
            quantize=self.quantize,
        )

    def process_part(self) -> tuple[int, int]:
        """Return (index, count) of this process among those that share the work."""
        from paligemma_jax.sharding import hosts

        return hosts.process_part(self.hosts)

    def settings(self) -> dict[str, str | None]:
        """The options that must not change when answers are resumed; devices may."""
        options = asdict(self)
        del options["mesh"], options["hosts"]
        return options


ModelFlags = Annotated[ModelOptions, tyro.conf.arg(name="")]  # flags without a prefix


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


Decoded = Annotated[DecodingFlags, tyro.conf.arg(name="")]


def require_file(flag: str, file: str) -> None:
    """ValueError, before a model is loaded, if the file of a flag does not exist."""
    if not Path(file).is_file():
        raise ValueError(f"{flag} {file}: no such file")


def require_parent(flag: str, file: str | None) -> None:
    """ValueError, before any computation, if the directory of an output file does not exist."""
    if file and not Path(file).parent.is_dir():
        raise ValueError(f"{flag} {file}: no such directory: {Path(file).parent}")


def dumps(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False)
