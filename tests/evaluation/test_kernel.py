"""KID against its definition, written as sums over pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vrpo.errors import EvaluationError
from vrpo.evaluation.kernel import kernel_distance


def brute_force(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    n, m = len(first), len(second)
    within_first = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j)
    within_second = sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j)
    between = sum(kernel(x, y) for x in first for y in second)
    return within_first / (n * (n - 1)) + within_second / (m * (m - 1)) - 2 * between / (n * m)


def test_whole_sets_match_the_double_sum(random: np.random.Generator) -> None:
    first, second = random.standard_normal((20, 7)), random.standard_normal((20, 7)) + 0.5

    distance = kernel_distance(torch.from_numpy(first), second, subsets=3, subset_size=20)

    assert distance.mean == pytest.approx(brute_force(first, second), rel=1e-12)
    assert distance.std == pytest.approx(0, abs=1e-12)


def test_subsets_are_the_seeded_draws(random: np.random.Generator) -> None:
    first, second = random.standard_normal((30, 4)), random.standard_normal((50, 4))
    draws = np.random.RandomState(7)
    expected = [
        brute_force(first[draws.choice(30, 10, replace=False)], second[draws.choice(50, 10, replace=False)])
        for _ in range(5)
    ]

    distance = kernel_distance(first, second, subsets=5, subset_size=10, seed=7)

    assert distance == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-10)


def test_unbiased_around_zero_for_one_distribution(random: np.random.Generator) -> None:
    features = random.standard_normal((8000, 16))

    same = kernel_distance(features[:4000], features[4000:], subsets=50, subset_size=200)
    shifted = kernel_distance(features[:4000], features[4000:] + 0.3, subsets=50, subset_size=200)

    assert abs(same.mean) < 2 * same.std
    assert shifted.mean > 10 * abs(same.mean)


def test_float32_features_are_summed_in_float64(random: np.random.Generator) -> None:
    first = random.standard_normal((200, 64)).astype(np.float32) + 3
    second = random.standard_normal((200, 64)).astype(np.float32) + 3

    single = kernel_distance(first, second, subsets=1, subset_size=200)
    double = kernel_distance(first.astype(np.float64), second.astype(np.float64), subsets=1, subset_size=200)

    assert single == double


def test_too_few_images_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"subsets of 1000 .* 10 samples and 2000 reference"):
        kernel_distance(torch.ones(10, 3), torch.ones(2000, 3))
    with pytest.raises(EvaluationError, match="3 and 4 dimensions"):
        kernel_distance(torch.ones(10, 3), torch.ones(10, 4), subset_size=5)
