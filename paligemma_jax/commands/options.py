"""Options that several subcommands share. Nothing here imports jax, so that --help is quick."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from paligemma_jax.model.config import AttentionForm

if TYPE_CHECKING:
    from paligemma_jax.checkpoints.source import CheckpointSource
    from paligemma_jax.inference.options import DecodingOptions
    from paligemma_jax.inference.predictor import Predictor
    from paligemma_jax.inference.sampling import Strategy
    from paligemma_jax.inference.views import BoxOptions


def flag(metavar: str, default: str | None = None):
    """Return a flag's metavar, with the help text for a default of None."""
    hint = f"(default: {default})" if default else None
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


Name = Annotated[str, flag("NAME")]
Names = Annotated[tuple[str, ...], flag("NAME [NAME ...]")]
Numbers = Annotated[tuple[int, ...], flag("N [N ...]")]
Numerics = Annotated[str | None, flag("NAME", "the checkpoint's")]
Dtype = Annotated[str | None, flag("NAME", "the checkpoint's; float32 on a CPU")]
Quantize = Annotated[str | None, flag("FORMAT", "the checkpoint's")]
Attention = Annotated[
    AttentionForm | None, tyro.conf.arg(help_behavior_hint="(default: the fastest)")
]
Mesh = Annotated[str | None, flag("SIZES", "one device")]
Number = Annotated[float | None, flag("X", "off")]
Count = Annotated[int | None, flag("N", "off")]
Stops = Annotated[tuple[str, ...], flag("TEXT [TEXT ...]", "none")]
File = Annotated[str | None, flag("FILE", "none")]
Grammar = Annotated[str | None, flag("GRAMMAR", "none")]
Depth = Annotated[int | None, flag("N", "all")]
Base = Annotated[str | None, flag("NAME", "as recorded")]
Hosts = Annotated[str | None, flag("HOSTS", "a single process")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load and how: the flags of every subcommand that loads one."""

    model: Name = "tiny"
    """Checkpoint: tiny (embedded), a Hugging Face directory, a converted checkpoint, a LoRA
    adapter, a run or its checkpoint (run/checkpoints/200), or a hub id such as
    google/paligemma2-3b-mix-224, also with @REVISION."""
    base: Base = None
    """Base checkpoint of an adapter or a run, if it has moved."""
    dtype: Dtype = None
    """Dtype of parameters and activations: float32, bfloat16 or float16; or float64, as a
    reference, with JAX_ENABLE_X64=1."""
    numerics: Numerics = None
    """Program to match where they differ: transformers, big_vision, keras, or an older release,
    such as transformers-4.52."""
    quantize: Quantize = None
    """Storage format of weights: int8, w8a8, int4, nf4 (the decoder's projections), or a list by
    part, such as nf4-32-double,embedding=int8,vision=int8,cache=int8."""
    attention: Attention = None
    """Form of attention: fused (scores stay on the chip; on TPUs and GPUs) or plain."""
    mesh: Mesh = None
    """Devices to shard over: data=2,fsdp=4,tensor=2 (axes left out have size 1), or auto for all
    devices of this process."""
    hosts: Hosts = None
    """Multi-process setup: auto (TPU pod, Slurm, Open MPI), or HOST:PORT,COUNT,INDEX. Also read
    from PALIGEMMA_JAX_HOSTS."""
    deterministic: bool = False
    """On GPUs, exclude kernels whose results vary between runs; slower. CPUs and TPUs need no
    flag."""

    def load(self) -> Predictor:
        """Load the model."""
        from paligemma_jax import load

        self.process_part()  # "auto" connects all processes, before jax looks for devices
        source = self.resolve()
        if source.note:
            print(f"paligemma-jax: {source.note}", file=sys.stderr)
        return load(
            source,
            dtype=self.dtype,
            numerics=self.numerics,
            mesh=self.mesh,
            quantize=self.quantize,
            attention=self.attention,
        )

    def resolve(self) -> CheckpointSource:
        """Find the parts of the checkpoint."""
        from paligemma_jax.checkpoints.source import resolve

        return resolve(self.model, base=self.base)

    def process_part(self) -> tuple[int, int]:
        """Return (index, count) of this process among those that share the work."""
        from paligemma_jax.sharding import deterministic, hosts

        if self.deterministic:
            deterministic.require_deterministic_programs()
        return hosts.process_part(self.hosts)

    def settings(self) -> dict[str, str | None]:
        """Return the options that must not change on resume; devices may."""
        options = asdict(self)
        for name in ("attention", "mesh", "hosts", "base", "deterministic"):
            del options[name]
        return options


ModelFlags = Annotated[ModelOptions, tyro.conf.arg(name="")]  # flags without a prefix


@dataclass(frozen=True)
class BoxFlags:
    """How the boxes of answers are made."""

    views: Literal[1, 5, 9] = 1
    """Views of each image, shifted by a few pixels, whose boxes are fused: more exact, with scores
    that are probabilities, at several times the cost."""
    nms: Number = None
    """Drop boxes that overlap a better one of their label by more than this (intersection over
    union)."""
    confidence: Literal["box", "label"] = "box"
    """Score of a box: the probability of the tokens of box and label, or of the label alone, for
    models trained with --noise-boxes."""

    def options(self) -> BoxOptions:
        from paligemma_jax.inference.views import BoxOptions

        return BoxOptions(self.views, self.nms, self.confidence)


Boxes = Annotated[BoxFlags, tyro.conf.arg(name="")]  # flags without a prefix


@dataclass(frozen=True)
class DecodingFlags:
    """How tokens are chosen (by default the most likely ones), and when an answer ends."""

    max_new_tokens: int = 128
    """Maximum length of an answer in tokens."""
    temperature: Number = None
    """Sample at this temperature. Each of the next four flags and --best-of also enables
    sampling."""
    top_k: Count = None
    """Sample from the K most likely tokens only."""
    top_p: Number = None
    """Sample only from the most likely tokens that together have this probability."""
    min_p: Number = None
    """Sample only from tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: Number = None
    """Penalty on the logits of tokens already in the prompt or the answer; 1 disables it."""
    best_of: Count = None
    """Draw this many samples and keep the most likely one."""
    beams: Count = None
    """Use beam search with this many beams."""
    length_penalty: float = 1.0
    """Exponent of the length that beam scores are divided by; 0 disables the division."""
    seed: int = 0
    """Random seed. The number of the prompt, or of its line in a data set, is added to it."""
    min_new_tokens: int = 0
    """Minimum length of an answer in tokens."""
    stop: Stops = ()
    """End an answer before the first of these texts."""
    grammar: Grammar = None
    """What an answer may be: boxes:LABELS or masks:LABELS, choices:TEXTS (comma-separated),
    json, json:SCHEMA.json or regex:PATTERN."""

    def options(self) -> DecodingOptions:
        """Return the options without the seed. Raises ValueError for invalid flags."""
        from paligemma_jax.grammars.parse import parse_grammar
        from paligemma_jax.inference.options import DecodingOptions

        return DecodingOptions(
            self.max_new_tokens,
            self._strategy(),
            self.min_new_tokens,
            self.stop,
            allowed=None if self.grammar is None else parse_grammar(self.grammar),
        )

    def _strategy(self) -> Strategy:
        from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample

        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "best_of")
        values = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in values.items() if value is not None}
        if self.beams is not None:
            if given:
                name = next(iter(given)).replace("_", "-")
                raise ValueError(f"--beams cannot be combined with --{name}, which is for sampling")
            return Beam(self.beams, self.length_penalty)
        if self.length_penalty != 1:
            raise ValueError(f"--length-penalty {self.length_penalty} requires --beams")
        if not given:
            return Greedy()
        width = given.pop("best_of", None)
        sampler = Sample(**given)
        return sampler if width is None else BestOf(width, sampler)


Decoding = Annotated[DecodingFlags, tyro.conf.arg(name="")]  # flags without a prefix


def check_port(flag: str, port: int) -> None:
    """Raise ValueError unless a flag is a port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"{flag} must be from 0 (any free port) to 65535, got {port}")


def require_file(flag: str, file: str) -> None:
    """Raise ValueError if the file of a flag does not exist."""
    if not Path(file).is_file():
        raise ValueError(f"{flag} {file}: no such file")


def require_parent(flag: str, file: str | None) -> None:
    """Raise ValueError if the directory of an output file does not exist."""
    if file and not Path(file).parent.is_dir():
        raise ValueError(f"{flag} {file}: no such directory: {Path(file).parent}")


def dumps(value: object) -> str:
    """Return one line of JSON."""
    return json.dumps(value, ensure_ascii=False)
