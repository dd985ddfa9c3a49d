"""The spherical policy against its definition on materialised actions, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vrpo.alignment.policy import (
    Actions,
    adapted_radius,
    antithetic,
    log_ratio,
    orthonormal_frame,
    sample_actions,
    surrogate_gradient,
    tangent,
)

B, N, G, K, C = 2, 3, 6, 4, 10


def _policy(radius: float = 0.3) -> Actions:
    mean = F.normalize(torch.randn(B, N, C, dtype=torch.float64), dim=-1)
    frame = orthonormal_frame(mean, [torch.randn(B, N, C, dtype=torch.float64) for _ in range(K)])
    half = torch.randn(B, N, G // 2, K, dtype=torch.float64)
    return sample_actions(frame, antithetic(half, G), radius)


def test_the_frame_is_orthonormal_even_for_nearly_parallel_directions() -> None:
    mean = F.normalize(torch.randn(B, N, C), dim=-1)
    first = torch.randn(B, N, C)
    frame = orthonormal_frame(mean, [first, first + 1e-3 * torch.randn(B, N, C), torch.randn(B, 1, C)])
    torch.testing.assert_close(frame @ frame.mT, torch.eye(4).expand(B, N, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(frame[:, :, 0], mean)


def test_a_direction_that_is_zero_or_repeated_or_radial_is_not_explored() -> None:
    mean = F.normalize(torch.randn(B, N, C), dim=-1)
    first = torch.randn(B, N, C)
    frame = orthonormal_frame(mean, [first, torch.zeros(B, N, C), -3 * first, 2 * mean])
    assert torch.equal(frame[:, :, 2:], torch.zeros(B, N, 3, C))
    actions = sample_actions(frame, torch.randn(B, N, G, 4), 0.5)
    torch.testing.assert_close(actions.tensor().norm(dim=-1), torch.ones(B, N, G))


def test_actions_are_the_normalised_steps_of_the_definition() -> None:
    actions = _policy(0.4)
    half = torch.randn(B, N, G // 2, K, dtype=torch.float64)
    coordinates = torch.stack([half, -half], 3).flatten(2, 3)
    actions = sample_actions(actions.frame, coordinates, 0.4)
    mean, basis = actions.frame[:, :, :1], actions.frame[:, :, 1:]
    expected = F.normalize(mean + 0.4 * coordinates @ basis, dim=-1)
    torch.testing.assert_close(actions.tensor(), expected)
    # Antithetic: pairs mirror each other about the mean.
    torch.testing.assert_close(
        expected[:, :, 0] + expected[:, :, 1], 2 * (expected[:, :, 0] * mean[:, :, 0]).sum(-1, True) * mean[:, :, 0]
    )


def test_products_with_actions_need_no_actions() -> None:
    actions = _policy()
    vectors = torch.randn(B, N, C, dtype=torch.float64)
    matrix = torch.randn(7, C, dtype=torch.float64)
    torch.testing.assert_close(actions.dot(vectors), (actions.tensor() * vectors.unsqueeze(2)).sum(-1))
    torch.testing.assert_close(actions.project(matrix), actions.tensor() @ matrix.T)
    mean = actions.frame[:, :, 0]
    torch.testing.assert_close(Actions.at(mean).tensor().squeeze(2), mean)


def test_the_ratio_is_one_at_the_old_policy_and_one_on_average_nearby() -> None:
    actions = _policy()
    old = actions.frame[:, :, 0]
    assert torch.equal(log_ratio(old, actions, 0.3), torch.zeros(B, N, G, dtype=torch.float64))
    u = F.normalize(old + 0.05 * torch.randn_like(old), dim=-1)
    log_rho = log_ratio(u, actions, 0.3)
    torch.testing.assert_close(log_rho.mean(-1), torch.zeros(B, N, dtype=torch.float64))
    a = actions.tensor()
    expected = ((u - old).unsqueeze(2) * (a - a.mean(2, keepdim=True))).sum(-1) / 0.3**2
    torch.testing.assert_close(log_rho, expected)


@pytest.mark.parametrize("lag", [0.0, 0.05, 0.6])
def test_the_surrogate_gradient_is_autograd_of_the_clipped_surrogate(lag: float) -> None:
    radius, low, high = 0.3, 0.2, 0.28
    actions = _policy(radius)
    old = actions.frame[:, :, 0]
    u = F.normalize(old + lag * torch.randn_like(old), dim=-1).requires_grad_()
    advantage = torch.randn(B, N, G, dtype=torch.float64)
    a = actions.tensor()
    log_rho = ((u - old).unsqueeze(2) * (a - a.mean(2, keepdim=True))).sum(-1) / radius**2
    rho = log_rho.exp()
    surrogate = torch.minimum(rho * advantage, rho.clamp(1 - low, 1 + high) * advantage)
    surrogate = torch.where(advantage < 0, surrogate.clamp_min(3 * advantage), surrogate)
    (-radius * surrogate.mean(-1)).sum().backward()
    with torch.no_grad():
        gradient, clipped = surrogate_gradient(log_ratio(u, actions, radius), advantage, actions, radius, low, high)
    torch.testing.assert_close(gradient, u.grad)
    assert bool(clipped.any()) == (lag > 0)


def test_a_shifted_group_of_advantages_changes_nothing_at_the_old_policy() -> None:
    actions = _policy()
    advantage = torch.randn(B, N, G, dtype=torch.float64)
    flat = torch.zeros(B, N, G, dtype=torch.float64)
    first, _ = surrogate_gradient(flat, advantage, actions, 0.3, 0.2, 0.28)
    second, _ = surrogate_gradient(flat, advantage + 5, actions, 0.3, 0.2, 0.28)
    torch.testing.assert_close(first, second)


def test_the_gradient_is_of_order_one_whatever_the_radius() -> None:
    mean = F.normalize(torch.randn(1, 50, C, dtype=torch.float64), dim=-1)
    wanted = F.normalize(tangent(torch.randn(1, 50, C, dtype=torch.float64), mean), dim=-1)
    frame = orthonormal_frame(mean, [wanted])
    for radius in (0.01, 0.05):
        actions = sample_actions(frame, antithetic(torch.randn(1, 50, 256, 1, dtype=torch.float64), 512), radius)
        scores = actions.dot(wanted)
        advantage = (scores - scores.mean(-1, True)) / scores.std(-1, keepdim=True)
        flat = torch.zeros_like(scores)
        gradient, _ = surrogate_gradient(flat, advantage, actions, radius, 0.2, 0.28)
        torch.testing.assert_close(gradient, -wanted, atol=0.15, rtol=0)
        assert abs(gradient.norm(dim=-1).mean() - 1) < 0.02


def test_the_radius_moves_towards_the_wanted_spread() -> None:
    radius = torch.tensor(0.3)
    assert adapted_radius(radius, torch.tensor(0.5)) > radius
    assert adapted_radius(radius, torch.tensor(0.01)) < radius
    assert adapted_radius(radius, torch.tensor(0.2)) == radius
    assert adapted_radius(radius, torch.tensor(torch.nan)) == radius
