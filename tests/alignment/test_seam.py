"""The seam is an identity that answers in the backward pass, whatever wraps the blocks beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrpo.alignment.seam import attach


def _respond(g: Tensor, *us: Tensor) -> list[Tensor]:
    return [2 * g.float() + u for u in us]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_identity_to_the_bit(dtype: torch.dtype) -> None:
    h = torch.randn(2, 3, 4).to(dtype)
    h[0, 0, 0] = torch.nan
    out = attach(h, [torch.randn(2, 3, 4, requires_grad=True)], _respond)
    assert out.dtype == dtype
    assert torch.equal(out.view(torch.uint8), h.view(torch.uint8))


def test_backward_passes_g_on_and_answers_each_direction() -> None:
    h = torch.randn(2, 3, 4, requires_grad=True)
    first, second = torch.randn(2, 2, 3, 4).unbind(0)
    first.requires_grad_()
    second.requires_grad_()
    g = torch.randn(2, 3, 4)
    attach(h, [first, second], _respond).backward(g)
    assert h.grad is not None
    assert torch.equal(h.grad, g)
    torch.testing.assert_close(first.grad, 2 * g + first)
    torch.testing.assert_close(second.grad, 2 * g + second)


def test_the_answer_is_computed_once_without_autocast_or_graph() -> None:
    calls = []

    def respond(g: Tensor, u: Tensor) -> list[Tensor]:
        calls.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), (g @ u.mT).dtype))
        return [u]

    h, u = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        attach(h, [u], respond).sum().backward()
    assert calls == [(False, False, torch.float32)]


class _Net(nn.Module):
    """Two blocks, and a seam between them whose answer depends on g and reaches the lower block."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.upper = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.projector = nn.Linear(6, 5)

    def forward(self, x: Tensor, wrap_lower=lambda f: f, wrap_upper=lambda f: f) -> Tensor:
        h = wrap_lower(self.lower)(x)
        weight = self.projector.weight
        h = attach(h, [self.projector(h)], lambda g, u: [(g @ weight.T) * u])
        return wrap_upper(self.upper)(h)


def _gradients(net: _Net, **wraps) -> list[Tensor]:
    torch.manual_seed(1)
    net.zero_grad()
    net(torch.randn(3, 4, 6), **wraps).square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_checkpointing_on_either_side_changes_no_gradient() -> None:
    net = _Net()
    expected = _gradients(net)
    for reentrant in (False, True):

        def wrap(block, reentrant=reentrant):
            return lambda x: checkpoint(block, x.requires_grad_(), use_reentrant=reentrant)

        for wraps in ({"wrap_lower": wrap}, {"wrap_upper": wrap}, {"wrap_lower": wrap, "wrap_upper": wrap}):
            for found, wanted in zip(_gradients(net, **wraps), expected, strict=True):
                assert torch.equal(found, wanted)


def test_checkpointing_around_the_seam_changes_no_gradient() -> None:
    net = _Net()
    expected = _gradients(net)
    torch.manual_seed(1)
    net.zero_grad()
    checkpoint(net, torch.randn(3, 4, 6), use_reentrant=False).square().mean().backward()
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, wanted)


def test_compiled_blocks_on_either_side_give_the_same_gradients() -> None:
    net = _Net()
    expected = _gradients(net)
    wraps = {"wrap_lower": lambda f: torch.compile(f, backend="aot_eager"), "wrap_upper": torch.compile}
    wraps["wrap_upper"] = wraps["wrap_lower"]
    for found, wanted in zip(_gradients(net, **wraps), expected, strict=True):
        torch.testing.assert_close(found, wanted)
