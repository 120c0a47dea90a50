"""In how many bits weights and cache are held: frozen dataclasses, and their short names on the command line and in checkpoints. No arrays."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS, BLOCKS = ("int8", "int4", "nf4"), (32, 64, 128)
EXAMPLE = '"int8", "int4", "nf4", "nf4-32-double,embedding=int8,vision=none,cache=int8"'


@dataclass(frozen=True)
class Format:
    """How a matrix is held (`model/codes.py`). By name: "int8", "nf4" (blocks of 64), "int4-32", "nf4-64-bf16", "nf4-128-double"."""

    kind: str
    block: int = 64  # numbers to a scale; int8 has one for each output instead
    scale: str = "float32"  # or "bfloat16"
    double: bool = False  # the scales are quantized too, to 8 bits

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown quantization {self.kind!r}; there are {', '.join(KINDS)}, as in {EXAMPLE}")
        if self.block not in BLOCKS or (self.kind == "int8" and (self.block != 64 or self.double)):
            raise ValueError(f"no quantization {self}: 4-bit ones have blocks of {', '.join(map(str, BLOCKS))}, int8 has one scale for each output")

    @classmethod
    def of(cls, name: str) -> Format:
        """ValueError if it is not one."""
        if not (found := re.fullmatch(r"(\w+?)(?:-(\d+))?(?:-(bf16|double))?", name)):
            raise ValueError(f"unknown quantization {name!r}; name one as in {EXAMPLE}")
        kind, block, scale = found.groups()
        return cls(kind, int(block or 64), "bfloat16" if scale == "bf16" else "float32", scale == "double")

    def __str__(self) -> str:
        block = "" if self.kind == "int8" and self.block == 64 else f"-{self.block}"
        return self.kind + block + "-bf16" * (self.scale == "bfloat16") + "-double" * self.double

    def fits(self, shape: tuple[int, ...], looked_up: bool = False) -> bool:
        """Can a matrix be held so? 4-bit codes lie in pairs along the last axis; blocks divide the whole, and each row if rows are looked up."""
        return self.kind == "int8" or (shape[-1] % 2 == 0 and math.prod(shape[1:] if looked_up else shape) % self.block == 0)


TOWERS = {
    "decoder": r"decoder/layers/.*(attention|mlp)/\w+",
    "embedding": r"decoder/embedder",
    "vision": r"vision/layers/.*(attention|mlp)/\w+",
}


@dataclass(frozen=True)
class Quantization:
    """What is held how: the decoder's projections, the table that is embedding and head, the image encoder's projections, the KV cache.

    As text, "FORMAT,part=FORMAT,...": the first is the decoder's; see EXAMPLE.
    """

    decoder: Format | None = None
    embedding: Format | None = None
    vision: Format | None = None
    cache: str | None = None  # "int8"

    @classmethod
    def of(cls, text: str | None) -> Quantization:
        """ValueError that says what is not understood."""
        parts = {}
        for item in text.split(",") if text else ():
            name, _, value = item.rpartition("=")
            if (name := name or "decoder") in parts or name not in (*TOWERS, "cache"):
                raise ValueError(f"{text!r}: {name} {'twice' if name in parts else 'is no part of a model'}; write it as in {EXAMPLE}")
            if name == "cache" and value not in ("int8", "none"):
                raise ValueError(f"{text!r}: the cache is held in int8 or none")
            parts[name] = None if value == "none" else value if name == "cache" else Format.of(value)
        return cls(**parts)

    def at(self, path: str) -> Format | None:
        """The format of the product or embedder at this path."""
        return next((getattr(self, tower) for tower, pattern in TOWERS.items() if re.fullmatch(pattern, path)), None)
