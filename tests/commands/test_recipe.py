"""`paligemma-jax recipe`."""

import json

from paligemma_jax.data.recipes import RECIPES


def test_without_a_name_all_tasks_are_listed_in_columns(command):
    code, out, error = command("recipe")
    lines = out.splitlines()
    assert (code, error) == (0, "") and [line.split()[0] for line in lines] == list(RECIPES)
    column = lines[0].index("questions about text")
    for line, recipe in zip(lines, RECIPES.values(), strict=True):
        assert line[column:] == recipe.about
    code, out, _ = command("recipe", "--json")
    assert code == 0 and list(json.loads(out)) == list(RECIPES)


def test_a_recipe_is_shown_with_its_sources_results_and_commands(command):
    _, out, _ = command("recipe", "infovqa", "--size", "10b", "--resolution", "448")
    assert (
        "confirmed by big_vision infovqa" in out and "longest answer: big_vision infovqa ?" in out
    )
    assert "448: 3b 37.5 ± 0.3, 10b 47.8 ± 0.2?" in out and "anls, val (report 2, table 13)" in out
    assert "--batch-size 128 --learning-rate 6e-07" in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("paligemma-jax"))
    _, out, _ = command("recipe", "coco-detection")
    assert "batch size not published" in out and "learning rate  not published" in out
    _, out, _ = command("recipe", "xgqa")
    assert "zero-shot, with the model of gqa" in out and "finetune" not in out


def test_metrics_that_are_not_computed_are_named(command):
    _, out, _ = command("recipe", "docci")
    assert "no metric here non_entailment" in out
    _, out, _ = command("recipe", "okvqa")
    assert "no metric here" not in out


def test_json_has_the_row_its_results_and_the_commands(command):
    _, out, _ = command("recipe", "chartqa", "--json")
    row = json.loads(out)
    assert row["name"] == "chartqa" and row["finetune"]["dropout"] == 0.1
    figure = row["published"][1]["figures"]["3b-448"]
    assert figure == {"mean": 54.0, "deviation": 0.6, "confirmed": True}
    assert [line.split()[1] for line in row["commands"]] == ["finetune", "evaluate"]


def test_an_unknown_task_is_one_sentence_with_near_matches(command):
    code, _, error = command("recipe", "textvqua")
    assert code == 2 and error.count("\n") == 1
    assert "got textvqua: did you mean textvqa or " in error
    code, _, error = command("recipe", "zzzzz")
    assert code == 2 and "did you mean" not in error
    code, _, error = command("recipe", "okvqa", "--resolution", "300")
    assert code == 2 and "--resolution must be one of 224, 448, got 300" in error
