"""The values that the fields of a configuration may have. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log10
from numbers import Integral, Real
from typing import Literal, get_args, get_origin, get_type_hints

POSITIVE = "steps length batch_size accumulate save_every keep"
RATES = "learning_rate lora_alpha loraplus_lr_ratio"
COUNTS = "validate_every samples lora_rank lora_vision_rank soft_prompt noise_boxes"
FLOAT32 = 1.1754944e-38, 3.4028235e38  # smallest and largest normal number
NEAR_ONE = 1 - 2**-24  # the largest float32 below 1

# (requirement, check, names of the fields)
RANGES: list[tuple[str, Callable[..., bool], str]] = [
    ("at least 1", lambda x: x >= 1, POSITIVE),
    ("at least 0", lambda x: x >= 0, f"{COUNTS} clip"),
    ("an integer", lambda x: isinstance(x, Integral), f"{POSITIVE} {COUNTS} seed"),
    ("below 2**31", lambda x: x < 2**31, f"{POSITIVE} {COUNTS}"),
    ("at least 0 and below 2**32", lambda x: 0 <= x < 2**32, "seed"),
    ("positive and finite", lambda x: 0 < x < inf, f"{RATES} epochs"),
    (
        "from 1.2e-38 to 3.4e38, the range of float32",
        lambda x: FLOAT32[0] <= x <= FLOAT32[1],
        RATES,
    ),
    ("from 0 to 3.4e38", lambda x: 0 <= x <= FLOAT32[1], "warmup weight_decay vision_rate"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "beta1 beta2 label_smoothing ema"),
    ("at most 0.99999994, the largest float32 below 1", lambda x: x <= NEAR_ONE, "beta1 beta2"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "dropout lora_dropout color"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "flip"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "crop"),
]


def check_ranges(config: object) -> None:
    """Raise ValueError for a number that is out of the range of its field."""
    for requirement, is_valid, names in RANGES:
        for name in names.split():
            value = getattr(config, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (is_number and is_valid(value)):
                raise ValueError(f"{flag(name)} must be {requirement}, got {_short(value)}")


def check_choices(config: object) -> None:
    """Raise ValueError for a value that is not a choice of its field, optional or not."""
    for name, hint in get_type_hints(type(config)).items():
        for kind in (hint, *get_args(hint)):
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            value, default = getattr(config, name), getattr(type(config), name, None)
            for item in value if isinstance(value, tuple | list) else [value]:
                if choices and item not in choices and item != default:
                    listed = ", ".join(choices)
                    raise ValueError(f"{flag(name)} must be one of {listed}, got {item}")


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def _short(value: object) -> str:
    """A value in an error; a number of hundreds of digits by its order of magnitude."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"about 10**{round(value.bit_length() * log10(2))}"
    return repr(value)
