"""A JSON file from outside with a field of another type loads, or is refused in few words."""

from __future__ import annotations

import json
import os
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.mutations import mutations, omissions

from convert import bitsandbytes, convert, inspect, peft
from convert.files import json_bytes
from convert.safetensors import load_header
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.checkpoints.source import TINY, resolve
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.model.codes import NF4, dynamic_map

SECONDS, MEGABYTES = 5, 500  # per mutation, and for all mutations of a file
SAMPLE = 29  # in the default suite, every 29th mutation


def check_checkpoint(directory: Path) -> None:
    """Load everything but the values of the weights, and use the processor."""
    source = resolve(directory)
    processor = make_processor(source)
    make_shapes(source.checkpoint.config)
    encoded = processor([Image.new("RGB", (9, 9))], ["caption en"])
    processor.decode(encoded.tokens[0].tolist())
    inspect(directory)


make_shapes = cache(abstract_model)  # most mutations do not change the config


def check_adapter(directory: Path) -> None:
    source = resolve(directory)
    assert source.adapter is not None
    peft.load_adapter(source.adapter, source.config)


def make_huggingface(directory: Path) -> Path:
    """tiny with every file that transformers 4 writes."""
    directory.mkdir()
    for file in TINY.iterdir():
        os.link(file, directory / file.name)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    token = {"content": "<tool>", "special": True, **flags}
    processor = json.loads((TINY / "processor_config.json").read_text())
    added = {
        "generation_config.json": {"eos_token_id": [1, 107], "pad_token_id": 0},
        "preprocessor_config.json": processor["image_processor"],
        "added_tokens.json": {"<image>": 1600},
        "special_tokens_map.json": {"eos_token": token, "additional_special_tokens": ["<image>"]},
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer",
            "added_tokens_decoder": {"1600": token | {"content": "<image>"}},
            "additional_special_tokens": ["<image>"],
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": 10**30,
        },
    }
    for name, content in added.items():
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(json_bytes(content))
    return directory


def make_sharded(directory: Path) -> Path:
    convert(TINY, directory, "huggingface", max_shard=3_000_000)
    return directory


def make_jax(directory: Path) -> Path:
    convert(TINY, directory, "jax")
    return directory


def make_adapter(directory: Path) -> Path:
    factors = peft.Factors(np.ones((2, 160), np.float32), np.ones((4, 32, 2), np.float32), 2.0)
    path = "decoder/layers/0/attention/q"
    peft.save_adapter(directory, {path: factors}, resolve("tiny").config, str(TINY))
    return directory


def make_nf4(directory: Path) -> Path:
    """One matrix as bitsandbytes quantizes it, with quantized scales."""
    directory.mkdir()
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "shape": [8, 32],
        "dtype": "float32",
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.1,
    }
    parts = {
        "weight": np.zeros((128, 1), np.uint8),
        "weight.absmax": np.zeros(4, np.uint8),
        "weight.quant_map": NF4,
        "weight.nested_absmax": np.ones(1, np.float32),
        "weight.nested_quant_map": dynamic_map(),
        STATE: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    save_file(parts, directory / "model.safetensors")
    return directory


def check_nf4(directory: Path) -> None:
    bitsandbytes.unpack(load_header(directory / "model.safetensors"), directory)


def read_header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def write_header(file: Path, header: bytes) -> None:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])


def read_state(file: Path) -> bytes:
    return load_file(file)[STATE].tobytes()


def write_state(file: Path, state: bytes) -> None:
    save_file(load_file(file) | {STATE: np.frombuffer(state, np.uint8)}, file)


STATE = "weight.quant_state.bitsandbytes__nf4"
ZARRAY = "params/decoder.layers.0.attention.q.kernel/.zarray"


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how it is made and loaded, and its JSON files."""

    make: Callable[[Path], Path]
    load: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], bytes] = Path.read_bytes  # the JSON of a file
    write: Callable[[Path, bytes], object] = Path.write_bytes


TRANSFORMERS_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
WEIGHTS = ("model.safetensors",)
KINDS = {
    "huggingface": Kind(make_huggingface, check_checkpoint, TRANSFORMERS_FILES),
    "sharded": Kind(make_sharded, check_checkpoint, ("model.safetensors.index.json",)),
    "jax": Kind(make_jax, check_checkpoint, ("paligemma.json", "params/_METADATA", ZARRAY)),
    "adapter": Kind(make_adapter, check_adapter, ("adapter_config.json",)),
    "header": Kind(make_nf4, check_nf4, WEIGHTS, read_header, write_header),
    "nf4": Kind(make_nf4, check_nf4, WEIGHTS, read_state, write_state),
}
FILES = [(kind, file) for kind, about in KINDS.items() for file in about.files]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Make each kind of checkpoint once; return a function that gives its directory."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind].make(tmp_path_factory.mktemp("external") / kind)
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "name"), FILES, ids=lambda value: value.rpartition("/")[2])
@pytest.mark.thorough
def test_a_sample_of_mutations(kind, name, checkpoint):
    check_mutations(KINDS[kind], checkpoint(kind), name, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FILES, ids=lambda value: value.rpartition("/")[2])
def test_all_mutations(kind, name, checkpoint):
    check_mutations(KINDS[kind], checkpoint(kind), name, 1)


def check_mutations(kind: Kind, directory: Path, name: str, step: int) -> None:
    """Replace the JSON of one file by each of its mutations in turn; list all that fail."""
    file = directory / name
    original = file.read_bytes()
    file.unlink()  # it may be a hard link
    file.write_bytes(original)
    failures, count, memory = [], 0, _peak_megabytes()
    value = json.loads(kind.read(file))
    for content in islice(chain(mutations(value), omissions(value)), 0, None, step):
        kind.write(file, content.encode())
        failure = _failure(kind.load, directory)
        count += 1
        if failure:
            failures.append(f"{_excerpt(content, value)}: {failure}")
    file.write_bytes(original)
    print(f"{name}: {count} mutations")
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)
    assert _peak_megabytes() - memory < MEGABYTES


def _excerpt(content: str, value: object) -> str:
    """Where a mutation differs from the original."""
    original = json.dumps(value)
    pairs = enumerate(zip(content, original, strict=False))
    at = next((i for i, (new, old) in pairs if new != old), len(content))
    return content[max(0, at - 40) : at + 20]


def _failure(load: Callable, directory: Path) -> str | None:
    """Why a load was not acceptable."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(directory)
    except ValueError as error:
        # A list of all tensors that do not fit has a line for each kind.
        if len(str(error).splitlines()) > 60 or len(str(error)) > 8000:
            return f"long message: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} s" if seconds > SECONDS else None


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
