"""Logistic regression: the conditions its solution meets, a closed form, and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lilt.evaluate import logistic
from lilt.evaluate.logistic import Logistic, fit_logistic


def case(rows: int = 60, width: int = 5, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    spots = torch.randn(classes, width, generator=generator)
    return spots[labels] + torch.randn(rows, width, generator=generator) + 3, labels


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, penalty: float) -> Tensor:
    logits = x @ weight.T + bias
    return torch.nn.functional.cross_entropy(logits, y) + penalty / 2 * weight.square().sum()


@pytest.mark.parametrize("penalty", [10.0, 0.1, 1e-3, 1e-5])
def test_no_step_from_the_solution_leads_downhill(penalty: float) -> None:
    features, labels = case()
    found = fit_logistic(features, labels, 4, penalty)
    x = (features.double() - found.mean) / found.spread
    torch.testing.assert_close(x.mean(0), torch.zeros(5).double())
    torch.testing.assert_close(x.square().mean(0), torch.ones(5).double())
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    gradients = torch.autograd.grad(objective(weight, bias, x, labels, penalty), [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-7
    # convex: a flat place is the lowest, and a start elsewhere ends there too
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4, 6, generator=generator).double()
    again = fit_logistic(
        features, labels, 4, penalty, Logistic(start[:, :5], start[:, 5], found.mean + 1, found.spread)
    )
    # shares, as a shift of all logits together costs next to nothing
    torch.testing.assert_close(again(features).softmax(1), found(features).softmax(1), rtol=0, atol=1e-4)


def test_a_solution_is_moved_to_other_features() -> None:
    features, labels = case()
    found = fit_logistic(features, labels, 4, 0.1)
    mean, spread = torch.randn(5).double(), torch.rand(5).double() + 0.5
    moved = logistic._moved(found, mean, spread)
    torch.testing.assert_close(Logistic(moved[:, :5], moved[:, 5], mean, spread)(features), found(features))


def test_features_that_say_nothing_give_the_shares_of_the_classes() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    found = fit_logistic(torch.full((10, 3), 7.0), labels, 3, 0.1)
    logits = found(torch.full((1, 3), 7.0))[0]
    torch.testing.assert_close(logits.softmax(0), torch.tensor([0.6, 0.3, 0.1]).double(), atol=1e-6, rtol=0)


def test_one_feature_of_two_values_has_a_closed_form() -> None:
    # 3 of 4 at x = 1 and 1 of 4 at x = -1 are of class 1: the log odds are ± log 3, and without a penalty they are met
    features = torch.tensor([[1.0]] * 4 + [[-1.0]] * 4)
    labels = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0])
    found = fit_logistic(features, labels, 2, 1e-9)
    odds = found(features)[:, 1] - found(features)[:, 0]
    torch.testing.assert_close(odds, features.double().flatten() * math.log(3), rtol=1e-4, atol=1e-5)


def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = case()
    whole = fit_logistic(features, labels, 4, 0.01)
    monkeypatch.setattr(logistic, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(fit_logistic(features, labels, 4, 0.01).weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_a_feature_that_never_varies_does_no_harm() -> None:
    features, labels = case()
    features[:, 2] = 5.0
    found = fit_logistic(features, labels, 4, 0.01)
    assert found(features).isfinite().all()
    assert float(found.weight[:, 2].abs().max()) < 1e-6


def test_scale_and_shift_of_the_features_change_nothing() -> None:
    features, labels = case()
    found = fit_logistic(features, labels, 4, 0.01)
    other = features * torch.tensor([1.0, 100.0, 0.01, 5.0, 1.0]) + 20
    torch.testing.assert_close(
        fit_logistic(other, labels, 4, 0.01)(other).softmax(1), found(features).softmax(1), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
def test_the_answer_is_that_of_scikit_learn(penalty: float) -> None:
    features, labels = case(rows=80, width=6)
    found = fit_logistic(features, labels, 4, penalty)
    x = ((features.double() - found.mean) / found.spread).numpy()
    # its C weighs the sum over samples against half the squared norm
    peer = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10000).fit(x, labels.numpy())
    expected = torch.from_numpy(peer.predict_log_proba(x))
    torch.testing.assert_close(found(features).log_softmax(1), expected, rtol=1e-4, atol=1e-4)
