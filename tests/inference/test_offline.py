"""Whole data sets: order, errors by row, parts, and runs that are killed at any moment."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support.paths import ROOT

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.inference.offline import predict
from paligemma_jax.inference.offline_files import OutputFiles
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampling import Sample

PHOTO = TINY.parent / "digits.jpg"
TASKS = ["caption en", "ocr", "answer en how many digits?", "detect 3", "detect 8", "count"]
NEW = 6
OPTIONS = DecodingOptions(NEW)


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.offline.WINDOW", 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 rows in 128 lines: images of twelve kinds, an empty line here and there, seven rows that cannot be answered."""
    folder = tmp_path_factory.mktemp("data")
    photo = Image.open(PHOTO)
    for i in range(12):
        photo.crop((10 * i, 5 * i, 640 - 5 * i, 480)).resize((112, 112)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(PHOTO.read_bytes()[:5000])
    rows = [json.dumps({"image": f"{i * 7 % 12}.png", "prefix": TASKS[i * 5 % 6], "id": i, "note": "ü\u2028"}) for i in range(120)]
    rows[3], rows[17] = "{not json", json.dumps({"image": "0.png"})
    rows[40], rows[41] = json.dumps({"image": "none.png", "prefix": "ocr"}), json.dumps({"image": "broken.jpg", "prefix": "ocr"})
    rows[42], rows[80] = json.dumps({"image": "1.png", "prefix": "<image><image> ocr"}), json.dumps({"image": "1.png", "prefix": "word " * 9000})
    rows[119] = '{"image": "1.png", "prefix": "\\ud800"}'
    rows[50] = json.dumps({"image": ["1.png", "2.png"], "prefix": "<image>ocr<image>", "suffix": "kept"})
    lines = [line for i, row in enumerate(rows) for line in ([row, ""] if i % 15 == 0 else [row])]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder / "in.jsonl"


BAD = [3, 17, 40, 41, 42, 80, 119]


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
    """An uninterrupted run: (answers.jsonl, errors.jsonl)."""
    output = tmp_path_factory.mktemp("whole") / "out"
    predict(tiny, data, output, OPTIONS, batch_size=4, score=True)
    return texts(output)


def texts(output):
    return tuple("".join(path.read_text() for path in sorted(output.glob(f"{name}*.jsonl"))) for name in ("answers", "errors"))


def rows(text):
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_rows_come_back_in_order_with_their_answers(tiny, data, whole):
    answers = rows(whole[0])
    given = [json.loads(line) if i not in BAD else None for i, line in enumerate(filter(None, data.read_text().split("\n")))]
    assert [{k: v for k, v in row.items() if k not in ("answer", "score")} for row in answers] == [row for row in given if row]
    for row in [*answers[::37], next(row for row in answers if "suffix" in row)]:
        images = [data.parent / image for image in ([row["image"]] if isinstance(row["image"], str) else row["image"])]
        (alone,) = tiny.answers([images], [row["prefix"]], NEW)
        assert row["answer"] == alone.text and row["score"] == pytest.approx(alone.score, abs=1e-4)


def test_rows_that_fail_are_told_with_their_reasons(data, whole):
    errors, lines = rows(whole[1]), data.read_text().split("\n")
    assert sorted(e["line"] for e in errors) == [n for n, line in enumerate(lines, 1) if line in [list(filter(None, lines))[i] for i in BAD]]
    said = ["not JSON", "prefix is missing", "none.png", "broken.jpg", "<image>", "more than the context of 8192", "lone surrogate"]
    for error, reason in zip(sorted(errors, key=lambda e: e["line"]), said):
        assert reason in error["error"] and json.dumps(error["row"])[:9] in (lines[error["line"] - 1][:9], '"{not jso')


@pytest.mark.parametrize("of", [2, 3])
def test_parts(tiny, data, whole, tmp_path, of):
    """Side by side they hold the same rows in the same order, whatever is answered by whom."""
    for number in reversed(range(of)):
        done = predict(tiny, data, tmp_path / "out", OPTIONS, batch_size=4, score=True, part=(number, of))
        assert done.answers.endswith(f"answers-0000{number}-of-0000{of}.jsonl")
    same(texts(tmp_path / "out"), whole)


def same(found, expected):
    """Scores are those of other batches."""
    strip = lambda text: [{k: v for k, v in row.items() if k != "score"} for row in rows(text)]
    assert strip(found[0]) == strip(expected[0]) and sorted(found[1].split("\n")) == sorted(expected[1].split("\n"))
    assert [row["score"] for row in rows(found[0])] == pytest.approx([row["score"] for row in rows(expected[0])], abs=1e-4)


class Killed(BaseException):
    pass


def test_a_run_killed_after_every_batch_loses_nothing(tiny, data, whole, tmp_path, monkeypatch):
    """What was answered is not asked again: all runs together answer no more batches than one that is not stopped, but for each kill's one."""
    asked, answer = [], type(tiny)._answer
    output, note, resume = tmp_path / "out", OutputFiles.add, False
    monkeypatch.setattr(type(tiny), "_answer", lambda self, *args: asked.append(1) or answer(self, *args))

    def noted(self, records):
        records = list(records)
        note(self, records)
        if len(records) > 1:
            raise Killed

    monkeypatch.setattr(OutputFiles, "add", noted)
    for _ in range(100):
        try:
            predict(tiny, data, output, OPTIONS, batch_size=4, score=True, resume=resume)
            break
        except Killed:
            resume = True
    same(texts(output), whole)
    assert len(asked) == 120 - len(BAD) and not list(output.glob("pending*"))


@pytest.mark.parametrize("step", range(4))
def test_killed_while_a_window_is_settled(tiny, data, whole, tmp_path, monkeypatch, step):
    """Before, between and after the writes, and in the middle of a line."""
    from paligemma_jax.inference import offline_files

    append, calls = offline_files._append, []

    def torn(file, records):
        records = list(records)
        if file.name.startswith(("errors", "answers")):
            calls.append(file.name)
            if len(calls) == step + 1:
                text = b"".join(map(offline_files._encode, records))
                file.open("ab").write(text[: len(text) * 2 // 3])
                raise Killed
        append(file, records)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(offline_files, "_append", torn)
        predict(tiny, data, tmp_path / "out", OPTIONS, batch_size=4, score=True)
    predict(tiny, data, tmp_path / "out", OPTIONS, batch_size=4, score=True, resume=True)
    same(texts(tmp_path / "out"), whole)


def test_a_killed_process(data, whole, tmp_path):
    """SIGKILL, and then to the end."""
    command = [sys.executable, "-m", "paligemma_jax", "predict", "--data", str(data), "--output", str(tmp_path / "out"), "--score", "--resume"]
    command += ["--max-new-tokens", str(NEW), "--batch-size", "4"]
    environment = os.environ | {"PALIGEMMA_JAX_CACHE": str(tmp_path / "cache")}
    folder, kills = tmp_path / "out", 0
    while kills < 1:
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
        while running.poll() is None and sum(path.stat().st_size for path in folder.glob("*.jsonl")) <= before + 500:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        kills += running.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    same(texts(folder), whole)
    told = json.loads(done.stdout)
    assert (told["answered"], told["failed"]) == (120 - len(BAD), len(BAD)) and told["tokens"] < NEW * 110


def test_samples_do_not_depend_on_parts(tiny, data, tmp_path):
    few = data.parent / "few.jsonl"
    few.write_text("\n".join(data.read_text().split("\n")[20:36]))
    for name, part in (("one", (0, 1)), *(("two", (n, 2)) for n in range(2)), ("other", (0, 1))):
        predict(tiny, few, tmp_path / name, DecodingOptions(NEW, Sample(temperature=2.0)), part=part, batch_size=8, seed=100 * (name == "other"))
    assert texts(tmp_path / "one")[0] == texts(tmp_path / "two")[0] != texts(tmp_path / "other")[0]


def test_wrong_requests(command, data, tmp_path):
    def run(*more, output="out"):
        code, _, err = command("predict", "--data", data, "--output", tmp_path / output, "--max-new-tokens", 1, *more)
        return err if code == 2 else code

    small = tmp_path / "in.jsonl"
    small.write_text(json.dumps({"image": str(PHOTO), "prefix": "ocr"}) + "\n")
    assert run("--data", small) == 0
    assert "already contains answers: --resume" in run("--data", small)
    assert "begun with other settings: max_new_tokens was 1, now 2" in run("--data", small, "--max-new-tokens", 2, "--resume")
    assert "sampler was 'Greedy()', now 'Sample(temperature=2.0" in run("--data", small, "--temperature", 2, "--resume")
    assert "seed was 0, now 5" in run("--data", small, "--seed", 5, "--resume") and "'stop': ('9',)" in run("--data", small, "--stop", 9, "--resume")
    assert "rows was 1, now 120" in run("--resume") or "data" in run("--resume")
    assert run("--data", small, "--resume") == 0 and len(rows(texts(tmp_path / "out")[0])) == 1
    assert "no such file" in run("--data", "none.jsonl")
    (nothing := tmp_path / "nothing.jsonl").write_text(json.dumps({"image": "none.png", "prefix": "ocr"}) + "\n")
    assert f"no row could be answered: {tmp_path / 'none' / 'errors.jsonl'} says why" in run("--data", nothing, output="none")
    assert "min_new_tokens is 2" in run("--min-new-tokens", 2, output="other") and "stop is ('',)" in run("--stop", "", output="other")
    assert f"a seed is {2**40}:" in run("--data", small, "--seed", 2**40, output="seeds") and not (tmp_path / "seeds").exists()
    assert "at least 1" in run("--batch-size", 0, output="other") and not (tmp_path / "other").exists()


def test_no_rows(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    done = predict(tiny, tmp_path / "in.jsonl", tmp_path / "out", OPTIONS)
    assert (done.answered, done.failed) == (0, 0) and texts(tmp_path / "out") == ("", "")


@pytest.mark.slow
def test_a_hundred_thousand_rows(tiny, data, tmp_path):
    """Memory is flat after the first tenth; all rows are there, in order."""
    one = [json.loads(line) for line in data.read_text().split("\n") if line.startswith('{"image": "') and '"id"' in line]
    with (data.parent / "many.jsonl").open("w") as file:
        file.writelines(json.dumps(one[i % len(one)] | {"id": i}) + "\n" for i in range(100_000))
    peaks, note = [], OutputFiles.add

    class Watched(OutputFiles):
        def add(self, records):
            note(self, records)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paligemma_jax.inference.offline.OutputFiles", Watched)
        done = predict(tiny, data.parent / "many.jsonl", tmp_path / "out", DecodingOptions(2), batch_size=64, progress=True)
    print(done, f"{(peaks[-1] - peaks[len(peaks) // 10]) / 1024:.0f} MiB more after the first tenth")
    assert done.answered == 100_000 and peaks[-1] - peaks[len(peaks) // 10] < 50 * 1024
    assert [row["id"] for row in rows(Path(done.answers).read_text())] == list(range(100_000))
