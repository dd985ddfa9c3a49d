"""Improved precision and recall: coverage of one feature set by the nearest-neighbour balls of the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vrpo.errors import EvaluationError

NEIGHBOURS = 3

# A block of distances is (_BLOCK, _BLOCK) float32: 16 MiB, whatever the size of the sets.
_BLOCK = 2048
# Pairs whose distance is recomputed at once: bounds the gathered rows, 4096 x 2048 in float64 being 64 MiB.
_PAIRS = 4096
_GROUP = 16
_SPARE = 2


class PrecisionRecall(NamedTuple):
    """Share of samples on the reference manifold, and share of reference images on the samples' manifold."""

    precision: float
    recall: float


class _Points(NamedTuple):
    features: Tensor  # (N, D) float32, centred
    norms: Tensor  # (N,) float32, squared
    radii: Tensor  # (N,) float64, squared distance to the k-th nearest neighbour


@torch.inference_mode()
def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Return precision and recall of features (N, D) against (M, D) (Kynkaanniemi et al. 2019, eq. 1 and 2).

    A point lies on a set's manifold when its distance to some member is at most that member's distance to its
    k-th nearest other member, k = 3 as in the ADM evaluator. Distances come from float32 matrix products in
    blocks; those that rounding could put on the wrong side are recomputed from float64 differences, so the
    result is that of exact distances. Raises EvaluationError when a set has no k-th neighbour.
    """
    for name, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= neighbours:
            raise EvaluationError(
                f"Precision and recall with {neighbours} neighbours need more than {neighbours} images "
                f"and there are {len(features)} {name}; give more."
            )
    if samples.shape[1] != reference.shape[1]:
        raise EvaluationError(
            f"Features of {samples.shape[1]} and {reference.shape[1]} dimensions cannot be compared; "
            "use one network for both."
        )
    # Distances do not change by a common shift; without it |x|^2 + |y|^2 - 2 x.y cancels in its leading
    # digits and too many comparisons would be in doubt.
    shift = reference.double().mean(dim=0)
    with _full_precision():
        first, second = (_points(features, shift, neighbours, device) for features in (reference, samples))
        near_first, near_second = _nearest_slack(first, second)
        recall = _covered(first, second, near_first)
        precision = _covered(second, first, near_second)
    return PrecisionRecall(precision, recall)


def _points(features: Tensor, shift: Tensor, neighbours: int, device: torch.device | str) -> _Points:
    centred = torch.empty(features.shape, dtype=torch.float32, device=device)
    for start in range(0, len(features), _BLOCK):
        centred[start : start + _BLOCK] = features[start : start + _BLOCK].double() - shift
    norms = centred.square().sum(dim=1)
    return _Points(centred, norms, _squared_radii(centred, norms, neighbours))


def _squared_radii(features: Tensor, norms: Tensor, neighbours: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th nearest other point, in float64."""
    count = len(features)
    # Spare candidates: float32 may order near-equal neighbours wrongly.
    kept = min(neighbours + _SPARE, count - 1)
    values = torch.full((count, kept), torch.inf, device=features.device)
    indices = torch.zeros((count, kept), dtype=torch.long, device=features.device)

    def offer(rows: slice, distances: Tensor, offset: int) -> None:
        found, where = _smallest(distances, kept)
        pool = torch.cat([values[rows], found], dim=1)
        pool_indices = torch.cat([indices[rows], where + offset], dim=1)
        values[rows], best = pool.topk(kept, dim=1, largest=False)
        indices[rows] = pool_indices.gather(1, best)

    blocks = list(_blocks(count))
    memory = _block_memory(features)
    for number, rows in enumerate(blocks):
        # The distance matrix is symmetric: each block above the diagonal serves its rows and its columns.
        for columns in blocks[number:]:
            distances = _products(features[rows], features[columns], norms[columns], memory)
            distances += norms[rows, None]
            if columns == rows:
                distances.fill_diagonal_(torch.inf)
            offer(rows, distances, columns.start)
            if columns != rows:
                offer(columns, distances.T, rows.start)
    nearest = values[:, neighbours - 1 : neighbours]
    slack = 2 * _rounding(norms, norms, features.shape[1])[:, None]
    # Candidates outside this band are certainly nearer or farther than the k-th; within it exact values decide.
    row, place = ((values - nearest).abs() <= slack).nonzero(as_tuple=True)
    exact = values.double()
    exact[row, place] = _exact_squared(features, row, features, indices[row, place])
    radii = exact.kthvalue(neighbours, dim=1).values
    limits = (nearest + slack).squeeze(1)
    # Where even the last candidate lies within the band, a nearer point may have been left out.
    crowded = (values[:, -1] <= limits).nonzero().flatten() if kept < count - 1 else row[:0]
    # Few rows at once bound the number of pairs among repeated images.
    for rows in crowded.split(_BLOCK // 8):
        radii[rows] = _crowded_radii(features, norms, rows, limits[rows], neighbours)
    return radii


def _crowded_radii(features: Tensor, norms: Tensor, rows: Tensor, limits: Tensor, neighbours: int) -> Tensor:
    """The squared radii (R,) of ``rows`` from exact distances of all points that may be within ``limits``."""
    owners, found = [], []
    memory = _block_memory(features)
    for columns in _blocks(len(features)):
        distances = _products(features[rows], features[columns], norms[columns], memory)
        distances += norms[rows, None]
        owner, column = (distances <= limits[:, None]).nonzero(as_tuple=True)
        column += columns.start
        other = column != rows[owner]
        owner, column = owner[other], column[other]
        owners.append(owner)
        found.append(_exact_squared(features, rows[owner], features, column))
    owner, exact = torch.cat(owners), torch.cat(found)
    order = exact.argsort()
    order = order[owner[order].argsort(stable=True)]
    counts = owner.bincount(minlength=len(rows))
    return exact[order][counts.cumsum(0) - counts + neighbours - 1]


def _smallest(distances: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The ``kept`` smallest entries of each row of (R, C), or all if fewer, and their columns.

    The k smallest entries lie in the k groups of columns with the smallest minima, and minima are cheap.
    """
    rows, columns = distances.shape
    groups = columns // _GROUP
    if groups <= kept:
        found, where = distances.topk(min(kept, columns), dim=1, largest=False)
    else:
        # Group g holds columns g, g + groups, ...; a tail shorter than a group joins every row's candidates.
        whole = distances[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
        chosen = whole.amin(dim=1).topk(kept, dim=1, largest=False).indices
        members = torch.arange(_GROUP, device=distances.device) * groups
        candidates = (chosen[:, :, None] + members).flatten(1)
        tail = torch.arange(groups * _GROUP, columns, device=distances.device).expand(rows, -1)
        candidates = torch.cat([candidates, tail], dim=1)
        found, best = distances.gather(1, candidates).topk(kept, dim=1, largest=False)
        where = candidates.gather(1, best)
    return found, where


def _nearest_slack(first: _Points, second: _Points) -> tuple[Tensor, Tensor]:
    """Smallest squared distance to the other set's points less their squared radius, for each set."""
    slack_first = torch.full_like(first.norms, torch.inf)
    slack_second = torch.full_like(second.norms, torch.inf)
    bias = (second.norms - second.radii).float()
    memory = _block_memory(first.features)
    for rows in _blocks(len(first.features)):
        row_bias = (first.norms[rows] - first.radii[rows]).float()
        for columns in _blocks(len(second.features)):
            inner = _products(first.features[rows], second.features[columns], bias[columns], memory)
            found = inner.amin(dim=1) + first.norms[rows]
            slack_first[rows] = torch.minimum(slack_first[rows], found)
            inner += row_bias[:, None]
            found = inner.amin(dim=0) + second.radii[columns].float()
            slack_second[columns] = torch.minimum(slack_second[columns], found)
    return slack_first, slack_second


def _covered(points: _Points, manifold: _Points, slack: Tensor) -> float:
    """Share of points within a ball of the manifold; doubtful ones are settled by exact distances."""
    margin = _rounding(points.norms, manifold.norms + manifold.radii.float(), points.features.shape[1])
    inside = slack < -margin
    doubtful = (slack.abs() <= margin).nonzero().flatten()
    memory = _block_memory(points.features)
    for rows in doubtful.split(_BLOCK):
        for columns in _blocks(len(manifold.features)):
            bias = (manifold.norms[columns] - manifold.radii[columns]).float()
            near = _products(points.features[rows], manifold.features[columns], bias, memory)
            near += points.norms[rows, None]
            row, column = (near <= margin[rows, None]).nonzero(as_tuple=True)
            column += columns.start
            exact = _exact_squared(points.features, rows[row], manifold.features, column)
            inside[rows[row[exact <= manifold.radii[column]]]] = True
    return inside.double().mean().item()


def _rounding(norms: Tensor, other_norms: Tensor, width: int) -> Tensor:
    """A bound (N,) on the float32 error of squared distances from points of squared ``norms``."""
    # Rounding of a D-term product grows as sqrt(D) (Higham and Mary 2019); 4 is generous against measurement.
    return 4 * torch.finfo(torch.float32).eps * width**0.5 * (norms + other_norms.max())


def _block_memory(features: Tensor) -> Tensor:
    # One block is written over and over: fresh memory for each would cost a tenth of the time in page faults.
    return torch.empty(_BLOCK * _BLOCK, device=features.device)


def _products(rows: Tensor, columns: Tensor, bias: Tensor, memory: Tensor) -> Tensor:
    """``bias`` - 2 rows columns^T in ``memory``: (R, C) of rows (R, D), columns (C, D), bias (C,)."""
    out = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
    return torch.addmm(bias, rows, columns.T, alpha=-2, out=out)


def _exact_squared(first: Tensor, rows: Tensor, second: Tensor, columns: Tensor) -> Tensor:
    """Squared distances between first[rows[i]] and second[columns[i]] from float64 differences."""
    distances = torch.empty(len(rows), dtype=torch.float64, device=first.device)
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        difference = first[rows[part]].double() - second[columns[part]]
        distances[part] = difference.square_().sum(dim=1)
    return distances


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products in float32, whatever reduced precision training chose."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
