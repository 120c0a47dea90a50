"""`paligemma-jax scoreboard`: all evaluations of a directory beside the published results."""

import json
import re
from xml.etree import ElementTree

import pytest
from support.mutations import mutations

from paligemma_jax.data.recipes import RECIPES
from paligemma_jax.evaluation.evaluate import evaluate
from paligemma_jax.evaluation.published import PublishedTask
from paligemma_jax.evaluation.scoreboard import read_board
from paligemma_jax.evaluation.scoreboard_html import html, text


@pytest.fixture
def folder(make_cases, tmp_path):
    """Three evaluations: above, below and within the published deviation, in this order."""
    runs = {"a": ("gqa", ["yes"]), "b/c": ("ai2d", ["yes", "no"]), "d": ("nlvr2", ["yes"] * 11)}
    for name, (task, answers) in runs.items():
        answers = [*answers, "no"] if task == "nlvr2" else answers
        published = PublishedTask(task, "3b", 224)
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        about = {"model": "<mine>"}
        cases = make_cases(answers)
        evaluate(cases, ["exact_match"], samples=5, about=about, published=published).save(run)
    return tmp_path / "runs"


def test_results_are_in_the_order_of_the_recipes(folder):
    board = read_board(folder)
    assert [(entry.task, entry.folder) for entry in board.entries] == [
        ("gqa", "a"),
        ("ai2d", "b/c"),
        ("nlvr2", "d"),
    ]
    assert [entry.verdict for entry in board.entries] == ["good", "bad", "good"]
    assert not board.problems and set(board.not_evaluated) == set(RECIPES) - {
        "gqa",
        "ai2d",
        "nlvr2",
    }
    row = board.json()["results"][1]
    assert (row["task"], row["value"], row["mean"], row["z"]) == ("ai2d", 50, 74.7, -49.4)
    assert json.loads(json.dumps(board.json())) == board.json()


def test_the_page_has_a_picture_and_a_table(folder):
    page = html(read_board(folder), "my <board>")
    assert "my &lt;board&gt;" in page and "http" not in page and "3 of 52 tasks" in page
    (picture,) = re.findall(r"<svg.*?</svg>", page)
    drawn = ElementTree.fromstring(picture)
    assert len(drawn.findall("circle")) == 1 and len(drawn.findall("polygon")) == 2
    names = [node.text for node in drawn.findall("text[@class='task']")]
    assert names == ["gqa", "ai2d", "nlvr2"]
    assert page.count("<tr title=") == 3 and "<td class='number good' title='z'>+112.7</td>" in page


def test_a_result_without_deviation_is_drawn_as_its_difference(make_cases, tmp_path):
    published = PublishedTask("vsr", "3b", 224, "random split")
    cases, about = make_cases(["yes"]), {"model": "m"}
    evaluate(cases, ["exact_match"], samples=5, about=about, published=published).save(tmp_path)
    page = html(read_board(tmp_path), "board")
    assert "+18.4, no z</text>" in page and "<circle" not in page


def test_each_evaluation_that_has_no_place_is_one_sentence(folder, command):
    def write(name, content, file="result.json"):
        (folder / name).mkdir()
        (folder / name / file).write_text(content)

    write("broken", "{")
    write("plain", '{"model": "m", "cases": 1}')
    write("half", "", "answers.jsonl")
    published = {"task": "gqa", "size": "", "resolution": 0, "results": [], "note": "no size"}
    write("small", json.dumps({"model": "m", "cases": 1, "published": published}))
    write("new", json.dumps({"model": "m", "cases": 1, "published": published | {"task": "gqb"}}))
    problems = read_board(folder).problems
    endings = [
        "broken/result.json: not readable JSON (input data was truncated)",
        "half is not finished: it has answers, but no result.json",
        "new is of an unknown task, gqb",
        "plain was not evaluated with --recipe",
        "small (gqa): no size",
    ]
    assert [problem.endswith(end) for problem, end in zip(problems, endings, strict=True)] == [
        True
    ] * 5
    code, out, error = command("scoreboard", folder)
    assert (code, error) == (0, "") and out.splitlines()[-5:] == list(problems)


def test_a_result_of_any_json_is_shown_or_named(folder):
    file, shown = folder / "a" / "result.json", 0
    for content in mutations(json.loads(file.read_text())):
        file.write_text(content)
        board = read_board(folder)
        assert len(board.problems) <= 1 and all(len(each) < 400 for each in board.problems)
        assert html(board, "board") and text(board)
        shown += len(board.entries) == 3
    assert shown > 5


def test_the_command_writes_html_and_json(folder, tmp_path, command):
    page = tmp_path / "board.html"
    code, out, error = command("scoreboard", folder, "--html", page)
    assert (code, error) == (0, "") and "<svg" in page.read_text()
    assert out.splitlines()[0].split() == [
        "task",
        "model",
        "split",
        "metric",
        "value",
        "published",
        "difference",
        "z",
    ]
    assert re.search(
        r"^gqa +3b-224 +testdev +exact match +100.0 +66.2 ± 0.3 +\+33.8 +\+112.7$", out, re.M
    )
    _, out, _ = command("scoreboard", folder, "--json")
    assert [row["task"] for row in json.loads(out)["results"]] == ["gqa", "ai2d", "nlvr2"]
    code, _, error = command("scoreboard", tmp_path / "none")
    assert code == 2 and "none: no such directory" in error
    (tmp_path / "empty").mkdir()
    assert "empty has no evaluations" in command("scoreboard", tmp_path / "empty")[2]
    assert "no such directory" in command("scoreboard", folder, "--html", "no/board.html")[2]
