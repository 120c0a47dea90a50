"""Checkpoints of every format that PaliGemma comes in, read, converted, checked and described. `python -m convert --help`.

read(SOURCE)                            -> Checkpoint: config and tensors, none of which is in memory
convert(SOURCE, DESTINATION, "jax")     also "huggingface", "big_vision"
inspect(SOURCE)                         -> dict: format, variant, parameters, dtype, resolution, what is odd
"""

from convert.checkpoint import Checkpoint
from convert.formats import convert, inspect, read, write

__all__ = ["Checkpoint", "convert", "inspect", "read", "write"]
