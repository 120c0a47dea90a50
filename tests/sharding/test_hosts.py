"""Real processes on this machine train as one: they have the losses of a single process, their
checkpoints load in any number of processes, and all end when one is lost. For inference, each works
on its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from support.finetuning import data, losses, weights  # noqa: F401
from support.on_devices import device_flags
from support.paths import DIGITS, ROOT

from paligemma_jax.evaluation.cases import collect
from paligemma_jax.sharding import hosts
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune

MODEL = ROOT / "tests" / "golden" / "pg2"
OPTIONS = dict(batch_size=4, learning_rate=1e-3, save_every=2, length=64)
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def start(arguments, **environment):
    """Start the command in a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "paligemma_jax", *map(str, arguments)],
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_run(count, rows, output, *options, devices=1):
    """Start the processes of one fine-tuning run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"XLA_FLAGS": device_flags(devices), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = ["finetune", "--model", MODEL, "--data", rows, "--output", output, *options]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    addresses = [["--hosts", f"localhost:{port},{count},{i}"] for i in range(count)]
    return [start(command + (address if count > 1 else []), **environment) for address in addresses]


def run(*arguments, **options):
    """Run the processes to the end. Return their stdout."""
    processes = start_run(*arguments, **options)
    outputs = [process.communicate(timeout=900) for process in processes]
    errors = "".join(err[-3000:] for _, err in outputs)
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    # Gloo, which connects the processes, prints to stdout.
    return [re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE) for out, _ in outputs]


def run_single(rows, output, **options):
    """Run in this process. Returns losses and weights."""
    finetune(FinetuneConfig(str(rows), str(output), str(MODEL), **(OPTIONS | options)))
    return losses(output), weights(output / "model")


def assert_weights_close(directory, expected, tolerance=1e-4):
    """Compare weights after a few steps of AdamW with a learning rate of 1e-3."""
    result = weights(directory)
    for path, value in expected.items():
        assert np.abs(result[path] - value).max() < tolerance, path


def test_two_processes_train_as_one(data, tmp_path):  # noqa: F811
    expected, model = run_single(data, tmp_path / "single", steps=3)
    two = tmp_path / "two"
    first, second = run(2, data, two, "--steps=3")
    assert first.strip() == str(two / "model") and not second.strip()
    np.testing.assert_allclose(losses(two), expected, rtol=1e-5)
    assert_weights_close(two / "model", model)
    shutil.rmtree(two / "checkpoints" / "3")
    run_single(data, two, steps=3, resume=True)  # from a checkpoint of two processes
    np.testing.assert_allclose(losses(two), expected, rtol=1e-5)


@pytest.mark.slow
def test_four_processes_and_their_checkpoints(data, tmp_path):  # noqa: F811
    """Uses a mesh with all three axes and two devices per process, and LoRA, so that there is an
    adapter to save. The run is resumed by one, two and four processes."""
    single, four = tmp_path / "single", tmp_path / "four"
    lora = dict(train="lora", lora_rank=2, export="jax", validation=str(data))
    expected, _ = run_single(data, single, steps=4, **lora)
    options = ["--steps=4", "--train=lora", "--lora-rank=2", "--export=jax"]
    options += [f"--validation={data}"]
    run(4, data, four, *options, "--mesh=data=2,fsdp=2,tensor=2", devices=2)
    np.testing.assert_allclose(losses(four), expected, rtol=1e-5)
    for count in (1, 2, 4):
        resumed = shutil.copytree(four, tmp_path / f"resumed{count}")
        shutil.rmtree(resumed / "checkpoints" / "4")
        run(count, data, resumed, *options, "--resume")
        np.testing.assert_allclose(losses(resumed), expected, rtol=1e-5)
        for part in ("model", "adapter"):
            assert_weights_close(resumed / part, weights(single / part))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run(data, tmp_path, victim):  # noqa: F811
    """The other process ends too, with a hint on how to continue. The resumed run equals one that
    was never killed, bit for bit."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(2, data, undisturbed, "--steps=40")
    processes = start_run(2, data, killed, "--steps=40")
    log = killed / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[victim].kill()
    _, error = processes[1 - victim].communicate(timeout=200)
    assert processes[1 - victim].returncode != 0
    if victim == 1:  # process 0 is the coordinator: without it, JAX itself may end the process
        assert "another process of this run is lost" in error and "--resume" in error
    assert len(json.loads((killed / "config.json").read_text())) > 30
    run(2, data, killed, "--steps=40", "--resume")
    np.testing.assert_array_equal(losses(killed), losses(undisturbed))
    result, expected = weights(killed / "model"), weights(undisturbed / "model")
    assert all((result[path] == value).all() for path, value in expected.items())


def start_predict(rows, output, address, **environment):
    """Start a process that answers its part of the rows, slowly enough to be killed."""
    command = ["predict", "--data", rows, "--output", output, "--hosts", address, "--resume"]
    command += ["--batch-size=1", "--max-new-tokens=1"]
    return start(command, JAX_PLATFORMS="cpu", **environment)


def kill_after_first_answer(process, pending):
    while not pending.exists() or not pending.stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_processes_predict_independently(tmp_path):
    """The first ends long before the second starts, which is killed and resumes alone."""
    prompts = ["ocr", "caption en"] * 64
    rows = [{"image": str(DIGITS), "prefix": p, "id": i} for i, p in enumerate(prompts)]
    file, output = tmp_path / "in.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start_part(i):
        cache = str(tmp_path / "cache")
        return start_predict(file, output, f"localhost:1,2,{i}", PALIGEMMA_JAX_CACHE=cache)

    first = start_part(0)
    assert not first.wait(300), first.communicate()[1]
    kill_after_first_answer(start_part(1), output / "pending-00001-of-00002.jsonl")
    with pytest.raises(ValueError, match="out is not finished"):
        collect(file, output)
    second = start_part(1)
    assert not second.wait(300), second.communicate()[1]
    assert [case.row["id"] for case in collect(file, output)] == list(range(128))


@pytest.mark.slow
def test_slurm_numbers_the_processes(tmp_path):
    """They connect once to learn their numbers. Then one is killed, and the other finishes."""
    row = json.dumps({"image": str(DIGITS), "prefix": "ocr"}) + "\n"
    file, output = tmp_path / "in.jsonl", tmp_path / "out"
    file.write_text(row * 800)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    first, second = (
        start_predict(file, output, "auto", **slurm, SLURM_PROCID=str(i)) for i in range(2)
    )
    kill_after_first_answer(second, output / "pending-00001-of-00002.jsonl")
    assert not first.wait(300), first.communicate()[1]
    answers = (output / "answers-00000-of-00002.jsonl").read_text()
    assert len(answers.splitlines()) == 400


@pytest.mark.parametrize("value", ["localhost", "localhost:1,2", "localhost:1,2,2", ":,1,0"])
def test_invalid_hosts_are_rejected(value):
    message = rf"--hosts must be auto or HOST:PORT,COUNT,INDEX .*; got '{value}'"
    with pytest.raises(ValueError, match=message):
        hosts.initialize(value)
    with pytest.raises(ValueError, match=message):
        hosts.process_part(value)
