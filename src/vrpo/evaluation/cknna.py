"""CKNNA: how far two representations of the same images agree on who is near whom. A diagnostic, never a loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vrpo.errors import EvaluationError

NEIGHBOURS = 10
_BLOCK = 2048


def cknna(first: Tensor, second: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Return the centred kernel nearest-neighbour alignment of features (N, D) and (N, E) of the same N images.

    With K and L the cosines within each set, kept where j is among the k nearest other images of i in both sets,
    it is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) (Huh et al. 2024, arXiv 2405.07987, appendix A), by the unbiased
    estimate of HSIC (Song et al. 2012, eq. 5) as in the authors' published figures. Where K meets itself, its own
    neighbours alone decide. NaN where a set has no structure. Only the N k kept entries are stored. Raises
    EvaluationError for unequal or too few rows.
    """
    if len(first) != len(second):
        raise EvaluationError(f"CKNNA compares features of the same images, not {len(first)} with {len(second)} rows.")
    least = max(4, neighbours + 1)
    if neighbours < 2 or len(first) < least:
        raise EvaluationError(
            f"CKNNA with {neighbours} neighbours needs 2 neighbours or more and at least {least} images, and there are "
            f"{len(first)}; give more."
        )
    graphs = [_Graph(features, neighbours) for features in (first, second)]
    own = [_hsic(graph, graph) for graph in graphs]
    if min(own) <= 0:
        return math.nan
    return _hsic(*graphs) / math.sqrt(own[0] * own[1])


class _Graph:
    """Each image's k nearest others by cosine: ``indices`` (N, k)."""

    def __init__(self, features: Tensor, neighbours: int) -> None:
        self.unit = F.normalize(features.double(), dim=1)
        indices = []
        for start in range(0, len(self.unit), _BLOCK):
            rows = self.unit[start : start + _BLOCK]
            cosines = rows @ self.unit.T
            cosines[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -torch.inf
            indices.append(cosines.topk(neighbours, dim=1).indices)
        self.indices = torch.cat(indices)

    def cosines(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Cosines (E,) of pairs of images."""
        parts = zip(rows.split(_BLOCK), columns.split(_BLOCK), strict=True)
        return torch.cat([(self.unit[row] * self.unit[column]).sum(dim=1) for row, column in parts])


def _hsic(first: _Graph, second: _Graph) -> float:
    """Unbiased HSIC of the two kernels on the pairs that are neighbours in both."""
    count = len(first.indices)
    shared = (first.indices[:, :, None] == second.indices[:, None, :]).any(dim=2)
    rows, place = shared.nonzero(as_tuple=True)
    columns = first.indices[rows, place]
    if not len(rows):
        return 0.0
    k, l = first.cosines(rows, columns), second.cosines(rows, columns)  # noqa: E741
    # Neighbourhood is not mutual, so K L' meets only the pairs whose transpose is kept too.
    codes, transposed = rows * count + columns, columns * count + rows
    order = codes.argsort()
    position = torch.searchsorted(codes[order], transposed).clamp(max=len(codes) - 1)
    found = codes[order][position] == transposed
    product = (k * l[order][position])[found].sum()
    zeros = torch.zeros(count, dtype=k.dtype, device=k.device)
    through = zeros.index_add(0, columns, k) @ zeros.index_add(0, rows, l)
    value = product + k.sum() * l.sum() / ((count - 1) * (count - 2)) - 2 * through / (count - 2)
    return float(value / (count * (count - 3)))
