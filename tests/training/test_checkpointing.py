"""The states of a run on disk: which are kept, damaged ones, and a disk that is full."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from errno import EFBIG
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toys import TOY

from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.trainer import Trainer

SIZE = 20_000


def make_trainer():
    def loss(model, batch, max_targets):
        return jnp.sum(model["x"]), jnp.float32(1)

    return Trainer({"x": jnp.arange(SIZE, dtype=jnp.float32)}, TOY, 9, loss)


def train(folder, losses, keep=2):
    """Save one checkpoint per validation loss, and return the last state."""
    checkpoints, trainer = Checkpoints(folder, keep), make_trainer()
    state = trainer.start()
    for step, loss in enumerate(losses, 1):
        state, _ = trainer.step(state, trainer.frozen, None, max_targets=0)
        checkpoints.save(step, state, {"validation_loss": loss})
    checkpoints.finish()
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, [None, None])
    return folder


def steps_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def largest(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def flip(folder):
    """Change one bit of the numbers."""
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit": flip,
    "truncated": lambda folder: os.truncate(largest(folder), 1000),
    "no numbers": lambda folder: largest(folder).unlink(),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "metrics": lambda folder: (folder / "metrics/metrics").write_text("[]"),
    "metadata": lambda folder: (folder / "default/_METADATA").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, run, tmp_path, recwarn, capfd):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder / "checkpoints/2")
    trainer, checkpoints = make_trainer(), Checkpoints(folder, keep=2)
    state = checkpoints.restore(trainer.start())
    assert int(state.step) == 1
    messages = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert f"checkpoint 2 of {folder} is damaged (" in messages[0]
    assert not any("\n" in message for message in messages) and not capfd.readouterr().err
    assert (folder / "damaged/2").is_dir()
    state, _ = trainer.step(state, trainer.frozen, None, max_targets=0)
    checkpoints.save(2, state, {})
    checkpoints.finish()
    again = Checkpoints(folder, keep=2).restore(make_trainer().start())
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_with_damaged_checkpoints_only_does_not_start_anew(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for step in (1, 2):
        flip(tmp_path / f"run/checkpoints/{step}")
    with pytest.raises(ValueError, match=r"has no intact checkpoint \(2: its checksum.*; 1: "):
        Checkpoints(tmp_path / "run", keep=2).restore(make_trainer().start())


def test_the_best_is_the_lowest_finite_loss(tmp_path):
    train(tmp_path, [3.0, 1.0, float("nan"), 2.0, None, float("inf")], keep=1)
    assert steps_of(tmp_path) == ["2", "6"]
    assert Checkpoints(tmp_path, keep=1).best_step() == 2


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from paligemma_jax.errors import report_errors
sys.path.insert(0, "tests")

def work():
    from training.test_checkpointing import train

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    train(folder, [None, None])
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    train(folder, [None, None, None, None])

report_errors(work)
"""


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        f"paligemma-jax: a checkpoint could not be written to {tmp_path}/run: File too large; the "
        "last complete one is of step 2. Make room, then continue with --resume\n"
    ) in done.stderr
    assert steps_of(tmp_path / "run") == ["1", "2"]


THREADS = """
import asyncio, gc, threading
from paligemma_jax.training.checkpointing import _silence_threads

class Unraisable:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise OSError(self.text)

def in_thread(text):
    raise OSError(text)

async def never_retrieved(text):
    asyncio.get_running_loop().create_future().set_exception(OSError(text))

_silence_threads()
for text in "Event loop is closed", "File too large [code 27]", "something else":
    Unraisable(text)
    thread = threading.Thread(target=in_thread, args=[text])
    thread.start()
    thread.join()
    asyncio.run(never_retrieved(text))
    gc.collect()
"""


def test_threads_print_only_errors_that_do_not_repeat_the_error_of_a_write():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.stderr.count("OSError: something else") == done.stderr.count("OSError: ") == 3


def test_what_is_written_after_an_error_is_removed_as_well(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    unfinished = tmp_path / "checkpoints/3.orbax-checkpoint-tmp"

    def write():
        for _ in range(20):
            unfinished.mkdir(parents=True, exist_ok=True)
            time.sleep(0.02)

    thread = Thread(target=write)
    thread.start()
    with pytest.raises(ValueError, match="could not be written"), checkpoints._one_line_errors():
        raise OSError(EFBIG, "File too large")
    thread.join()
    assert steps_of(tmp_path) == []
