"""Projectors and the unit sphere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vrpo.alignment.projector import ConvProjector, MLPProjector, unit


def test_mlp_is_the_published_network() -> None:
    projector = MLPProjector(6, 5, width=8)
    published = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 5))
    published.load_state_dict(dict(zip(published.state_dict(), projector.state_dict().values(), strict=True)))
    h = torch.randn(3, 4, 6)
    torch.testing.assert_close(projector(h), published(h))


def test_mlp_starts_xavier_uniform_with_zero_bias() -> None:
    projector = MLPProjector(100, 300, width=200)
    for layer in (projector.first, projector.second, projector.last):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert layer.bias.abs().max() == 0


def test_convolution_reads_the_row_major_neighbourhood() -> None:
    projector = ConvProjector(1, 1)
    with torch.no_grad():
        projector.conv.weight.zero_()
        projector.conv.bias.zero_()
        projector.conv.weight[0, 0, 1, 2] = 1.0  # the right neighbour
        projector.conv.weight[0, 0, 0, 1] = 10.0  # the upper neighbour
    grid = torch.arange(1.0, 10.0)
    right = torch.tensor([2.0, 3, 0, 5, 6, 0, 8, 9, 0])
    upper = torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 5, 6])
    torch.testing.assert_close(projector(grid.view(1, 9, 1)).flatten(), right + 10 * upper)


@pytest.mark.parametrize("kind", [MLPProjector, ConvProjector])
def test_half_precision_range_gives_finite_directions_and_gradients(kind: type[nn.Module]) -> None:
    projector = kind(64, 5)
    h = torch.full((1, 4, 64), 6e4, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        u = unit(projector(h))
    u.sum().backward()
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(1, 4))
    assert torch.isfinite(h.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in projector.parameters())


@pytest.mark.parametrize("kind", [MLPProjector, ConvProjector])
def test_bfloat16_autocast_returns_float32_near_the_exact_result(kind: type[nn.Module]) -> None:
    projector = kind(16, 8)
    h = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = projector(h)
    assert output.dtype == torch.float32
    assert not torch.equal(output, projector(h))
    torch.testing.assert_close(output, projector(h), atol=0.05, rtol=0.05)


def test_unit_matches_plain_division_and_is_safe_at_zero() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(unit(x), x / x.pow(2).sum(1, keepdim=True).sqrt())
    assert torch.autograd.gradcheck(unit, x.requires_grad_())
    zero = torch.zeros(2, 3, requires_grad=True)
    unit(zero).sum().backward()
    assert unit(zero).abs().max() == 0
    assert torch.isfinite(zero.grad).all()
    assert unit(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
