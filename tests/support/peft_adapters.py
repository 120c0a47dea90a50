"""Adapters as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path

from convert import peft


def save_peft(model, directory: Path, base: Path) -> Path:
    """Save a peft model as an adapter of the checkpoint `base`."""
    model.save_pretrained(str(directory))
    file = directory / peft.CONFIG
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(settings))
    return directory
