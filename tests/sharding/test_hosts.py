"""Several real processes on this machine train as one: losses of a single one, checkpoints for any number, an end for all when one is lost.

To answer, each is by itself.
"""

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
from support.paths import ROOT

from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.evaluation.cases import collect
from paligemma_jax.sharding import hosts
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune

MODEL = ROOT / "tests" / "golden" / "pg2"
OPTIONS = dict(batch_size=4, learning_rate=1e-3, save_every=2, length=64)


def start(count, rows, output, *options, devices=1):
    """The processes of a run of the command."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    flags |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "PALIGEMMA_JAX_CACHE": "off"}
    command = [sys.executable, "-m", "paligemma_jax", "finetune", "--model", MODEL, "--data", rows, "--output", output]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()] + list(options)
    command += ["--hosts"] if count > 1 else []
    who = lambda i: [f"localhost:{port},{count},{i}"] if count > 1 else []
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([str(part) for part in [*command, *who(i)]], env=os.environ | flags, **pipe) for i in range(count)]


def run(*arguments, **options):
    """Their outputs, when all have ended well."""
    processes = start(*arguments, **options)
    found = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), found[0][1][-3000:] + found[-1][1][-3000:]
    return [re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE) for out, _ in found]  # the library between the processes prints to stdout


def alone(rows, output, **options):
    finetune(FinetuneConfig(str(rows), str(output), str(MODEL), **(OPTIONS | options)))
    return losses(output), weights(output / "model")


def test_two_processes_train_as_one(data, tmp_path):  # noqa: F811
    expected, model = alone(data, tmp_path / "one", steps=3)
    first, second = run(2, data, tmp_path / "two", "--steps=3")
    assert first.strip() == str(tmp_path / "two" / "model") and not second.strip()
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-5)
    found = weights(tmp_path / "two" / "model")
    assert all(np.abs(found[path] - value).max() < 1e-4 for path, value in model.items())  # three steps of AdamW at 1e-3
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "3")
    finetune(FinetuneConfig(str(data), str(tmp_path / "two"), str(MODEL), **OPTIONS, steps=3, resume=True))  # what two have saved one goes on from
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-5)


@pytest.mark.slow
def test_four_processes_and_what_they_saved(data, tmp_path):  # noqa: F811
    """On a mesh of all three kinds of two devices each; LoRA, so that the adapter too is of one piece; resumed by one, by two and by four."""
    expected, _ = alone(data, tmp_path / "one", steps=4, train="lora", lora_rank=2, export="jax", validation=str(data))
    options = ["--steps=4", "--train=lora", "--lora-rank=2", "--export=jax", f"--validation={data}"]
    run(4, data, tmp_path / "four", *options, "--mesh=data=2,fsdp=2,tensor=2", devices=2)
    np.testing.assert_allclose(losses(tmp_path / "four"), expected, rtol=1e-5)
    for count in (1, 2, 4):
        again = shutil.copytree(tmp_path / "four", tmp_path / f"again{count}")
        shutil.rmtree(again / "checkpoints" / "4")
        run(count, data, again, *options, "--resume")
        np.testing.assert_allclose(losses(again), expected, rtol=1e-5)
        for part in ("model", "adapter"):
            found, whole = weights(again / part), weights(tmp_path / "one" / part)
            assert all(np.abs(found[path] - value).max() < 1e-4 for path, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run(data, tmp_path, victim):  # noqa: F811
    """The other ends too, and says how to go on; resumed, both end where two that were never killed do, to the bit."""
    run(2, data, tmp_path / "whole", "--steps=40")
    processes = start(2, data, tmp_path / "run", "--steps=40")
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[victim].kill()
    _, told = processes[1 - victim].communicate(timeout=200)
    assert processes[1 - victim].returncode != 0
    if victim == 1:  # the other way round JAX itself may be first to end the process: it has lost its coordinator
        assert "another process of this run is lost" in told and "--resume" in told
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())) > 30
    run(2, data, tmp_path / "run", "--steps=40", "--resume")
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(tmp_path / "whole"))
    found, whole = weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model")
    assert all((found[path] == value).all() for path, value in whole.items())


def answering(rows, output, who, **environment):
    """A process that answers its part, slowly enough to be killed."""
    command = f"-m paligemma_jax predict --data {rows} --output {output} --batch-size=1 --max-new-tokens=1 --resume --hosts {who}"
    flags = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command.split()], env=os.environ | flags | environment, **pipe)


def killed_while_it_answers(process, pending):
    while not pending.exists() or not pending.stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()


def test_parts_answer_by_themselves(tmp_path):
    """The first ends long before the second has begun, that is killed, and goes on alone: nobody waits, nobody is missed."""
    rows = [{"image": str(TINY.parent / "digits.jpg"), "prefix": prefix, "id": i} for i, prefix in enumerate(["ocr", "caption en"] * 64)]
    (file := tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = lambda i: answering(file, tmp_path / "out", f"localhost:1,2,{i}", PALIGEMMA_JAX_CACHE=str(tmp_path / "cache"))
    first = begun(0)
    assert not first.wait(300), first.communicate()[1]
    second = begun(1)
    killed_while_it_answers(second, tmp_path / "out" / "pending-00001-of-00002.jsonl")
    with pytest.raises(ValueError, match="out is not finished"):
        collect(file, tmp_path / "out")
    second = begun(1)
    assert not second.wait(300), second.communicate()[1]
    assert [case.row["id"] for case in collect(file, tmp_path / "out")] == list(range(128))


@pytest.mark.slow
def test_parts_that_something_tells_their_numbers(tmp_path):
    """As Slurm does: they meet to hear it, and after that the one is killed and the other ends well."""
    row = json.dumps({"image": str(TINY.parent / "digits.jpg"), "prefix": "ocr"}) + "\n"
    (file := tmp_path / "in.jsonl").write_text(row * 800)
    told = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1", SLURM_NTASKS="2", SLURM_LOCALID="0")
    first, second = (answering(file, tmp_path / "out", "auto", **told, SLURM_PROCID=str(i)) for i in range(2))
    killed_while_it_answers(second, tmp_path / "out" / "pending-00001-of-00002.jsonl")
    assert not first.wait(300), first.communicate()[1]
    assert len((tmp_path / "out" / "answers-00000-of-00002.jsonl").read_text().splitlines()) == 400


@pytest.mark.parametrize("wrong", ["localhost", "localhost:1,2", "localhost:1,2,2", ":,1,0"])
def test_what_is_no_set_of_hosts(wrong):
    with pytest.raises(ValueError, match=r"give (auto, or )?HOST:PORT,N,I"):
        hosts.initialize(wrong)
    with pytest.raises(ValueError, match="HOST:PORT,N,I"):
        hosts.process_part(wrong)
