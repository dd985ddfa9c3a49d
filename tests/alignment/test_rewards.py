"""Every reward's preference is the gradient of its own score, and scores are their formulas on real
actions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrpo.alignment import probe  # noqa: F401  (registers the perceptual reward)
from vrpo.alignment.objective import AlignmentBatch
from vrpo.alignment.policy import Actions, antithetic, orthonormal_frame, sample_actions
from vrpo.alignment.projector import ConvProjector, MLPProjector
from vrpo.alignment.rewards import Reward, RewardContext, build_reward, register_reward
from vrpo.alignment.schedule import Schedule
from vrpo.alignment.tangents import improvement, linearize
from vrpo.errors import ConfigError

B, N = 2, 16


def _context(width: int, gradient: bool = True) -> RewardContext:
    def unit() -> Tensor:
        return F.normalize(torch.randn(B, N, width, dtype=torch.float64), dim=-1)

    batch = AlignmentBatch(
        targets=(),
        time=torch.rand(B, dtype=torch.float64),
        clean=torch.randn(B, 3, 8, 8),
        images=torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8),
        images_seen=0,
        budget=1,
        sample_weight=1.0,
    )
    q = torch.randn(B, N, width, dtype=torch.float64) if gradient else None
    return RewardContext(unit(), unit(), q, batch)


def _reward(name: str, width: int, context: RewardContext) -> Reward:
    reward = build_reward(name, width).double()
    if name == "perceptual":
        # The descriptors need statistics before they count.
        reward.loss(context)
        reward.update()
        context.memo.clear()
    return reward


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("name", ["semantic", "relational", "fidelity", "perceptual"])
def test_the_preference_is_the_gradient_of_the_score(name: str, width: int) -> None:
    context = _context(width)
    reward = _reward(name, width, context)
    vectors = context.mean.clone().requires_grad_()
    # A frame of two with no weight on the second takes the general path of every score.
    actions = Actions(
        torch.stack([vectors, torch.zeros_like(vectors)], 2),
        torch.tensor([1.0, 0.0], dtype=torch.float64).expand(B, N, 1, 2),
    )
    reward.score(actions, context).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().max() > 0
    torch.testing.assert_close(reward.preference(context), vectors.grad)


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("name", ["semantic", "relational", "fidelity", "perceptual"])
def test_the_score_at_the_mean_is_the_score_of_one_action(name: str, width: int) -> None:
    context = _context(width)
    reward = _reward(name, width, context)
    frame = orthonormal_frame(context.mean, [torch.randn_like(context.mean)])
    unmoved = Actions(frame, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(B, N, 1, 2))
    torch.testing.assert_close(reward.score(Actions.at(context.mean), context), reward.score(unmoved, context))


@pytest.mark.parametrize("width", [8, 24])
def test_relational_is_the_mean_squared_difference_of_agreement(width: int) -> None:
    context = _context(width)
    y = context.target
    frame = orthonormal_frame(context.mean, [torch.randn_like(y) for _ in range(3)])
    actions = sample_actions(frame, antithetic(torch.randn(B, N, 4, 3, dtype=torch.float64), 8), 0.5)
    a = actions.tensor()
    agreement = torch.einsum("bngc,bmc->bngm", a, y) - torch.einsum("bnc,bmc->bnm", y, y).unsqueeze(2)
    torch.testing.assert_close(build_reward("relational", width).score(actions, context), -agreement.square().mean(-1))


def test_the_probe_learns_without_moving_the_representation() -> None:
    context = _context(24, gradient=False)
    mean = context.mean.float().requires_grad_()
    context = replace(
        context, mean=mean.detach(), target=context.target.float(), batch=replace(context.batch, time=torch.rand(B))
    )
    reward = build_reward("perceptual", 24)
    optimiser = torch.optim.Adam(reward.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        context.memo.clear()
        optimiser.zero_grad()
        loss = reward.loss(context)
        assert loss is not None
        loss.backward()
        optimiser.step()
        reward.update()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[1]
    assert losses[1] == pytest.approx(1.0, abs=0.6)
    assert mean.grad is None


def test_the_first_step_has_descriptors_of_zero_not_of_the_wrong_scale() -> None:
    context = _context(24)
    reward = build_reward("perceptual", 24).double()
    assert reward.score(Actions.at(context.mean), context).abs().max() < 10


def test_a_reward_is_added_from_outside() -> None:
    @register_reward("test-first-channel")
    def first_channel(actions: Actions, context: RewardContext) -> Tensor:
        return actions.tensor()[..., 0]

    @register_reward("test-second-channel")
    class SecondChannel(Reward):
        def score(self, actions: Actions, context: RewardContext) -> Tensor:
            return actions.tensor()[..., 1]

        def preference(self, context: RewardContext) -> Tensor:
            return F.one_hot(torch.tensor(1), self.width).expand_as(context.mean).to(context.mean.dtype)

    context = _context(8)
    score = build_reward("test-first-channel", 8).score(Actions.at(context.mean), context)
    torch.testing.assert_close(score.squeeze(-1), context.mean[..., 0])
    assert not build_reward("test-first-channel", 8).differentiable
    assert build_reward("test-second-channel", 8).preference(context).shape == (B, N, 8)


def test_an_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'semantics'.*'semantic'"):
        build_reward("semantics", 8)


def test_weights_follow_straight_lines_between_points() -> None:
    schedule = Schedule({"2k": 0.0, "0": 1.0, "1k": 0.5}, "align.vrpo.semantic")
    assert [schedule(n) for n in (0, 500, 1000, 1500, 2000, 9000)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert Schedule(0.3, "x")(12) == 0.3
    assert Schedule({"1k": 2.0}, "x")(0) == 2.0
    assert Schedule({"0": 0.0, "1k": 0.0}, "x").is_zero
    assert not schedule.is_zero
    with pytest.raises(ConfigError, match=r"align\.vrpo\.semantic.*'soon'"):
        Schedule({"soon": 1.0}, "align.vrpo.semantic")
    with pytest.raises(ConfigError, match="empty"):
        Schedule({}, "align.vrpo.semantic")


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_pushforward_is_forward_mode_differentiation(kind: str) -> None:
    projector = (MLPProjector(6, 5, 16) if kind == "mlp" else ConvProjector(6, 5)).double()
    h, g = torch.randn(2, B, N, 6, dtype=torch.float64).unbind(0)
    output, pushforward = linearize(projector, h)
    expected, derivative = torch.func.jvp(projector, (h,), (g,))
    assert torch.equal(output, expected)
    torch.testing.assert_close(pushforward(g), derivative)
    _, of_u = torch.func.jvp(lambda x: F.normalize(projector(x), dim=-1), (h,), (g,))
    torch.testing.assert_close(improvement(pushforward, output, g), -of_u)


def test_linearising_leaves_the_projector_as_it_was() -> None:
    projector = MLPProjector(6, 5, 16)
    linearize(projector, torch.randn(1, 4, 6))
    assert not projector.first._forward_hooks
    h = torch.randn(1, 4, 6, requires_grad=True)
    first, _ = linearize(projector, h)
    assert torch.equal(*torch.autograd.grad(first.sum(), h), *torch.autograd.grad(projector(h).sum(), h))
