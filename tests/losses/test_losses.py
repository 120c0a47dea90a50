"""Losses against torch, transformers, or the formulas of trl 1.16 in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.on_devices import call

from paligemma_jax.losses import contrastive, preference, tokens

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def t(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def batch(rng):
    """logits of a student and a teacher [2, 9, 40], tokens, and targets: 5 and 3 tokens."""
    student, teacher = rng.normal(0, 3, (2, 2, 9, 40)).astype(np.float32)
    targets = np.arange(9) >= np.array([[4], [6]])
    return student, teacher, rng.integers(0, 40, (2, 9)), targets


def at_targets(x, targets):
    """Rows [n, ...] of positions before a target."""
    return t(x)[:, :-1][torch.tensor(targets[:, 1:])]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_is_that_of_torch(batch, smoothing, z_loss):
    logits, _, ids, targets = batch
    rows = at_targets(logits, targets)
    labels = torch.tensor(ids)[:, 1:][torch.tensor(targets[:, 1:])]
    expected = F.cross_entropy(rows, labels, label_smoothing=smoothing)
    expected = expected + z_loss * (torch.logsumexp(rows, 1) ** 2).mean()
    actual = tokens.cross_entropy(logits, ids, targets, smoothing, z_loss)
    assert float(actual) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_of_torch(batch, temperature):
    student, teacher, _, targets = batch
    log_s, log_t = (
        F.log_softmax(at_targets(x, targets) / temperature, 1) for x in (student, teacher)
    )
    for direction, (p, q) in {"forward": (log_t, log_s), "reverse": (log_s, log_t)}.items():
        expected = F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2
        actual = tokens.distillation(student, teacher, targets, temperature, direction)
        assert float(actual) == pytest.approx(expected.item(), rel=1e-5)


def test_top_k_distillation_is_a_bound_that_closes(batch):
    student, teacher, _, targets = batch
    losses = [
        float(
            tokens.top_k_distillation(
                student, tokens.TopK.of(jnp.asarray(teacher), k, 2.0), targets, 2.0
            )
        )
        for k in (1, 8, 39, 40)
    ]
    full = float(tokens.distillation(student, teacher, targets, 2.0))
    assert losses[0] < losses[1] < losses[2] and losses[0] < 0.9 * full
    assert losses[2] == pytest.approx(full, rel=1e-5)  # one other token is no loss
    assert losses[3] == pytest.approx(full, rel=1e-5)
    same = tokens.TopK.of(jnp.asarray(student), 8)
    gradient = jax.grad(tokens.top_k_distillation)(jnp.asarray(student), same, targets)
    assert np.abs(gradient).max() < 1e-6


def test_clip_loss_is_that_of_transformers(rng):
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = unit(rng, 6, 8), unit(rng, 6, 8)
    expected = image_text_contrastive_loss(t(texts) @ t(images).T * 20.0)
    actual = contrastive.softmax_contrastive(images, texts, 20.0)
    assert float(actual) == pytest.approx(expected.item(), rel=1e-6)


def test_siglip_loss_is_that_of_transformers(rng):
    """The lines of transformers 5.23 `SiglipModel.forward`."""
    images, texts = unit(rng, 6, 8), unit(rng, 6, 8)
    logits = t(texts) @ t(images).T * 10.0 - 4.0
    signs = -torch.ones_like(logits) + 2 * torch.eye(6)
    expected = -F.logsigmoid(signs * logits).sum(-1).mean()
    actual = contrastive.sigmoid_contrastive(images, texts, 10.0, -4.0)
    assert float(actual) == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture
def pairs(rng):
    """Queries [5, 7, 8] and pages [5, 9, 8], with pads."""
    queries, pages = unit(rng, 5, 7, 8), unit(rng, 5, 9, 8)
    query_valid = np.arange(7) < np.array([[7], [5], [3], [6], [1]])
    page_valid = np.arange(9) < np.array([[9], [4], [9], [2], [6]])
    return queries, query_valid, pages, page_valid


def test_similarities_ignore_pads(pairs):
    queries, query_valid, pages, page_valid = pairs
    expected = [
        [
            (t(q)[torch.tensor(qv)] @ t(p)[torch.tensor(pv)].T).max(1).values.sum().item()
            for p, pv in zip(pages, page_valid, strict=True)
        ]
        for q, qv in zip(queries, query_valid, strict=True)
    ]
    np.testing.assert_allclose(contrastive.max_similarity(*pairs), expected, rtol=1e-5)


def test_late_interaction_is_that_of_colpali_engine(pairs):
    """`ColbertLoss` and `ColbertPairwiseCELoss` of colpali-engine, from the scores."""
    scores = t(contrastive.max_similarity(*pairs))
    normalized = scores / t(pairs[1].sum(1, keepdims=True))
    expected = F.cross_entropy(normalized / 0.02, torch.arange(5))
    loss, _ = contrastive.late_interaction(*pairs)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    own = scores.diagonal()
    wrong = (scores - torch.eye(5) * 1e6).max(1).values
    loss, _ = contrastive.late_interaction_pairwise(*pairs)
    assert float(loss) == pytest.approx(F.softplus(wrong - own).mean().item(), rel=1e-5)


def late_interaction_and_gradient(pairs):
    def loss(queries):
        return contrastive.late_interaction(queries, *pairs[1:])[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(pairs[0])
    return [float(value), *np.asarray(gradient).ravel().tolist()]


def eight_pairs():
    rng = np.random.default_rng(1)
    valid = np.arange(6) < rng.integers(1, 7, (2, 8, 1))
    return [unit(rng, 8, 6, 8), valid[0], unit(rng, 8, 6, 8), valid[1]]


def test_negatives_are_those_of_all_devices():
    """One row on each of 8 devices gives the loss and the gradient of one device."""
    expected = late_interaction_and_gradient(eight_pairs())
    np.testing.assert_allclose(call(8, "late_interaction_of_rows"), expected, atol=2e-6)


@pytest.fixture
def answers(rng):
    """Log-probabilities of 6 pairs of answers, under the model and a reference."""
    return [rng.uniform(-30, -1, 6).astype(np.float32) for _ in range(4)]


def test_dpo_is_the_formula_of_trl(answers):
    """`DPOTrainer`, loss_type "sigmoid" (with label smoothing, "robust" without its rescaling), and
    "ipo"."""
    chosen, rejected, reference_chosen, reference_rejected = map(t, answers)
    delta = (chosen - reference_chosen) - (rejected - reference_rejected)
    for smoothing in (0.0, 0.2):
        expected = (
            -F.logsigmoid(0.3 * delta) * (1 - smoothing) - F.logsigmoid(-0.3 * delta) * smoothing
        )
        loss, parts = preference.dpo(*answers, beta=0.3, smoothing=smoothing)
        assert float(loss) == pytest.approx(expected.mean().item(), rel=1e-6)
        assert float(parts["margin"]) == pytest.approx((0.3 * delta).mean().item(), rel=1e-5)
        assert float(parts["accuracy"]) == pytest.approx((delta > 0).double().mean().item())
    lengths = np.array([3.0, 5, 1, 9, 2, 4]), np.array([2.0, 7, 3, 1, 5, 5])
    means = [
        gain / t(n)
        for gain, n in zip(
            (chosen - reference_chosen, rejected - reference_rejected), lengths, strict=True
        )
    ]
    expected = (means[0] - means[1] - 1 / (2 * 0.3)) ** 2
    loss, _ = preference.dpo(*answers, beta=0.3, form="ipo", lengths=lengths)
    assert float(loss) == pytest.approx(expected.mean().item(), rel=1e-6)


def test_orpo_is_the_formula_of_trl(rng):
    """`ORPOTrainer.odds_ratio_loss`, from very likely answers to very unlikely ones."""
    chosen = np.array([-1e-4, -0.01, -0.5, -2.0, -9.0], np.float32)
    rejected = np.array([-0.02, -4.0, -0.3, -2.5, -12.0], np.float32)
    a, b = t(chosen), t(rejected)
    odds = (a - b) - (torch.log1p(-torch.exp(a)) - torch.log1p(-torch.exp(b)))
    expected = 1.5 - 0.25 * F.logsigmoid(odds).mean()
    loss, parts = preference.orpo(chosen, rejected, jnp.float32(1.5), beta=0.25)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert float(parts["odds"]) == pytest.approx(odds.mean().item(), rel=1e-4)
    gradient = jax.grad(lambda x: preference.orpo(x, rejected, jnp.float32(0))[0])(chosen)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(form="ipo"), "lengths must be given with form='ipo', got None"),
        (dict(form="hinge"), "form must be 'sigmoid' or 'ipo', got 'hinge'"),
    ],
)
def test_a_wrong_form_is_one_sentence(answers, options, message):
    with pytest.raises(ValueError, match=message):
        preference.dpo(*answers, **options)
