"""Offline runs: order, errors by row, parts, and runs that are killed at any moment."""

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
from support.mutations import mutations
from support.paths import ROOT

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.inference import offline_files
from paligemma_jax.inference.offline import predict
from paligemma_jax.inference.offline_files import OutputFiles
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampling import Sample

PHOTO = TINY.parent / "digits.jpg"
TASKS = ["caption en", "ocr", "answer en how many digits?", "detect 3", "detect 8", "count"]
NEW = 6
OPTIONS = DecodingOptions(NEW)
ROWS = 120
ERRORS = {  # by row
    3: "not readable JSON",
    17: "prefix is missing",
    40: "none.png",
    41: "broken.jpg",
    42: "<image>",
    80: "exceed the context of 8192",
    119: "not readable JSON (\\ud800 is half of a surrogate pair)",
}


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.offline.WINDOW", 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 rows in 128 lines: twelve images, some blank lines, seven rows without an answer."""
    folder = tmp_path_factory.mktemp("data")
    photo = Image.open(PHOTO)
    for i in range(12):
        crop = photo.crop((10 * i, 5 * i, 640 - 5 * i, 480))
        crop.resize((112, 112)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(PHOTO.read_bytes()[:5000])
    rows = [
        {"image": f"{i * 7 % 12}.png", "prefix": TASKS[i * 5 % 6], "id": i, "note": "ü\u2028"}
        for i in range(ROWS)
    ]
    rows[17] = {"image": "0.png"}
    rows[40] = {"image": "none.png", "prefix": "ocr"}
    rows[41] = {"image": "broken.jpg", "prefix": "ocr"}
    rows[42] = {"image": "1.png", "prefix": "<image><image> ocr"}
    rows[50] = {"image": ["1.png", "2.png"], "prefix": "<image>ocr<image>", "suffix": "kept"}
    rows[80] = {"image": "1.png", "prefix": "word " * 9000}
    texts = [json.dumps(row) for row in rows]
    texts[3] = "{not json"
    texts[119] = '{"image": "1.png", "prefix": "\\ud800"}'
    lines = [
        line for i, text in enumerate(texts) for line in ([text, ""] if i % 15 == 0 else [text])
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder / "in.jsonl"


@pytest.fixture(scope="module")
def uninterrupted(tiny, data, tmp_path_factory):
    """The texts of answers.jsonl and errors.jsonl of a run that is not interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    predict(tiny, data, output, OPTIONS, batch_size=4, score=True)
    return texts(output)


def texts(output):
    """The contents of the answers files, and of the errors files."""
    names = ("answers*.jsonl", "errors*.jsonl")
    return tuple("".join(path.read_text() for path in sorted(output.glob(n))) for n in names)


def rows(text):
    return [json.loads(line) for line in text.split("\n")[:-1]]


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def check_same(output, expected):
    """Compare answers and errors exactly, and scores within the rounding of other batches."""
    answers, errors = texts(output)
    ours, theirs = rows(answers), rows(expected[0])
    assert [without(row, "score") for row in ours] == [without(row, "score") for row in theirs]
    assert sorted(errors.split("\n")) == sorted(expected[1].split("\n"))
    scores = [row["score"] for row in theirs]
    assert [row["score"] for row in ours] == pytest.approx(scores, abs=1e-4)


def test_rows_come_back_in_order_with_their_answers(tiny, data, uninterrupted):
    answers = rows(uninterrupted[0])
    lines = list(filter(None, data.read_text().split("\n")))
    given = [json.loads(line) for i, line in enumerate(lines) if i not in ERRORS]
    assert [without(row, "answer", "score") for row in answers] == given
    for row in [*answers[::37], next(row for row in answers if "suffix" in row)]:
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        images = [data.parent / name for name in names]
        (alone,) = tiny.answers([images], [row["prefix"]], NEW)
        assert row["answer"] == alone.text and row["score"] == pytest.approx(alone.score, abs=1e-4)


def test_rows_that_fail_are_reported_with_reasons(data, uninterrupted):
    errors, lines = sorted(rows(uninterrupted[1]), key=lambda e: e["line"]), data.read_text()
    lines = lines.split("\n")
    numbers = [number for number, line in enumerate(lines, 1) if line]
    assert [error["line"] for error in errors] == [numbers[i] for i in ERRORS]
    for error, reason in zip(errors, ERRORS.values(), strict=True):
        assert reason in error["error"]
        line = lines[error["line"] - 1]
        row = error["row"]
        assert row.rstrip() == line if "JSON" in reason else row == json.loads(line)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_join_to_the_complete_run(tiny, data, uninterrupted, tmp_path, parts):
    output = tmp_path / "out"
    for number in reversed(range(parts)):
        part = (number, parts)
        result = predict(tiny, data, output, OPTIONS, batch_size=4, score=True, part=part)
        assert result.answers.endswith(f"answers-0000{number}-of-0000{parts}.jsonl")
    check_same(output, uninterrupted)


class Killed(BaseException):
    pass


def test_a_run_killed_after_every_batch_loses_nothing(
    tiny, data, uninterrupted, tmp_path, monkeypatch
):
    """No row is answered twice, except those of the batch interrupted by a kill."""
    answered, add = [], OutputFiles.add
    output, resume = tmp_path / "out", False
    batches = type(tiny).batches

    def counted_batches(self, *args, **options):
        for batch in batches(self, *args, **options):
            answered.extend(answer for answer in batch.values() if not answer.error)
            yield batch

    def add_and_die(self, records):
        records = list(records)
        add(self, records)
        if len(records) > 1:
            raise Killed

    monkeypatch.setattr(type(tiny), "batches", counted_batches)
    monkeypatch.setattr(OutputFiles, "add", add_and_die)
    for _ in range(100):
        try:
            predict(tiny, data, output, OPTIONS, batch_size=4, score=True, resume=resume)
            break
        except Killed:
            resume = True
    check_same(output, uninterrupted)
    assert len(answered) == ROWS - len(ERRORS) and not list(output.glob("pending*"))


@pytest.mark.parametrize("step", range(4))
def test_a_run_killed_while_a_window_is_committed(
    tiny, data, uninterrupted, tmp_path, monkeypatch, step
):
    """It is killed before, between and after the writes, and in the middle of a line."""
    append, calls = offline_files._append, []

    def torn_append(file, records):
        records = list(records)
        if file.name.startswith(("errors", "answers")):
            calls.append(file.name)
            if len(calls) == step + 1:
                text = b"".join(map(offline_files._encode, records))
                with file.open("ab") as out:
                    out.write(text[: len(text) * 2 // 3])
                raise Killed
        append(file, records)

    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(offline_files, "_append", torn_append)
        predict(tiny, data, output, OPTIONS, batch_size=4, score=True)
    predict(tiny, data, output, OPTIONS, batch_size=4, score=True, resume=True)
    check_same(output, uninterrupted)


@pytest.mark.thorough
def test_a_killed_process_is_resumed(data, uninterrupted, tmp_path):
    """A run is killed by SIGKILL, then resumed to the end."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "paligemma_jax", "predict", "--score", "--resume"]
    command += ["--data", str(data), "--output", str(output)]
    command += ["--max-new-tokens", str(NEW), "--batch-size", "4"]
    environment = os.environ | {"PALIGEMMA_JAX_CACHE": str(tmp_path / "cache")}

    def size():
        return sum(path.stat().st_size for path in output.glob("*.jsonl"))

    code = 0
    while code != -signal.SIGKILL:
        before, null = size(), subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=null, stderr=null)
        while process.poll() is None and size() <= before + 500:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    check_same(output, uninterrupted)
    result = json.loads(done.stdout)
    assert (result["answered"], result["failed"]) == (ROWS - len(ERRORS), len(ERRORS))
    assert result["tokens"] < NEW * 110


def test_without_a_terminal_progress_is_plain_lines(tiny, tmp_path, capfd):
    data = tmp_path / "in.jsonl"
    data.write_text((json.dumps({"image": str(PHOTO), "prefix": "ocr"}) + "\n") * 3)
    predict(tiny, data, tmp_path / "out", OPTIONS, batch_size=2)
    error = capfd.readouterr().err
    assert "3/3" in error and "tokens_s=" in error and "row/s" in error
    assert "left" in error and "\r" not in error


def test_samples_do_not_depend_on_parts(tiny, data, tmp_path):
    few = data.parent / "few.jsonl"
    few.write_text("\n".join(data.read_text().split("\n")[20:36]))
    options = DecodingOptions(NEW, Sample(temperature=2.0))

    def sample(name, part=(0, 1), seed=0):
        predict(tiny, few, tmp_path / name, options, part=part, batch_size=8, seed=seed)
        return texts(tmp_path / name)[0]

    complete = sample("complete")
    sample("parts", part=(0, 2))
    assert sample("parts", part=(1, 2)) == complete != sample("other seed", seed=100)


def test_wrong_requests_are_refused(command, data, tmp_path):
    def run(*options, output="out"):
        code, _, error = command(
            "predict",
            *("--data", data, "--output", tmp_path / output, "--max-new-tokens", 1),
            *options,
        )
        return error if code == 2 else code

    small, missing = tmp_path / "in.jsonl", tmp_path / "missing.jsonl"
    small.write_text(json.dumps({"image": str(PHOTO), "prefix": "ocr"}) + "\n")
    missing.write_text(json.dumps({"image": "none.png", "prefix": "ocr"}) + "\n")
    assert run("--data", small) == 0
    assert "already contains answers: use --resume" in run("--data", small)
    for flags, change in [
        (("--max-new-tokens", 2), "started with other settings: max_new_tokens was 1, now 2"),
        (("--temperature", 2), "sampler was 'Greedy()', now 'Sample(temperature=2.0"),
        (("--seed", 5), "seed was 0, now 5"),
        (("--stop", 9), "stop was [], now ['9']"),
    ]:
        assert change in run("--data", small, *flags, "--resume")
    assert "rows was 1, now 120" in run("--resume")
    assert run("--data", small, "--resume") == 0 and len(rows(texts(tmp_path / "out")[0])) == 1
    assert "no such file" in run("--data", "none.jsonl")
    error = run("--data", missing, output="none")
    assert "no row could be answered" in error
    assert str(tmp_path / "none" / "errors.jsonl") in error
    assert "min_new_tokens must be an integer from 0" in run("--min-new-tokens", 2, output="new")
    assert "stop must be a non-empty text" in run("--stop", "", output="new")
    assert "seeds must be 32-bit integers" in run("--data", small, "--seed", 2**40, output="new")
    assert "at least 1" in run("--batch-size", 0, output="new")
    assert not (tmp_path / "new").exists()


def test_fields_of_a_row_are_kept(tiny, tmp_path):
    """A row with an answer, a score or pieces of its own keeps them."""
    own = {"answer": 4, "score": "good", "pieces": None, "error": "none", "line": 1}
    row, other = {"image": str(PHOTO), "prefix": "ocr"}, {"prediction": "x"}
    lines = (row | own, row, row | other, row | own | other)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    predict(tiny, tmp_path / "in.jsonl", tmp_path / "out", OPTIONS, score=True, pieces=True)
    first, second, third = rows(texts(tmp_path / "out")[0])
    model = {name: second[name] for name in ("answer", "score", "pieces")}
    assert second == row | model and third == row | other | model
    predictions = {f"prediction_{name}": model[name] for name in ("score", "pieces")}
    assert first == row | own | predictions | {"prediction": model["answer"]}
    (error,) = rows(texts(tmp_path / "out")[1])
    assert "must not have a field prediction" in error["error"]


def test_damaged_files_of_a_run_are_refused_with_their_line(tmp_path):
    record = {"line": 1, "error": "gone", "row": {"image": "a.png"}}
    contents = {"config.json": {"rows": 1}, "errors.jsonl": record, "pending.jsonl": record}
    for name, content in contents.items():
        for text in mutations(content):
            for other in contents:
                (tmp_path / other).unlink(missing_ok=True)
            (tmp_path / name).write_text(text + "\n")
            try:
                OutputFiles(tmp_path, 0, 1).begin({"rows": 1}, resume=True)
            except ValueError as error:
                assert str(tmp_path) in str(error) and len(str(error)) < 500


def test_no_rows(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    result = predict(tiny, tmp_path / "in.jsonl", tmp_path / "out", OPTIONS)
    assert (result.answered, result.failed) == (0, 0) and texts(tmp_path / "out") == ("", "")


@pytest.mark.slow
def test_a_hundred_thousand_rows(tiny, data, tmp_path):
    """Memory is flat after the first tenth; all rows are answered, in order."""
    lines = data.read_text().split("\n")
    valid = [json.loads(x) for x in lines if x.startswith('{"image": "') and '"id"' in x]
    many = data.parent / "many.jsonl"
    with many.open("w") as file:
        for i in range(100_000):
            file.write(json.dumps(valid[i % len(valid)] | {"id": i}) + "\n")
    peaks, add = [], OutputFiles.add

    def measured_add(self, records):
        add(self, records)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFiles, "add", measured_add)
        options = DecodingOptions(2)
        result = predict(tiny, many, tmp_path / "out", options, batch_size=64, progress=True)
    growth = peaks[-1] - peaks[len(peaks) // 10]
    print(result, f"{growth / 1024:.0f} MiB more after the first tenth")
    assert result.answered == 100_000 and growth < 50 * 1024
    ids = [row["id"] for row in rows(Path(result.answers).read_text())]
    assert ids == list(range(100_000))
