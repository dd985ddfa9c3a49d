"""The seam: an identity on the tokens whose backward pass turns what generation asks for into an alignment
gradient.

The alignment gradient depends on ``g``, the gradient of the denoising loss at the aligned tokens, which
exists only during the backward pass. The seam is an ordinary node of the graph between two blocks, so one
forward and one backward suffice, and whatever wraps the blocks on either side (compilation, checkpointing,
sharding) is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Respond = Callable[..., Sequence[Tensor | None]]


class Seam(torch.autograd.Function):
    """Identity on ``h``; backward gives ``h`` the incoming gradient and each ``u`` what ``respond`` makes
    of it.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, respond: Respond, *directions: Tensor) -> Tensor:
        """Return ``h`` (B, N, D), unchanged to the bit and in its own precision."""
        ctx.respond = respond
        ctx.save_for_backward(*directions)
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``g`` for ``h`` and ``respond(g, *directions)`` for the directions, computed without
        autocast.
        """
        with torch.autocast(g.device.type, enabled=False):
            answers = ctx.respond(g, *ctx.saved_tensors)
        return g, None, *answers


def attach(h: Tensor, directions: Sequence[Tensor], respond: Respond) -> Tensor:
    """Return ``h`` joined to ``directions``: their gradient will be ``respond(g, *directions)``.

    ``h`` is (B, N, D), ``g`` its incoming gradient in the same shape and precision, and each direction a
    (B, N, C) unit vector field that may depend on ``h`` as it was before the seam. ``respond`` runs once in
    the backward pass, without gradients, and returns one tensor (or None) for each direction.
    """
    return Seam.apply(h, respond, *directions)
