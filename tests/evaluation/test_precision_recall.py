"""Precision and recall against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from vrpo.errors import EvaluationError
from vrpo.evaluation import precision_recall as module
from vrpo.evaluation.precision_recall import precision_recall


def brute_force(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    def coverage(points: Tensor, manifold: Tensor) -> float:
        own = cdist(manifold.double(), manifold.double())
        # The smallest distance of each row is the one to itself.
        own.sort(axis=1)
        inside = cdist(points.double(), manifold.double()) <= own[:, k]
        return float(inside.any(axis=1).mean())

    return coverage(samples, reference), coverage(reference, samples)


@pytest.mark.parametrize("block", [16, 50, 100, 2048])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_equals_brute_force_for_any_block(monkeypatch: pytest.MonkeyPatch, block: int, shift: float) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    samples, reference = torch.randn(310, 12) * 0.9 + shift, torch.randn(203, 12)
    expected = brute_force(samples, reference)

    assert precision_recall(samples, reference) == expected
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1


def test_equals_brute_force_for_other_neighbourhoods() -> None:
    samples, reference = torch.randn(100, 6) + 0.5, torch.randn(150, 6)

    assert precision_recall(samples, reference, neighbours=1) == brute_force(samples, reference, 1)
    assert precision_recall(samples, reference, neighbours=7) == brute_force(samples, reference, 7)


def test_features_far_from_the_origin_are_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    # |x|^2 is 1e8 times the distances here: without centring float32 products would keep no digit of them.
    monkeypatch.setattr(module, "_BLOCK", 64)
    samples, reference = torch.randn(200, 8) * 0.1 + 300, torch.randn(200, 8) * 0.1 + 300

    assert precision_recall(samples, reference) == brute_force(samples, reference)


def test_tight_clusters_are_settled_by_exact_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    # Within a cluster squared distances are 1e-8 of the norms, below float32's rounding of a product.
    monkeypatch.setattr(module, "_BLOCK", 64)
    centres = torch.randn(10, 32) * 10
    samples = (centres[:, None] + 1e-3 * torch.randn(10, 30, 32)).flatten(0, 1)
    reference = (centres[:, None] + 1e-3 * torch.randn(10, 25, 32)).flatten(0, 1)
    expected = brute_force(samples, reference)

    measured = precision_recall(samples, reference)

    # Centring rounds the features once in float32, a change of the points themselves and not of the rule.
    assert measured == pytest.approx(expected, abs=0.02)
    shift = reference.double().mean(dim=0)
    rounded = [(features.double() - shift).float() for features in (samples, reference)]
    # Features whose mean is zero in float32 are left as they are: equality is exact.
    rounded[1] = torch.cat([rounded[1], -rounded[1]])
    assert precision_recall(*rounded) == brute_force(*rounded)
    assert 0 < expected[0] < 1


def test_repeated_images_have_balls_of_no_size() -> None:
    reference = torch.randn(40, 5).repeat_interleave(5, dim=0)
    copies, others = reference[::5], reference[::5] + 1e-3

    assert precision_recall(torch.cat([copies, others]), reference).precision == 0.5
    assert precision_recall(reference, reference) == (1.0, 1.0)


def test_a_collapsed_model_has_precision_without_recall() -> None:
    reference = torch.randn(300, 4)
    samples = 0.01 * torch.randn(200, 4)

    measured = precision_recall(samples, reference)

    assert measured == brute_force(samples, reference)
    assert measured.precision > 0.95
    assert measured.recall < 0.05


def test_reduced_matmul_precision_elsewhere_changes_nothing() -> None:
    samples, reference = torch.randn(300, 64), torch.randn(300, 64)
    expected = precision_recall(samples, reference)
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert precision_recall(samples, reference) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(previous)


def test_float32_error_stays_below_the_assumed_bound() -> None:
    for width in (16, 512, 2048):
        first, second = torch.randn(300, width), torch.randn(300, width) * 3
        points = [module._points(x, torch.zeros(width), 3, "cpu") for x in (first, second)]
        exact = torch.cdist(first.double(), second.double()).square()
        rounded = points[1].rows.products(points[0].rows.left(slice(None)), slice(None))

        error = (rounded.double() - exact).abs().amax(dim=1)

        assert (error < module._rounding(points[0].norms, points[1].norms, width) / 2).all()


def test_too_few_images_are_refused() -> None:
    with pytest.raises(EvaluationError, match="more than 3 images and there are 3 samples"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))
    with pytest.raises(EvaluationError, match="2 and 3 dimensions"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 3))
