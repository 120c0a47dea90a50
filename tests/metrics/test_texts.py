"""Error rates, Rouge-L, pairs and tables against published code.

golden/metrics_texts.json contains the output of published code for random cases: teds (prediction,
reference, TEDS, TEDS of structure) from src/metric.py of ibm-aur-nlp/PubTabNet at afcdefd, and
error_rates (predictions, references, CER, SER, LER in percent) from eval_functions.py of
antoniorv6/SMT at 8ffde90. Rouge-L is compared live.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from support.paths import GOLDEN

from paligemma_jax.metrics.registry import METRICS, metric_names

CASES = json.loads((GOLDEN / "metrics_texts.json").read_text(encoding="utf-8"))


def test_tables_are_scored_as_published():
    cases = CASES["teds"]
    predictions, references, expected, structure = map(list, zip(*cases, strict=True))
    assert len(cases) >= 200 and len(set(expected)) > 50
    for name, values in (("teds", expected), ("s_teds", structure)):
        scores = METRICS[name].scores(predictions, references)
        np.testing.assert_allclose(scores.each, values, atol=1e-9)
        assert scores.value() == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize("text", ["", " ", "no table", "<table", "\x00", "<html><body><p>x</body>"])
def test_a_text_without_a_table_scores_nothing(text):
    table = "<html><body><table><tr><td>1</td></tr></table></body></html>"
    assert METRICS["teds"]([text], [table]) == 0
    assert METRICS["teds"]([table], [table]) == 1


def test_a_span_that_is_no_number_is_one():
    page = "<html><body><table><tr><td{}>1</td></tr></table></body></html>"
    wrong, plain = page.format(' colspan="wide"'), page.format("")
    assert METRICS["teds"]([wrong], [plain]) == 1


def test_error_rates_are_those_published():
    assert len(CASES["error_rates"]) >= 50
    for predictions, references, *expected in CASES["error_rates"]:
        rates = [100 * METRICS[name](predictions, references) for name in ("cer", "ser", "ler")]
        np.testing.assert_allclose(rates, expected, atol=1e-9)


def test_edits_of_all_cases_count_together():
    """Not the mean of the rates of each case."""
    cer = METRICS["cer"]
    assert cer(["abcd", "x"], ["abcd", "y"]) == pytest.approx(1 / 5)
    assert cer(["b"], [["a", "b"]]) == 0  # the nearest reference
    np.testing.assert_allclose(cer.scores(["abcd", "x"], ["abcd", "y"]).each, [0, 1])
    with pytest.raises(ValueError, match="needs references that are not empty"):
        cer(["a"], [""])


def test_rouge_is_that_of_pycocoevalcap():
    rouge = pytest.importorskip(
        "pycocoevalcap.rouge.rouge", reason="the reference is pycocoevalcap: install the extra test"
    )
    rng, words = (
        np.random.default_rng(0),
        ["a", "cat", "sits", "on", "the", "mat", ".", "dog", "runs"],
    )

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 12)))

    predictions = [text() for _ in range(300)]
    references = [[text() for _ in range(rng.integers(1, 5))] for _ in range(300)]
    published = rouge.Rouge()
    expected = [
        published.calc_score([prediction], texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    scores = METRICS["rouge_l"].scores(predictions, references)
    np.testing.assert_allclose(scores.each, expected, atol=1e-9)
    assert min(expected) == 0 or len(set(expected)) > 50


def test_both_answers_of_a_pair_must_be_right():
    pairs = METRICS["mmvp_pairs"]
    assert pairs(["a", "b", "a", "b"], ["a", "b", "a", "a"]) == 0.5
    with pytest.raises(ValueError, match="needs pairs of rows, got 3 rows"):
        pairs(["a"] * 3, ["a"] * 3)


@pytest.mark.parametrize(
    "metric,package", [("bleu", "sacrebleu"), ("cer", "rapidfuzz"), ("teds", "apted")]
)
def test_a_missing_package_is_named_before_anything_is_answered(monkeypatch, metric, package):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs {package}: pip install 'paligemma-jax\[eval\]'"
    with pytest.raises(ValueError, match=message):
        metric_names([metric])
