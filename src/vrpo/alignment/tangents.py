"""Derivatives of a projector along a tangent, at the cost of the tangent alone.

Forward-mode differentiation computes output and derivative together. In the backward pass of a step the output
is known, and the pre-activations that the derivative needs were computed on the way: they are kept, and half the
work is saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.alignment.projector import ConvProjector, MLPProjector

Pushforward = Callable[[Tensor], Tensor]


def linearize(projector: nn.Module, h: Tensor) -> tuple[Tensor, Pushforward]:
    """Return ``projector(h)`` and the map from a tangent of ``h`` (B, N, D) to that of the output, (B, N, C).

    The map runs without gradients, in the precision in which the projector ran: bfloat16 or wider, so that
    gradients of any magnitude are in range. It returns float32 or wider.
    """
    if isinstance(projector, ConvProjector):
        return projector(h), torch.no_grad()(projector.push)
    assert isinstance(projector, MLPProjector)
    kept: list[Tensor] = []
    layers = (projector.first, projector.second)
    hooks = [layer.register_forward_hook(lambda _m, _i, out: kept.append(out.detach())) for layer in layers]
    try:
        output = projector(h)
    finally:
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def pushforward(g: Tensor) -> Tensor:
        for layer, before in zip(layers, kept, strict=True):
            # The kernel of SiLU's backward pass multiplies by SiLU's derivative, which is what a tangent
            # needs too.
            g = torch.ops.aten.silu_backward(_linear(g, layer.weight, before.dtype), before)
        return _linear(g, projector.last.weight, g.dtype).to(output.dtype)

    return output, pushforward


def improvement(pushforward: Pushforward, projected: Tensor, g: Tensor) -> Tensor:
    """Return ``q = -J g`` (B, N, C) with J the derivative of ``u = p(h)/|p(h)|``; tangent to the sphere at
    ``u``.

    ``projected`` is ``p(h)``, and ``g`` (B, N, D) the gradient of a loss at ``h``. Moving ``h`` by ``eta
    J'(a - u)`` changes that loss by ``-eta <q, a - u>`` to first order.
    """
    length = torch.linalg.vector_norm(projected, dim=-1, keepdim=True).clamp_min(1e-6)
    u = projected / length
    moved = pushforward(g)
    return ((moved * u).sum(-1, keepdim=True) * u - moved) / length


def _linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), whole(weight).to(dtype))


def whole(weight: Tensor) -> Tensor:
    """Return a weight that FSDP2 may have sharded, gathered."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
