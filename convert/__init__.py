"""Read, convert, verify and describe PaliGemma checkpoints of every format.

    read(SOURCE)                          a Checkpoint: config and tensors, none in memory
    convert(SOURCE, DESTINATION, "jax")   or "huggingface", "big_vision"
    inspect(SOURCE)                       a dict: format, variant, parameters, dtypes, ...

On the command line: `paligemma-jax convert --help`, or `python -m convert --help`.
"""

from convert.checkpoint import Checkpoint
from convert.formats import convert, read, write
from convert.inspection import inspect

__all__ = ["Checkpoint", "convert", "inspect", "read", "write"]
