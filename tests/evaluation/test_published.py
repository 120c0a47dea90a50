"""Evaluations beside the published results of their task."""

import json

import pytest

from paligemma_jax.evaluation.evaluate import evaluate
from paligemma_jax.evaluation.html import html
from paligemma_jax.evaluation.published import PublishedTask, published_model
from paligemma_jax.evaluation.report import markdown
from paligemma_jax.model.config import PRESETS, with_resolution


def compared(cases, metric, *about, **options):
    published = PublishedTask(*about)
    return evaluate(cases, [metric], samples=5, published=published, **options).published


def test_the_difference_and_z_are_in_the_unit_of_the_paper(make_cases):
    cases = make_cases(["yes"] * 3 + ["no"])
    (result,) = compared(cases, "exact_match", "gqa", "3b", 224).results
    assert (result.value, result.mean, result.deviation) == (75, 66.2, 0.3)
    assert result.difference == pytest.approx(8.8) and result.z == pytest.approx(
        8.8 / 0.3, abs=1e-4
    )
    assert result.confirmed and str(result) == "75.0, published 66.2 ± 0.3: +8.8, z +29.3"


def test_kinds_and_their_mean_are_compared(make_cases):
    answers, kinds = ["yes", "no", "yes", "yes"], ["de", "de", "en", "ru"]
    cases = make_cases(answers, type=kinds)
    (mean,) = compared(cases, "exact_match", "marvl", "3b", 224).results
    assert mean.value == pytest.approx(100 * (0.5 + 1 + 1) / 3, abs=1e-4)
    (rest,) = compared(cases, "exact_match", "xgqa", "3b", 224).results
    assert rest.value == 75 and rest.split == "test, mean over kinds but en"
    cases = make_cases(["yes", "no"], type=["human", "human"])
    (human,) = compared(cases, "relaxed_accuracy", "chartqa", "10b", 448).results
    assert human.value == 50 and human.mean == 66.4 and not human.confirmed
    cases = make_cases(["yes", "no"], kind=["human", "augmented"])
    both = compared(cases, "relaxed_accuracy", "chartqa", "10b", 448, by="kind").results
    assert {result.split: result.value for result in both} == {
        "test, human": 100,
        "test, augmented": 0,
    }


def test_a_deviation_that_rounds_to_0_gives_no_z(make_cases):
    (result,) = compared(make_cases(["yes"]), "exact_match", "ocr-vqa", "3b", 224).results
    assert result.deviation == 0 and result.z is None and "no z" in str(result)


@pytest.mark.parametrize(
    "about, reason",
    [
        (("gqa", "", 0), "the model is of no published size: --size and --resolution can"),
        (("gqa", "3b", 896), "no results are published for 3b at 896 pixels"),
        (("mixture", "3b", 224), "no results of mixture are published"),
        (("vsr", "3b", 224), "several splits have published results: pass --split 'zero-shot"),
        (("docvqa", "3b", 224), r"not those of the published results: anls \(val\)"),
        (("chartqa", "3b", 224), r"not those of .* relaxed_accuracy \(test, augmented\)"),
    ],
)
def test_a_reason_is_given_where_nothing_is_compared(make_cases, about, reason):
    published = compared(make_cases(["yes"]), "exact_match", *about)
    assert not published.results
    with pytest.raises(ValueError, match=reason):
        raise ValueError(published.note)


def test_published_sizes_are_recognized_at_any_resolution():
    for name, config in PRESETS.items():
        size, _, pixels = name.rpartition("-")
        assert published_model(config) == ((size, int(pixels)) if size else ("", 0))
    assert published_model(with_resolution(PRESETS["3b-224"], 336)) == ("3b", 336)


def test_reports_and_json_have_the_comparison(make_cases, tmp_path):
    about = PublishedTask("vsr", "10b", 224, "random split")
    evaluation = evaluate(make_cases(["yes", "no"]), ["exact_match"], samples=5, published=about)
    page, text = html(evaluation), markdown(evaluation)
    assert "Published results of vsr for 10b at 224 pixels" in page
    assert "<td class=number title=difference>-36.8</td>" in page
    assert "| exact match | random split | 50.0 | 86.8 | -36.8 | – |" in text
    evaluation.save(tmp_path)
    published = json.loads((tmp_path / "result.json").read_text())["published"]
    assert published["task"] == "vsr" and published["results"][0]["difference"] == -36.8
    empty = evaluate(
        make_cases(["yes"]), ["exact_match"], samples=5, published=PublishedTask("gqa")
    )
    assert "the model is of no published size" in html(empty) and "z is the" not in html(empty)


@pytest.fixture
def run(command, make_cases, tmp_path):
    """Run `evaluate` on four answered rows; returns the exit code, its output and its error."""
    rows = [case.row for case in make_cases(["yes", "yes", "yes", "no"])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--data", tmp_path / "data.jsonl", "--answers", tmp_path / "data.jsonl")
    output = ("--output", tmp_path / "out", "--bootstrap", "5")
    return lambda *arguments: command("evaluate", *data, *output, *arguments)


def test_the_recipe_gives_the_metric_and_the_published_result(run, tmp_path):
    code, out, error = run("--recipe", "gqa", "--size", "3b", "--resolution", "224")
    assert (code, error) == (0, "")
    assert "Published results of gqa for 3b at 224 pixels:" in out
    assert "  exact match, testdev: 75.0, published 66.2 ± 0.3: +8.8, z +29.3" in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["recipe"] == "gqa" and result["published"]["results"][0]["mean"] == 66.2
    _, out, _ = run("--recipe", "gqa", "--metric", "relaxed_accuracy")
    assert "relaxed accuracy: 75.0" in out and "the model is of no published size" in out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "--metric needs at least one of vqa, .*; or pass --recipe"),
        (["--recipe", "gqaa"], "--recipe must be .* got gqaa: did you mean gqa or "),
        (["--recipe", "objaverse"], "objaverse is scored by sentence_similarity, which evaluate"),
        (["--recipe", "vsr", "--split", "x"], "--split must be one of 'zero-shot split', 'random"),
        (["--recipe", "mixture", "--split", "x"], "--split must be one of left out"),
        (["--metric", "anls", "--size", "3b"], "--size requires --recipe"),
    ],
)
def test_wrong_flags_are_one_sentence(run, arguments, reason):
    code, _, error = run(*arguments)
    assert code == 2 and error.count("\n") == 1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(error)


def test_the_recipe_decides_on_beams_and_length_unless_flags_do(command, tmp_path, monkeypatch):
    asked = []

    def answer(source, data, folder, options, *rest):
        asked.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("paligemma_jax.commands.evaluate._answer", answer)
    (tmp_path / "data.jsonl").touch()
    base = ("evaluate", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out")
    for flags in ((), ("--beams", "1", "--max-new-tokens", "7")):
        assert "enough" in command(*base, "--recipe", "textcaps", *flags)[2]
    assert "enough" in command(*base, "--metric", "anls")[2]
    (beam, greedy, default) = asked
    assert beam.max_new_tokens == 32 and beam.sampler.width == 3
    assert greedy.max_new_tokens == 7 and type(greedy.sampler).__name__ == "Greedy"
    assert default.max_new_tokens == 128 and type(default.sampler).__name__ == "Greedy"
