"""Confidence intervals of metrics, and of the difference of two runs."""

import numpy as np
import pytest

from paligemma_jax.metrics.bootstrap import difference, interval
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.metrics.scores import mean


def test_intervals_contain_the_true_value_95_times_in_100():
    rng = np.random.default_rng(0)
    runs = [interval(mean(rng.random(80) < 0.7), samples=200, seed=i) for i in range(300)]
    assert 0.9 < np.mean([run.low <= 0.7 <= run.high for run in runs]) < 0.98
    assert all(run.low <= run.value <= run.high for run in runs)


def test_paired_runs_show_what_single_intervals_hide():
    """Two runs differ in 8 of 100 cases, all of them better in one run."""
    rng = np.random.default_rng(0)
    theirs = rng.random(100) < 0.7
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:8]] = True
    assert interval(mean(ours)).low < interval(mean(theirs)).high  # the intervals overlap
    better = difference(mean(ours), mean(theirs))
    assert better.value == pytest.approx(0.08) and better.low > 0 and better.p < 0.01
    worse = difference(mean(theirs), mean(ours))
    assert worse.value == -better.value and worse.high < 0 and worse.p == better.p
    assert difference(mean(ours), mean(ours)).p == 1


def test_p_values_of_equal_runs_are_seldom_small():
    rng = np.random.default_rng(1)
    p = [
        difference(mean(rng.random(60)), mean(rng.random(60)), samples=200, seed=i).p
        for i in range(200)
    ]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.1


def test_a_kind_of_question_is_resampled_among_its_own_cases():
    scores = mean([1.0] * 50 + [0.0] * 50)
    first = interval(scores, members=range(50))
    assert (first.value, first.low, first.high) == (1, 1, 1)
    mixed = interval(scores, members=range(40, 60))
    assert mixed.value == 0.5 and mixed.low < 0.4 and mixed.high > 0.6


# ---- Wilson's interval where all cases score 0, or all 1


def percent(scores, **options):
    result = interval(scores, **options)
    return tuple(round(100 * x, 1) for x in (result.value, result.low, result.high))


@pytest.mark.parametrize("name", ["exact_match", "pope_accuracy", "anls", "rsvqa"])
def test_sixty_of_sixty_correct(name):
    labels, wrong = ["yes", "no"] * 30, ["no", "yes"] * 30
    assert percent(METRICS[name].scores(labels, labels)) == (100, 94.0, 100)
    assert percent(METRICS[name].scores(wrong, labels)) == (0, 0, 6.0)


def test_wilson_counts_the_cases_of_the_metric():
    """Precision has 20 positive predictions, recall 30 positive references; AP ignores images
    without objects."""
    labels = ["yes"] * 30 + ["no"] * 30
    answers = ["yes"] * 20 + ["no"] * 40
    assert percent(METRICS["pope_precision"].scores(answers, labels)) == (100, 83.9, 100)
    assert percent(METRICS["pope_recall"].scores(["no"] * 60, labels)) == (0, 0, 11.4)
    assert percent(METRICS["pope_f1"].scores(labels, labels)) == (100, 88.6, 100)
    accuracy = METRICS["pope_accuracy"].scores(answers, labels)
    assert percent(accuracy, members=range(20)) == (100, 83.9, 100)
    assert percent(accuracy, members=range(20, 30)) == (0, 0, 27.8)
    empty = METRICS["average_precision"].scores([[]] * 60, [[]] * 60)
    assert np.isnan(interval(empty).value)


def test_one_error_in_sixty_is_bootstrapped():
    scores = METRICS["exact_match"].scores(["a"] * 60, ["a"] * 59 + ["b"])
    result, plain = interval(scores), interval(mean(scores.each))
    assert result == plain and result.low > 0.94 and result.high == 1


def test_metrics_without_bounds_are_bootstrapped():
    assert percent(METRICS["characters"].scores(["a"] * 60, [""] * 60)) == (100, 100, 100)
