"""Linear probes: what a linear classifier reads out of frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vrpo.errors import EvaluationError

DECAY = 1e-3
_STEPS = 200


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, num_classes: int, decay: float = DECAY
) -> float:
    """Return the accuracy on ``test`` (M, D) of logistic regression fitted to ``train`` (N, D).

    Features are standardised by the training set. The loss is the mean cross-entropy plus ``decay`` / 2 times the
    squared weights, minimised to convergence by L-BFGS from zero, so the result has no seed. Labels are int64.
    Raises EvaluationError where the training labels are of fewer than two classes.
    """
    if len(train_labels.unique()) < 2:
        raise EvaluationError("A linear probe needs training images of at least two classes; give more images.")
    weight, bias, mean, scale = fit_probe(train, train_labels, num_classes=num_classes, decay=decay)
    logits = (test.to(weight) - mean) / scale @ weight.T + bias
    return float((logits.argmax(dim=1) == test_labels.to(logits.device)).double().mean())


def fit_probe(
    train: Tensor, labels: Tensor, *, num_classes: int, decay: float = DECAY
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights (classes, D), biases (classes,), and the mean and scale (D,) of the features, in float64."""
    features = train.double()
    mean, scale = features.mean(dim=0), features.std(dim=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)  # constant features say nothing
    features = (features - mean) / scale
    labels = labels.to(features.device)
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
    weight.requires_grad_()
    bias.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, tolerance_grad=1e-6, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return weight.detach(), bias.detach(), mean, scale
