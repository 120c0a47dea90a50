"""The table of published tasks: every row is a valid configuration with sources."""

import shlex

import pytest
import tyro

from paligemma_jax.data.datasets import CONVERTERS
from paligemma_jax.data.recipes import RECIPES, results
from paligemma_jax.data.recipes.figures import Figure
from paligemma_jax.metrics.registry import GROUPS, METRICS
from paligemma_jax.training.config import FinetuneConfig

KNOWN = {*METRICS, *GROUPS}
TRAINED = [name for name, recipe in RECIPES.items() if not recipe.zero_shot_from]

ZERO_SHOT = {"nocaps", "xm3600", "xgqa", "marvl", "countbenchqa", "pope", "mmvp", "objaverse"}


@pytest.mark.parametrize("name", TRAINED)
def test_recipes_are_valid_configurations(name):
    recipe = RECIPES[name]
    for size in recipe.learning_rate or ("3b",):
        for resolution in recipe.resolutions:
            fields = recipe.finetune(size, resolution)
            expected = FinetuneConfig(data="d", output="o", **fields)
            if "batch_size" in fields:
                assert expected.batch_size in (32, 64, 128, 256, 1024)
    size = next(iter(recipe.learning_rate), "3b")
    command = shlex.split(recipe.commands(name, size).splitlines()[0])
    config = tyro.cli(FinetuneConfig, args=command[2:])
    assert config == FinetuneConfig(
        data=config.data, output=config.output, model=config.model, **recipe.finetune(size)
    )
    assert config.model == f"google/paligemma2-{size}-pt-{recipe.resolutions[0]}"
    with pytest.raises(ValueError, match="--resolution must be one of"):
        recipe.finetune(size, 512)


@pytest.mark.parametrize("name", RECIPES)
def test_every_metric_is_computed_or_marked_as_missing(name):
    recipe = RECIPES[name]
    named = {*recipe.metrics, *(result.metric for result in results(name))}
    assert named <= KNOWN | set(recipe.missing_metrics)
    assert bool(recipe.metrics) == (name != "mixture")


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_states_its_sources(name):
    recipe = RECIPES[name]
    text = " ".join(source.figures for source in recipe.sources)
    assert "prompt" in text or name == "mixture"
    assert ("training" in text or "epochs" in text) != bool(recipe.zero_shot_from)
    assert all(source.figures and source.stated_by for source in recipe.sources)


def test_zero_shot_tasks_use_the_model_of_another_task():
    assert set(CONVERTERS) <= set(RECIPES)
    zero_shot = set(RECIPES) - set(TRAINED)
    assert zero_shot == ZERO_SHOT
    for name in zero_shot:
        assert RECIPES[name].zero_shot_from in TRAINED
    with pytest.raises(ValueError, match="zero-shot: fine-tune with the recipe of coco-captions"):
        RECIPES["nocaps"].finetune()
    (command,) = RECIPES["nocaps"].commands("nocaps").splitlines()
    assert "evaluate --recipe nocaps --model coco-captions/model" in command


def test_recipes_have_the_values_of_big_vision():
    textvqa, refcoco, nlvr2 = (
        RECIPES[name].finetune for name in ("textvqa", "refcoco-segment", "nlvr2")
    )
    assert textvqa("3b", 224)["epochs"] == 0.5
    assert textvqa("3b", 448)["epochs"] == 1 and textvqa("3b", 448)["weight_decay"] == 3e-7
    assert refcoco("10b", 896)["batch_size"] == 64 and refcoco("3b", 448)["label_smoothing"] == 0.3
    assert [refcoco("3b", size)["dropout"] for size in (224, 448, 896)] == [0.1, 0.0, 0.0]
    assert nlvr2("3b", 448)["epochs"] == 10 and nlvr2("10b")["learning_rate"] == 1e-6
    assert RECIPES["coco-35l"].finetune("3b")["epochs"] == 0.14  # 25 * 113,287 examples


def test_frozen_parts_are_not_trained():
    assert RECIPES["scienceqa"].finetune()["train"] == "decoder"
    gqa = RECIPES["gqa"].finetune
    assert "train" not in gqa("3b", 224) and gqa("3b", 448)["train"] == "decoder"


def test_what_is_not_published_is_left_out():
    fields = RECIPES["coco-detection"].finetune()
    assert fields["epochs"] == 50 and not {"learning_rate", "batch_size", "dropout"} & set(fields)
    assert RECIPES["grandstaff"].finetune()["steps"] == 30_000


def test_published_results_have_their_spread_and_confirmation():
    human = {result.of: result for result in results("chartqa")}["human"]
    assert human.figures["3b-224"] == Figure(42.0, 0.3, True)
    assert human.figures["28b-448"] == Figure(61.3, 0.6, False)
    assert str(human.figures["28b-448"]) == "61.3 ± 0.6?" and human.title == "test, human"
    assert len(results("refcoco-segment")) == 8
    without = [name for name in RECIPES if not results(name)]
    assert without == ["refcoco-detect", "mixture"]


@pytest.mark.parametrize("name", RECIPES)
def test_results_are_of_sizes_and_pixels_of_the_recipe(name):
    for result in results(name):
        assert result.figures
        for model, figure in result.figures.items():
            size, pixels = model.rsplit("-", 1)
            assert size in ("3b", "10b", "28b", "pg1-3b")
            assert int(pixels) in RECIPES[name].resolutions
            assert 0 < figure.mean < 600 and (figure.deviation or 0) < 2
