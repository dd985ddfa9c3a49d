"""CKNNA against its definition, written densely and as sums over tuples."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.errors import EvaluationError
from vrpo.evaluation import cknna as module
from vrpo.evaluation.cknna import cknna


def kernel(features: Tensor) -> np.ndarray:
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def neighbours(cosines: np.ndarray, k: int) -> np.ndarray:
    """Entry (i, j) says whether j is among the k nearest other rows of i."""
    mask = np.zeros(cosines.shape, dtype=bool)
    for i, row in enumerate(cosines):
        others = [j for j in np.argsort(-row) if j != i]
        mask[i, others[:k]] = True
    return mask


def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012, eq. 5, for matrices of zero diagonal."""
    n = len(k)
    one = np.ones(n)
    value = np.trace(k @ l) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one
    return float(value / (n * (n - 3)))


def definition(first: Tensor, second: Tensor, count: int) -> float:
    k, l = kernel(first), kernel(second)  # noqa: E741
    near_k, near_l = neighbours(k, count), neighbours(l, count)
    both = near_k & near_l
    own = hsic(k * near_k, k * near_k) * hsic(l * near_l, l * near_l)
    return hsic(k * both, l * both) / own**0.5


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("count", [2, 5, 10])
def test_equals_the_dense_definition(monkeypatch: pytest.MonkeyPatch, block: int, count: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    first = torch.randn(60, 5)
    second = torch.cat([first[:, :3], torch.randn(60, 4)], dim=1)

    measured = cknna(first, second, count)

    assert measured == pytest.approx(definition(first, second, count), rel=1e-9)
    assert 0 < measured < 0.98


def test_with_all_neighbours_it_is_unbiased_kernel_alignment() -> None:
    """HSIC as the mean over 4-tuples of different samples, which eq. 5 is a shortcut for."""

    def tuples(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
        terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(len(k)), 4)]
        return float(np.mean(terms))

    first, second = torch.randn(8, 3), torch.randn(8, 3)
    second[:, 0] = first[:, 0] * 3
    k, l = kernel(first), kernel(second)  # noqa: E741
    expected = tuples(k, l) / (tuples(k, k) * tuples(l, l)) ** 0.5

    assert cknna(first, second, 7) == pytest.approx(expected, rel=1e-9)


def test_one_for_equal_geometry_and_none_for_unrelated() -> None:
    features = torch.randn(400, 12)
    rotated = 3 * features @ torch.linalg.qr(torch.randn(12, 12))[0]

    assert cknna(features, rotated) == pytest.approx(1, abs=1e-6)
    assert abs(cknna(features, torch.randn(400, 12))) < 0.05
    noisy = [cknna(features, features + scale * torch.randn(400, 12)) for scale in (0.1, 0.5, 2.0)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0


def test_misuse_is_one_sentence() -> None:
    with pytest.raises(EvaluationError, match="not 5 with 6 rows"):
        cknna(torch.randn(5, 2), torch.randn(6, 2))
    with pytest.raises(EvaluationError, match="at least 11 images, and there are 10"):
        cknna(torch.randn(10, 2), torch.randn(10, 2))
