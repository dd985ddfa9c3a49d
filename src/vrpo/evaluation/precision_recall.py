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
    rows: _Rows
    norms: Tensor  # (N,) float32, squared
    radii: Tensor  # (N,) float64, squared distance to the k-th nearest neighbour

    @property
    def size(self) -> Tensor:
        """The largest term (N,) of a comparison with this point's ball, which rounding goes by."""
        return self.norms + self.radii.float()


class _Rows:
    """Centred features, laid out so that one matrix product gives -2 x.y + t_x + t_y for a term t of each point.

    A row holds x, 1 and -t / 2; against y, -t / 2 and 1, its product is -1/2 of that. Adding terms to the product
    of x and y alone would take two more passes over each block, a tenth of the time.
    """

    def __init__(self, features: Tensor, shift: Tensor, device: torch.device | str) -> None:
        count, self.width = features.shape
        # Whole cache lines to a row.
        store = torch.zeros(count, -(-(self.width + 2) // 16) * 16, device=device)
        self._store = store[:, : self.width + 2]
        for block in _blocks(count):
            torch.sub(features[block].to(shift), shift, out=self.features[block])
        self._store[:, self.width] = 1.0
        # One block is written over and over: fresh memory for each would cost a tenth of the time in page faults.
        self._memory = torch.empty(_BLOCK * _BLOCK, device=device)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def features(self) -> Tensor:
        """The centred features, float32 (N, D)."""
        return self._store[:, : self.width]

    def set_terms(self, terms: Tensor) -> None:
        """Make ``terms`` (N,) those of the points."""
        self._store[:, -1] = terms / -2

    def left(self, rows: slice | Tensor) -> Tensor:
        """Return ``rows`` as the left side of `products`."""
        left = self._store[rows].clone()
        left[:, -2], left[:, -1] = left[:, -1].clone(), 1.0
        return left

    def products(self, left: Tensor, columns: slice) -> Tensor:
        """Return -2 x.y + t_x + t_y (R, C), in memory that the next call writes over."""
        right = self._store[columns]
        out = self._memory[: len(left) * len(right)].view(len(left), len(right))
        return torch.addmm(out, left, right.T, beta=0, alpha=-2, out=out)


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
    shift = reference.double().mean(dim=0).to(torch.float32).to(device)
    with _full_precision():
        first, second = (_points(features, shift, neighbours, device) for features in (reference, samples))
        near_first, near_second = _nearest_slack(first, second)
        recall = _covered(first, second, near_first)
        precision = _covered(second, first, near_second)
    return PrecisionRecall(precision, recall)


def _points(features: Tensor, shift: Tensor, neighbours: int, device: torch.device | str) -> _Points:
    rows = _Rows(features, shift, device)
    norms = rows.features.square().sum(dim=1)
    rows.set_terms(norms)
    return _Points(rows, norms, _squared_radii(rows, norms, neighbours))


def _squared_radii(points: _Rows, norms: Tensor, neighbours: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th nearest other point, in float64."""
    count, features = len(points), points.features
    # Spare candidates: float32 may order near-equal neighbours wrongly.
    kept = min(neighbours + _SPARE, count - 1)
    best = _Nearest(count, kept, norms.device)
    blocks = list(_blocks(count))
    for number, rows in enumerate(blocks):
        left = points.left(rows)
        # The distance matrix is symmetric: each block above the diagonal serves its rows and its columns.
        for columns in blocks[number:]:
            distances = points.products(left, columns)
            if columns == rows:
                distances.fill_diagonal_(torch.inf)
            best.offer(rows, distances, columns.start, dim=1)
            if columns != rows:
                best.offer(columns, distances, rows.start, dim=0)
    values, indices = best.values, best.indices
    nearest = values[:, neighbours - 1 : neighbours]
    slack = 2 * _rounding(norms, norms, points.width)[:, None]
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
        radii[rows] = _crowded_radii(points, rows, limits[rows], neighbours)
    return radii


def _crowded_radii(points: _Rows, rows: Tensor, limits: Tensor, neighbours: int) -> Tensor:
    """The squared radii (R,) of ``rows`` from exact distances of all points that may be within ``limits``."""
    owners, found = [], []
    features, left = points.features, points.left(rows)
    for columns in _blocks(len(points)):
        distances = points.products(left, columns)
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


class _Nearest:
    """The ``kept`` smallest distances (N, kept) of each point so far, ascending, and whose they are."""

    def __init__(self, count: int, kept: int, device: torch.device) -> None:
        self.kept = kept
        self.values = torch.full((count, kept), torch.inf, device=device)
        self.indices = torch.zeros((count, kept), dtype=torch.long, device=device)

    def offer(self, rows: slice, block: Tensor, offset: int, dim: int) -> None:
        """Take a block of distances of the points ``rows`` to those from ``offset`` on, which lie along ``dim``.

        The k smallest entries of a row lie in the k groups of columns with the smallest minima, and minima are
        cheap. Most rows of a late block hold nothing new, and are left out.
        """
        distances = block if dim == 1 else block.T
        columns = distances.shape[1]
        groups = columns // _GROUP
        values, indices = self.values[rows], self.indices[rows]
        if groups <= self.kept:
            found, where = distances.topk(min(self.kept, columns), dim=1, largest=False)
            self._join(values, indices, slice(None), found, where + offset)
            return
        # Group g holds columns g, g + groups, ...; a tail shorter than a group joins every row's candidates.
        # The reduction runs on the block as it lies: on its transpose it would be ten times slower.
        minima = block.narrow(dim, 0, groups * _GROUP).unflatten(dim, (_GROUP, groups)).amin(dim=dim)
        minima = minima if dim == 1 else minima.T
        smallest = minima.amin(dim=1)
        if groups * _GROUP < columns:
            smallest = torch.minimum(smallest, distances[:, groups * _GROUP :].amin(dim=1))
        active = (smallest < values[:, -1]).nonzero().flatten()
        chosen = minima[active].topk(self.kept, dim=1, largest=False).indices
        members = torch.arange(_GROUP, device=distances.device) * groups
        tail = torch.arange(groups * _GROUP, columns, device=distances.device).expand(len(active), -1)
        candidates = torch.cat([(chosen[:, :, None] + members).flatten(1), tail], dim=1)
        found, best = distances[active[:, None], candidates].topk(self.kept, dim=1, largest=False)
        self._join(values, indices, active, found, candidates.gather(1, best) + offset)

    def _join(self, values: Tensor, indices: Tensor, rows: slice | Tensor, found: Tensor, where: Tensor) -> None:
        pool = torch.cat([values[rows], found], dim=1)
        pool_indices = torch.cat([indices[rows], where], dim=1)
        values[rows], best = pool.topk(self.kept, dim=1, largest=False)
        indices[rows] = pool_indices.gather(1, best)


def _nearest_slack(first: _Points, second: _Points) -> tuple[Tensor, Tensor]:
    """Smallest squared distance to the other set's points less their squared radius, for each set.

    With s(x, y) = |x - y|^2 - r_x^2 - r_y^2, the first is r_x^2 plus the minimum of s over y, and the second r_y^2
    plus that over x: one product serves both.
    """
    slack_first = torch.full_like(first.norms, torch.inf)
    slack_second = torch.full_like(second.norms, torch.inf)
    for points in (first, second):
        points.rows.set_terms((points.norms - points.radii).float())
    for rows in _blocks(len(first.norms)):
        left = first.rows.left(rows)
        for columns in _blocks(len(second.norms)):
            slack = second.rows.products(left, columns)
            slack_first[rows] = torch.minimum(slack_first[rows], slack.amin(dim=1))
            slack_second[columns] = torch.minimum(slack_second[columns], slack.amin(dim=0))
    return slack_first + first.radii.float(), slack_second + second.radii.float()


def _covered(points: _Points, manifold: _Points, slack: Tensor) -> float:
    """Share of points within a ball of the manifold; doubtful ones are settled by exact distances.

    The terms of both are those that `_nearest_slack` sets.
    """
    margin = _rounding(points.size, manifold.size, points.rows.width)
    inside = slack < -margin
    doubtful = (slack.abs() <= margin).nonzero().flatten()
    # From |x - y|^2 - r_x^2 - r_y^2 to what decides: |x - y|^2 - r_y^2.
    limits = margin - points.radii.float()
    for rows in doubtful.split(_BLOCK):
        left = points.rows.left(rows)
        for columns in _blocks(len(manifold.norms)):
            near = manifold.rows.products(left, columns)
            row, column = (near <= limits[rows, None]).nonzero(as_tuple=True)
            column += columns.start
            exact = _exact_squared(points.rows.features, rows[row], manifold.rows.features, column)
            inside[rows[row[exact <= manifold.radii[column]]]] = True
    return inside.double().mean().item()


def _rounding(norms: Tensor, other_norms: Tensor, width: int) -> Tensor:
    """A bound (N,) on the float32 error of squared distances from points of squared ``norms``."""
    # Rounding of a D-term product grows as sqrt(D) (Higham and Mary 2019); 4 is generous against measurement.
    return 4 * torch.finfo(torch.float32).eps * width**0.5 * (norms + other_norms.max())


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
