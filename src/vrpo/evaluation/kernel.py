"""Kernel distance (KID): the unbiased squared maximum mean discrepancy of two feature sets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vrpo.errors import EvaluationError

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020


class KernelDistance(NamedTuple):
    """Mean of the distance over subsets and its standard deviation between subsets."""

    mean: float
    std: float


def kernel_distance(
    samples: torch.Tensor | NDArray,
    reference: torch.Tensor | NDArray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> KernelDistance:
    """Return KID between features (N, D) and (M, D), with the kernel k(x, y) = (x . y / D + 1)^3.

    The kernel is that of Binkowski et al. (2018, sec. 4). The unbiased estimate (Gretton et al. 2012, eq. 3)
    is averaged over seeded random subsets without repetition. The draws and defaults are torch-fidelity's, so
    equal features in equal order give its number. Raises EvaluationError when a set is smaller than
    ``subset_size``.
    """
    first, second = _matrix(samples), _matrix(reference)
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(
            f"Features of {first.shape[1]} and {second.shape[1]} dimensions cannot be compared; "
            "use one network for both."
        )
    if not 2 <= subset_size <= min(len(first), len(second)):
        raise EvaluationError(
            f"KID over subsets of {subset_size} needs 2 or more, and no more than the {len(first)} samples "
            f"and {len(second)} reference images given; sample more images or lower the subset size."
        )
    draws = np.random.RandomState(seed)
    values = [
        _unbiased_mmd(
            first[draws.choice(len(first), subset_size, replace=False)],
            second[draws.choice(len(second), subset_size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased_mmd(first: NDArray, second: NDArray) -> float:
    """Unbiased squared discrepancy of two sets of equal size, in float64."""
    count, width = first.shape
    first, second = (features.astype(np.float64) / width**0.5 for features in (first, second))
    cross = _sum_of_cubes(first @ second.T)
    within = 0.0
    for features in (first, second):
        own = _sum_of_cubes(np.square(features).sum(axis=1))
        within += _sum_of_cubes(features @ features.T) - own
    return float(within / (count * (count - 1)) - 2 * cross / count**2)


def _sum_of_cubes(products: NDArray[np.float64]) -> float:
    products += 1.0
    # Products, not `**`: numpy computes a third power by the much slower general one.
    return float(np.vdot(products * products, products))


def _matrix(features: torch.Tensor | NDArray) -> NDArray:
    if isinstance(features, torch.Tensor):
        return features.detach().cpu().numpy()
    return np.asarray(features)
