"""The spherical policy: actions around a mean in a few informed directions, and their clipped surrogate.

An action is ``a_g = normalise(u_old + s E c_g)`` with ``E`` an orthonormal basis of k tangent directions
and ``c_g`` Gaussian in antithetic pairs. Actions stay in the k + 1 coordinates of the frame ``[u_old, E]``:
no (B, N, G, C) tensor is formed unless a reward asks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A direction that loses all but this share of its length to those before it is rounding noise.
_DEPENDENT = 1e-4
_DUAL_CLIP = 3.0


def tangent(x: Tensor, mean: Tensor) -> Tensor:
    """Return ``T(x) = x - <x,u>u``, the part of ``x`` (..., C) tangent to the sphere at ``u = mean``."""
    return x - (x * mean).sum(-1, keepdim=True) * mean


@dataclass(frozen=True)
class Actions:
    """G unit vectors a token, as combinations of the token's frame.

    Attributes:
        frame: (B, N, k + 1, C), orthonormal rows: the policy's mean, then its exploration basis (zero rows
            allowed).
        weights: (B, N, G, k + 1), the actions' coordinates in the frame.
    """

    frame: Tensor
    weights: Tensor

    @classmethod
    def at(cls, mean: Tensor) -> Actions:
        """Return the policy's mean (B, N, C) as a group of one action."""
        return cls(mean.unsqueeze(2), mean.new_ones(*mean.shape[:2], 1, 1))

    def dot(self, vectors: Tensor) -> Tensor:
        """Return every action's inner product with its token's vector (B, N, C), as (B, N, G)."""
        return (self.weights @ (self.frame @ vectors.unsqueeze(-1))).squeeze(-1)

    def project(self, matrix: Tensor) -> Tensor:
        """Return ``matrix @ a`` for every action, (B, N, G, M), for a matrix (M, C)."""
        return self.weights @ (self.frame @ matrix.transpose(-1, -2))

    def tensor(self) -> Tensor:
        """Return the actions themselves, (B, N, G, C)."""
        return self.weights @ self.frame


def orthonormal_frame(mean: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """Return ``[mean, E]`` (B, N, k + 1, C) from directions that broadcast to (B, N, C), made orthonormal.

    Gram-Schmidt, twice, which is orthogonal to rounding. A direction that is zero, or that depends on those
    before it, gives a zero row: it is not explored.
    """
    frame = mean.unsqueeze(2)
    for direction in directions:
        row = F.normalize(direction.expand_as(mean), dim=-1).unsqueeze(2)
        row = row - (row @ frame.transpose(2, 3)) @ frame
        row = torch.where(row.norm(dim=-1, keepdim=True) > _DEPENDENT, row, 0.0)
        row = F.normalize(row, dim=-1)
        row = F.normalize(row - (row @ frame.transpose(2, 3)) @ frame, dim=-1)
        frame = torch.cat([frame, row], dim=2)
    return frame


def antithetic(half: Tensor, group: int) -> Tensor:
    """Return ``group`` draws (B, N, G, k): each of at least ``group / 2`` Gaussian ones, and its negative."""
    return torch.stack([half, -half], dim=3).flatten(2, 3)[:, :, :group]


def sample_actions(frame: Tensor, coordinates: Tensor, radius: Tensor | float) -> Actions:
    """Return ``a_g = normalise(u_old + s E c_g)`` for coordinates ``c`` (B, N, G, k) and radius ``s``."""
    explored = frame[:, :, 1:].square().sum(-1).unsqueeze(2)
    steps = radius * coordinates * explored.round()
    length = (1 + steps.square().sum(-1, keepdim=True)).rsqrt()
    return Actions(frame, torch.cat([length, length * steps], dim=-1))


def log_ratio(u: Tensor, actions: Actions, radius: Tensor | float) -> Tensor:
    """Return ``log rho_g = kappa <u - u_old, a_g - mean_g a>`` with ``kappa = 1/s^2``, (B, N, G).

    Centring the actions keeps the mean ratio at one.
    """
    moved = actions.frame @ (u - actions.frame[:, :, 0]).unsqueeze(-1)
    return (_centred(actions.weights) @ moved).squeeze(-1) / radius**2


def surrogate_gradient(
    log_rho: Tensor, advantage: Tensor, actions: Actions, radius: Tensor | float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient (B, N, C) of each token's surrogate with respect to ``u``, and what was clipped.

    The surrogate is ``L_pg = -s mean_g min(rho_g A_g, clip(rho_g, 1 - low, 1 + high) A_g)`` (PPO, arXiv
    1707.06347, eq. 7, with asymmetric bounds), whose second clip ``max(., 3 A_g)`` where ``A_g < 0`` keeps
    the gradient bounded (dual-clip PPO, arXiv 1912.09729). A clipped action, true in the returned mask (B,
    N, G), has no gradient; any other has ``-s A_g rho_g kappa (a_g - mean_g a) / G``. The factor ``s``
    keeps the whole of order one.
    """
    rho = log_rho.exp()
    outside = (rho < 1 - low) | (rho > _DUAL_CLIP)
    clipped = torch.where(advantage > 0, rho > 1 + high, outside & (advantage < 0))
    pull = torch.where(clipped, 0.0, advantage * rho) / (-radius * log_rho.shape[-1])
    return (pull.unsqueeze(2) @ _centred(actions.weights) @ actions.frame).squeeze(2), clipped


def adapted_radius(radius: Tensor, spread: Tensor, least: float = 0.1, most: float = 0.3) -> Tensor:
    """Return the radius one step nearer to where ``std(log rho)`` lies between ``least`` and ``most``.

    A given lag of the old policy changes log rho by the lag over the radius: too large a spread widens the
    radius.
    """
    factor = torch.where(spread > most, 1.05, torch.where(spread < least, 1 / 1.05, 1.0))
    return radius * factor


def _centred(weights: Tensor) -> Tensor:
    return weights - weights.mean(2, keepdim=True)
