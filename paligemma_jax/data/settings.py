"""config.json of a run of `predict` or `finetune`: the settings that must not change on resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def check_settings(
    folder: Path, before: Mapping[str, object], now: Mapping[str, object], advice: str
) -> None:
    """Check that a run is resumed with the settings it was started with.

    Args:
        before: The recorded settings. Names that are not in `now` are ignored.
        now: The settings of the run that resumes.
        advice: The end of the error.

    Raises:
        ValueError: Lists the settings that differ.
    """
    changes = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changes:
        listed = "; ".join(changes)
        raise ValueError(f"{folder} was started with other settings: {listed}. {advice}")
