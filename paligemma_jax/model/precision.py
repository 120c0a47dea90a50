"""Storage formats of weights and cache, and their names on the command line and in checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

KINDS, BLOCKS = ("int8", "w8a8", "int4", "nf4", "fp4"), (32, 64, 128)
PER_OUTPUT = ("int8", "w8a8")  # the kinds with one scale per output instead of blocks
EXAMPLE = '"int8", "w8a8", "int4", "nf4", "nf4-32-double,embedding=int8,vision=none,cache=int8"'


@dataclass(frozen=True)
class WeightFormat:
    """Format of a quantized matrix (`model/codes.py`). Written as "int8", "nf4" (blocks of 64),
    "int4-32", "nf4-64-bf16" or "nf4-128-double". "w8a8" stores what "int8" stores, and also rounds
    the other operand of each product (`quantization/w8a8.py`)."""

    kind: str
    block: int = 64  # numbers per scale, of kinds that have blocks
    scale: str = "float32"  # or "bfloat16"
    double: bool = False  # quantize the scales too, to 8 bits

    def __post_init__(self):
        if self.kind not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(
                f"quantization must be one of {kinds}, got {self.kind!r}; examples: {EXAMPLE}"
            )
        if self.block not in BLOCKS:
            blocks = ", ".join(map(str, BLOCKS))
            raise ValueError(
                f"quantization block must be one of {blocks}, got {self.block} in {self}"
            )
        if not self.has_blocks and (self.block != 64 or self.double):
            raise ValueError(f"{self.kind} has one scale per output and no blocks, got {self}")

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """Parse the name of a format. Raises ValueError if it is not one."""
        match = re.fullmatch(r"(\w+?)(?:-(\d+))?(?:-(bf16|double))?", name)
        if not match:
            raise ValueError(f"unknown quantization {name!r}; examples: {EXAMPLE}")
        kind, block, scale = match.groups()
        dtype = "bfloat16" if scale == "bf16" else "float32"
        return cls(kind, int(block or 64), dtype, scale == "double")

    @property
    def has_blocks(self) -> bool:
        """Whether a scale belongs to a block, not to an output."""
        return self.kind not in PER_OUTPUT

    @property
    def stored(self) -> WeightFormat:
        """The format whose codes and scales these are: w8a8 has those of int8."""
        return replace(self, kind="int8") if self.kind == "w8a8" else self

    def __str__(self) -> str:
        block = "" if self.block == 64 and not self.has_blocks else f"-{self.block}"
        return self.kind + block + "-bf16" * (self.scale == "bfloat16") + "-double" * self.double

    def fits(self, shape: tuple[int, ...], looked_up: bool = False) -> bool:
        """Whether a matrix of this shape can have this format: 4-bit codes are packed in pairs
        along the last axis, and blocks must divide the matrix, or each row if it is looked up."""
        if not self.has_blocks:
            return True
        size = math.prod(shape[1:] if looked_up else shape)
        return shape[-1] % 2 == 0 and size % self.block == 0


PART_PATTERNS = {
    "decoder": r"decoder/layers/.*(attention|mlp)/\w+",
    "embedding": r"decoder/(embedder|head)",
    "vision": r"vision/layers/.*(attention|mlp)/\w+",
}


@dataclass(frozen=True)
class Quantization:
    """The format of each part of a model: the decoder's projections, the embedding (the table, and
    the head if it has a table of its own), the image encoder's projections, the KV cache. None
    leaves a part unquantized.

    Written as "FORMAT,part=FORMAT,..."; the first is the decoder's (see EXAMPLE).
    """

    decoder: WeightFormat | None = None
    embedding: WeightFormat | None = None
    vision: WeightFormat | None = None
    cache: str | None = None  # "int8"

    @classmethod
    def parse(cls, text: str | None) -> Quantization:
        """Parse a description. Raises a ValueError that names an invalid part."""
        parts = {}
        for item in text.split(",") if text else ():
            name, _, value = item.rpartition("=")
            name = name or "decoder"
            if name not in (*PART_PATTERNS, "cache"):
                raise ValueError(f"{text!r}: unknown part {name!r}; examples: {EXAMPLE}")
            if name in parts:
                raise ValueError(f"{text!r}: {name} is given twice; examples: {EXAMPLE}")
            if name == "cache" and value not in ("int8", "none"):
                raise ValueError(f"{text!r}: cache must be int8 or none, got {value!r}")
            if value == "none" or name == "cache":
                parts[name] = None if value == "none" else value
            else:
                parts[name] = WeightFormat.parse(value)
        return cls(**parts)

    def at(self, path: str) -> WeightFormat | None:
        """The format of the linear layer or embedder at this path."""
        for part, pattern in PART_PATTERNS.items():
            if re.fullmatch(pattern, path):
                return getattr(self, part)
        return None
