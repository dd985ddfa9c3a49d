"""Frechet distance between Gaussians fitted to feature sets, from moments that stream and merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vrpo.errors import EvaluationError
from vrpo.evaluation.npz import read_arrays
from vrpo.wording import counted

Array = NDArray[np.float64]

# Rows are folded into the moments in blocks of this fixed size, so the sums do not depend on how a caller
# batches.
_BLOCK = 4096
# The widest features that are read from a file: a covariance of 2 GiB.
MAX_WIDTH = 16_384


class _Moments(NamedTuple):
    samples: int
    mean: Array
    scatter: Array


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, in float64.

    Blocks are centred on their own mean and joined by the pairwise update of Chan, Golub and LeVeque (1979,
    eq. 2.1), so a large common offset costs no digits. The rows of a set that fits one block are kept: with
    fewer samples than dimensions, the distance uses them instead of a singular covariance.
    """

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._pending = 0
        self._folded: _Moments | None = None
        self._count_known = True

    @classmethod
    def from_moments(cls, mean: Array, covariance: Array, count: int | None = None) -> FeatureStatistics:
        """Build statistics from a mean (D,) and covariance (D, D); ``count`` is None where not recorded."""
        mean = np.array(mean, dtype=np.float64)
        covariance = np.array(covariance, dtype=np.float64)
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise EvaluationError(
                f"Statistics have a mean of shape {mean.shape} and a covariance of shape {covariance.shape}; "
                "give a mean (D,) and a covariance (D, D)."
            )
        statistics = cls()
        statistics._count_known = count is not None
        # Without a count, 2 makes the scatter the covariance itself, which is all that a distance needs.
        total = 2 if count is None else count
        statistics._folded = _Moments(total, mean, covariance * (total - 1))
        return statistics

    @property
    def count(self) -> int | None:
        """Number of feature vectors seen, or None where loaded statistics do not say."""
        if not self._count_known:
            return None
        return self._pending + (self._folded.samples if self._folded else 0)

    @property
    def width(self) -> int:
        """Number of feature dimensions, 0 before the first update."""
        if self._folded:
            return self._folded.mean.size
        return self._rows[0].shape[1] if self._rows else 0

    @property
    def mean(self) -> Array:
        """Mean of the features, (D,)."""
        return self._moments().mean

    @property
    def covariance(self) -> Array:
        """Unbiased covariance of the features, (D, D), as ``numpy.cov(rowvar=False)``."""
        count, _, scatter = self._moments()
        return scatter / (count - 1)

    def update(self, features: torch.Tensor | NDArray) -> None:
        """Add feature vectors (B, D); raises EvaluationError on NaN, infinity or another width."""
        if isinstance(features, torch.Tensor):
            features = features.detach().cpu().numpy()
        rows = np.array(features, dtype=np.float64)
        if rows.ndim != 2 or (self.width and rows.shape[1] != self.width):
            raise EvaluationError(
                f"Features of shape {rows.shape} cannot join statistics of {self.width or 'D'} dimensions; "
                "give a matrix (samples, dimensions) from one network."
            )
        if not self._count_known:
            raise EvaluationError("Statistics without a sample count cannot be extended; compute them afresh.")
        _require_finite(rows)
        start = 0
        while start < len(rows):
            if self._pending == _BLOCK:
                self._fold()
            taken = rows[start : start + _BLOCK - self._pending]
            self._rows.append(taken)
            self._pending += len(taken)
            start += len(taken)

    def merge(self, other: FeatureStatistics) -> None:
        """Add all that ``other`` has seen, such as another process's share; ``other`` is unchanged."""
        if not (self._count_known and other._count_known):
            raise EvaluationError("Statistics without a sample count cannot be merged; compute them afresh.")
        if self.width and other.width and self.width != other.width:
            raise EvaluationError(
                f"Statistics of {self.width} and {other.width} dimensions cannot be merged; use one network for both."
            )
        if other._folded:
            self._folded = _joined(self._folded, other._folded)
        for rows in other._rows:
            self.update(rows)

    def save(self, path: Path | str, **fields: object) -> None:
        """Write an ``.npz`` with ``mu`` and ``sigma``, as ADM references name them, and further fields."""
        entries = {name: np.array(value) for name, value in fields.items()}
        if self.count is not None:
            entries["count"] = np.array(self.count)
        with open(path, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, **entries)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path | str, names: tuple[str, str] = ("mu", "sigma")) -> FeatureStatistics:
        """Read statistics that `save` wrote, or an ADM ``.npz``; raises EvaluationError without any.

        ``names`` are those of the mean and covariance in the file.
        """
        mean, covariance = names
        arrays = read_arrays(Path(path), {mean: (MAX_WIDTH,), covariance: (MAX_WIDTH, MAX_WIDTH), "count": ()})
        if not set(names) <= set(arrays) or any(arrays[name].dtype.kind not in "fiu" for name in names):
            raise EvaluationError(
                f"{path} holds no readable '{mean}' and '{covariance}' arrays; give an .npz of feature statistics."
            )
        count = int(arrays["count"]) if "count" in arrays and arrays["count"].dtype.kind in "iu" else None
        if count is not None and count < 2:
            raise EvaluationError(f"{path} says that it was made of {count} images; give one of at least 2.")
        if not all(np.isfinite(arrays[name]).all() for name in names):
            raise EvaluationError(
                f"'{mean}' or '{covariance}' of {path} contains NaN or infinite values; make the file again, or give "
                "the images."
            )
        statistics = cls.from_moments(arrays[mean], arrays[covariance], count)
        flaw = _flaw(arrays[covariance])
        if flaw is not None:
            raise EvaluationError(
                f"'{covariance}' of {path} is no covariance, for it {flaw}; make the file again, or give the images."
            )
        return statistics

    def factor(self) -> Array:
        """Return A (D, r) with A A^T equal to the covariance and r its numerical rank."""
        count, mean, scatter = self._moments()
        if not self._folded and count <= self.width:
            # The centred rows are an exact factor, where eigenvalues of the singular covariance would add
            # noise.
            return (np.concatenate(self._rows) - mean).T / np.sqrt(count - 1)
        values, vectors = np.linalg.eigh(scatter / (count - 1))
        # Below this, an eigenvalue is rounding error of the sums; its square root would not be negligible.
        keep = values > values[-1] * values.size * np.finfo(np.float64).eps
        return vectors[:, keep] * np.sqrt(values[keep])

    def _moments(self) -> _Moments:
        whole = copy.copy(self)
        whole._fold()
        if whole._folded is None or whole._folded.samples < 2:
            raise EvaluationError(
                f"A covariance needs at least 2 images, and {counted(self.count or 0, 'was', 'were')} given; give more "
                "images."
            )
        return whole._folded

    def _fold(self) -> None:
        if not self._pending:
            return
        rows = np.concatenate(self._rows)
        mean = rows.mean(axis=0)
        rows -= mean
        # numpy multiplies a matrix by its own transpose as a symmetric update: half the work, exactly
        # symmetric.
        self._folded = _joined(self._folded, _Moments(self._pending, mean, rows.T @ rows))
        self._rows, self._pending = [], 0


def _joined(first: _Moments | None, second: _Moments) -> _Moments:
    if first is None:
        return second
    count = first.samples + second.samples
    shift = second.mean - first.mean
    spread = np.outer(shift, shift) * (first.samples * second.samples / count)
    return _Moments(count, first.mean + shift * (second.samples / count), first.scatter + second.scatter + spread)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in squared feature units.

    The formula is eq. 4 of Dowson and Landau (1982). With C = A A^T, the trace of the root is the sum of the
    singular values of A1^T A2: the square roots of the eigenvalues of the symmetric product C1^(1/2) C2
    C1^(1/2), without squaring them first, so zero eigenvalues stay at rounding error. Raises EvaluationError
    for sets of different width.
    """
    if first.width != second.width:
        raise EvaluationError(
            f"Features of {first.width} and {second.width} dimensions cannot be compared; use one network for both."
        )
    left, right = first.factor(), second.factor()
    overlap = np.linalg.svd(left.T @ right, compute_uv=False).sum() if left.size and right.size else 0.0
    shift = first.mean - second.mean
    distance = shift @ shift + np.vdot(left, left) + np.vdot(right, right) - 2 * overlap
    return max(0.0, float(distance))


def _flaw(covariance: NDArray) -> str | None:
    """Say what a matrix (D, D) has that no covariance does, beyond the rounding of the numbers that it is kept in."""
    kept = np.finfo(covariance.dtype).eps if covariance.dtype.kind == "f" else 0.0
    tolerance = max(1e-6, float(kept))
    matrix = covariance.astype(np.float64)
    largest = np.abs(matrix).max(initial=0.0)
    if largest == 0:
        return None
    for start in range(0, len(matrix), _BLOCK):
        stop = start + _BLOCK
        if np.abs(matrix[start:stop] - matrix[:, start:stop].T).max() > tolerance * largest:
            return "is not symmetric"
    # Rounding moves an eigenvalue by at most its share of the trace; with that added, a root exists.
    matrix[np.diag_indices_from(matrix)] += tolerance * np.trace(matrix)
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return "has negative eigenvalues"
    return None


def _require_finite(*arrays: Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise EvaluationError(
            "Features contain NaN or infinite values; check the feature network's weights and the sampled images."
        )
