"""Multinomial logistic regression with an L2 penalty, solved exactly by L-BFGS.

The problem is convex, so any solver that converges gives the same answer: torch's needs no further library and runs
where the features are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 16384


@dataclass(frozen=True)
class Logistic:
    """A linear classifier on standardised features: weight (C, W), bias (C,), and the mean and spread (W,) of each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits (N, C)."""
        return (features.to(self.mean) - self.mean) / self.spread @ self.weight.T + self.bias


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, penalty: float, start: Logistic | None = None, steps: int = 1000
) -> Logistic:
    """Minimise mean cross-entropy + penalty / 2 * |weight|^2 over features (N, W) with classes (N,), in float64.

    Features are standardised by their own mean and spread, so that one penalty means the same for any tower; the bias
    is not penalised. start: where to begin, such as the solution for another penalty.
    """
    x = features.double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 1e-9 * spread.max().clamp(min=1e-300), spread, torch.ones_like(spread))
    x = (x - mean) / spread
    width = x.shape[1]
    theta = torch.zeros(classes, width + 1, dtype=x.dtype, device=x.device)
    if start is not None:
        theta.copy_(_moved(start, mean, spread))
    theta.requires_grad_()
    solver = torch.optim.LBFGS(
        [theta], max_iter=steps, tolerance_grad=1e-8, tolerance_change=1e-15, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        loss, theta.grad = _loss_and_gradient(theta.detach(), x, labels, penalty)
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    solved = theta.detach()
    return Logistic(solved[:, :width], solved[:, width], mean, spread)


def _moved(start: Logistic, mean: Tensor, spread: Tensor) -> Tensor:
    """Write a classifier for features of another mean and spread."""
    weight = start.weight * (spread / start.spread)
    bias = start.bias + start.weight @ ((mean - start.mean) / start.spread)
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def _loss_and_gradient(theta: Tensor, x: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the objective and its gradient; so many rows at a time, as the logits (N, C) would fill the memory."""
    weight, bias = theta[:, :-1], theta[:, -1]
    loss = penalty / 2 * weight.square().sum()
    gradient = torch.zeros_like(theta)
    gradient[:, :-1] = penalty * weight
    for rows, right in zip(x.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        logits = rows @ weight.T + bias
        log_p = logits.log_softmax(1)
        loss = loss - log_p.gather(1, right.unsqueeze(1)).sum() / len(x)
        excess = log_p.exp()
        excess[torch.arange(len(right), device=x.device), right] -= 1
        gradient[:, :-1] += excess.T @ rows / len(x)
        gradient[:, -1] += excess.sum(0) / len(x)
    return loss, gradient
