"""Where a caller may look into, or act on, a transformer's forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

TokenTap = Callable[[Tensor], Tensor]
AttentionTap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Taps:
    """Functions that the transformer calls at given blocks, counted from 1.

    ``tokens[d]`` receives the hidden tokens after block ``d``, shape (B, N, D), and returns the tokens that the
    next block reads. ``attention[d]`` receives block ``d``'s queries, keys and values, each (B, heads, N, head_dim),
    after any QK normalisation, and returns the ones to attend with.
    """

    tokens: Mapping[int, TokenTap] = field(default_factory=dict)
    attention: Mapping[int, AttentionTap] = field(default_factory=dict)


NO_TAPS = Taps()
