"""From several rewards to one direction of improvement, of a size that does not depend on the rewards' units.

The same four rules serve both modes. Sampled, a component is a reward's centred scores over the group of
actions (B, N, G) and its length is their standard deviation; analytic, a component is the reward's tangent
preference (B, N, C) and its length is the Euclidean norm, to which the former tends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Where sigma0 is zero and every reward is flat, the advantage is zero, not undefined.
_TINY = 1e-20

Length = Callable[[Tensor], Tensor]


def group_spread(scores: Tensor) -> Tensor:
    """Return the standard deviation of centred scores over the group, (..., G) -> (..., 1)."""
    return scores.square().mean(-1, keepdim=True).sqrt()


def norm(preference: Tensor) -> Tensor:
    """Return the Euclidean length of a preference, (..., C) -> (..., 1)."""
    return torch.linalg.vector_norm(preference, dim=-1, keepdim=True)


def combine(
    components: Sequence[Tensor], weights: Sequence[float], *, rule: str, sigma0: float, length: Length
) -> Tensor:
    """Return the advantage of several rewards, in the shape of one component.

    Components ``x_k`` are already divided by their running size ``s_k``. The rules:

    - ``agreement``: ``sum w_k x_k / (sum w_k |x_k| + sigma0)``. Rewards that conflict shrink the result
      instead of one of them winning, and ``sigma0`` keeps rewards that have collapsed from being amplified.
    - ``sum``: ``x / (|x| + sigma0)`` with ``x = sum w_k x_k``: always full size (GRPO on the summed reward).
    - ``per-reward``: ``sum w_k x_k / (|x_k| + sigma0) / sum w_k``: each reward at full size.
    - ``centred``: ``sum w_k x_k / sum w_k``: no normalisation within the group (Dr. GRPO, arXiv 2503.20783).
    """
    total_weight = sum(abs(weight) for weight in weights)
    if rule == "per-reward":
        components = [x / (length(x) + sigma0).clamp_min(_TINY) for x in components]
    total = _weighted(components, weights)
    if rule in ("per-reward", "centred"):
        return total / total_weight
    if rule == "sum":
        return total / (length(total) + sigma0).clamp_min(_TINY)
    spread = _weighted([length(x) for x in components], [abs(weight) for weight in weights])
    return total / (spread + sigma0).clamp_min(_TINY)


def _weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = torch.add(total, term, alpha=weight)
    return total
