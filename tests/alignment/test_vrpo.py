"""The properties that docs/method.md claims of VRPO, each against an independent computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import (
    BATCH,
    HIDDEN,
    ISOLATED,
    PURE,
    TOKENS,
    WIDTH,
    Data,
    accumulate,
    flat,
    gradients,
    objective,
    policy_part,
    same,
    train,
    trunk,
    warm,
)

from vrpo.alignment.objective import Objective
from vrpo.alignment.policy import Actions
from vrpo.alignment.projector import MLPProjector, unit
from vrpo.alignment.rewards import Reward, RewardContext, register_reward
from vrpo.alignment.seam import attach
from vrpo.alignment.tangents import improvement, linearize
from vrpo.models.taps import Taps


@pytest.mark.parametrize("base", ["repa", "irepa"])
def test_property_1_repa_is_a_special_case_to_the_bit(base: str) -> None:
    shape: dict[str, Any] = {"depths": (1, 2), "widths": (WIDTH, 10)}
    net, data = trunk(), Data(widths=(WIDTH, 10))
    found = []
    for align in (objective(base, **shape), objective(**shape, base=base, **PURE)):
        accumulate(net, align, data)
        found.append(gradients(net, align))
    assert same(*found)


@pytest.mark.parametrize(
    "settings",
    [{"alpha_end": 1.0, "gate": True}, {"gate": True}, {"gate": False}, {"mode": "sampled"}],
    ids=["gate-alone", "start-of-warm-up", "no-gate", "sampled"],
)
def test_property_1_holds_to_the_bit_with_the_seam_in_place(settings: dict[str, Any]) -> None:
    """At ``alpha = 1`` and ``omega = 1`` the seam measures and adds nothing.

    It sums what arrives from the blocks above before the projectors' gradients join; REPA as such leaves
    that order to autograd, so the reference is REPA with an identity node in the seam's place.
    """

    def on_node(align: Any) -> Any:
        keep = align._keep
        align._keep = lambda depth, h: keep(depth, h).view_as(h)
        return align

    shape: dict[str, Any] = {"depths": (1, 2), "widths": (WIDTH, 10)}
    net, data = trunk(), Data(widths=(WIDTH, 10))
    accumulate(net, on_node(objective("repa", **shape)), data, seen=0)
    expected = gradients(net)
    align = objective(perceptual=0.0, trust=0.0, **shape, **settings)
    assert align.repa_only is False
    accumulate(net, align, data, seen=0)
    assert same(gradients(net), expected)


def test_a_run_of_50_steps_is_repa_s_to_the_bit() -> None:
    runs = []
    for align in (objective("repa"), objective(**PURE)):
        net = trunk(zero_output=True)
        losses = train(net, align, 50)
        runs.append((losses, net.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_an_objective_that_returns_the_tap_unchanged_is_none_to_the_bit() -> None:
    class Identity(Objective):
        def taps(self, batch: Any) -> Taps:
            u = torch.zeros(BATCH, TOKENS, 2, requires_grad=True)
            return Taps(tokens={2: lambda h: attach(h, [u], lambda g, u: [u])})

    runs = []
    for align in (Objective(), Identity()):
        net = trunk(zero_output=True)
        runs.append((train(net, align, 10), net.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


@register_reward("test-constant")
def _constant(actions: Actions, context: RewardContext) -> Tensor:
    return torch.full(actions.weights.shape[:3], 3.7) + context.target.sum(-1, keepdim=True)


def test_property_2_a_reward_constant_over_the_group_changes_no_gradient() -> None:
    found = []
    for rewards in ({}, {"test-constant": 2.0}):
        net, align = trunk(), objective(mode="sampled", rewards=rewards)
        warm(net, align)
        accumulate(net, align, Data(), generator=torch.Generator().manual_seed(5))
        found.append(flat(gradients(net)))
    assert torch.equal(*found)


def test_property_3_actions_have_ratio_one_at_the_old_policy() -> None:
    net, align = trunk(), objective(mode="sampled", **ISOLATED)
    accumulate(net, align, Data())
    align.update()
    logs = align.logs()
    assert logs["ratio_std"] == 0
    assert logs["clip_fraction"] == 0


def test_property_4_the_sampled_gradient_tends_to_the_analytic_one() -> None:
    found = {}
    for mode in ("analytic", "sampled"):
        settings = {"group": 4096, "radius": 0.02} if mode == "sampled" else {}
        net, align = trunk(), objective(mode=mode, adapt_radius=False, **ISOLATED, **settings)
        warm(net, align, 2)
        found[mode] = flat(policy_part(net, align, Data(), generator=torch.Generator().manual_seed(5)))
    assert F.cosine_similarity(found["analytic"], found["sampled"], dim=0) > 0.99
    assert found["sampled"].norm() / found["analytic"].norm() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rule", ["agreement", "sum", "per-reward", "centred"])
def test_property_4_holds_for_every_normaliser(rule: str) -> None:
    found = {}
    for mode in ("analytic", "sampled"):
        settings = {"group": 1024, "radius": 0.02} if mode == "sampled" else {}
        net, align = trunk(), objective(mode=mode, adapt_radius=False, advantage=rule, **ISOLATED, **settings)
        warm(net, align, 2)
        found[mode] = flat(policy_part(net, align, Data(), generator=torch.Generator().manual_seed(5)))
    assert F.cosine_similarity(found["analytic"], found["sampled"], dim=0) > 0.98


def test_the_isotropic_basis_is_far_noisier_than_the_informed_one() -> None:
    cosines = {}
    for basis in ("informed", "isotropic"):
        net = trunk()
        analytic, sampled = objective(**ISOLATED), objective(mode="sampled", basis=basis, **ISOLATED)
        found = []
        for align in (analytic, sampled):
            warm(net, align, 2)
            policy = align.policies[0]
            seen = {}

            def keep(*arguments: Any, ascent: Any = policy.ascent, seen: dict[str, Any] = seen) -> Any:
                seen["direction"], observed = ascent(*arguments)
                return seen["direction"], observed

            policy.ascent = keep
            accumulate(net, align, Data(), generator=torch.Generator().manual_seed(5))
            found.append(seen["direction"])
        cosines[basis] = F.cosine_similarity(*found, dim=-1).mean().item()
    assert cosines["informed"] > 0.6
    assert 0 < cosines["isotropic"] < cosines["informed"] - 0.15


def test_property_5_opposed_rewards_leave_nothing_and_equal_ones_everything() -> None:
    @register_reward("test-opposed")
    class Opposed(Reward):
        def preference(self, context: RewardContext) -> Tensor:
            return -context.target

        def score(self, actions: Actions, context: RewardContext) -> Tensor:
            return -actions.dot(context.target)

    off = {"relational": 0.0, "fidelity": 0.0, **ISOLATED}
    sizes = {}
    for name, rewards in (("alone", {}), ("opposed", {"test-opposed": 1.0})):
        net, align = trunk(), objective(rewards=rewards, **off)
        warm(net, align)
        accumulate(net, align, Data())
        align.update()
        sizes[name] = align.logs()["direction_norm"].item()
    assert sizes["alone"] == pytest.approx(0.8, abs=0.01)
    assert sizes["opposed"] < 1e-6


def test_property_6_q_predicts_the_change_of_the_denoising_loss() -> None:
    """A step along ``J'(a - u)`` at every token, measured by running the upper blocks again in float64."""
    net, data = trunk().double(), Data()
    projector = MLPProjector(HIDDEN, WIDTH, 48).double()
    noised = data.noise.double()
    target = torch.randn_like(noised)
    captured: dict[str, Tensor] = {}

    def loss_at(shift: Tensor | None) -> Tensor:
        def tap(h: Tensor) -> Tensor:
            if shift is not None:
                return h + shift
            captured["h"] = h.detach().requires_grad_()
            return captured["h"]

        output = net(noised, data.time.double(), data.labels, Taps(tokens={2: tap}))
        return (output - target).square().mean((1, 2, 3))

    loss_at(None).sum().backward()
    h = captured["h"]
    g = h.grad
    assert g is not None
    with torch.no_grad():
        projected, pushforward = linearize(projector, h)
        u = unit(projected)
        q = improvement(pushforward, projected, g)
        before = loss_at(None)
        predicted, measured = [], []
        for _ in range(40):
            step = torch.randn_like(u)
            step = step - (step * u).sum(-1, keepdim=True) * u
            _, pullback = torch.func.vjp(lambda x: unit(projector(x)), h)
            (moved,) = pullback(step)
            eta = 1e-3 / moved.norm(dim=(1, 2)).mean()
            measured.append((loss_at(eta * moved) - before) / eta)
            predicted.append(-(q * step).sum((1, 2)))
    pair = torch.stack([torch.cat(predicted), torch.cat(measured)])
    assert torch.corrcoef(pair)[0, 1] > 0.95
    torch.testing.assert_close(pair[0].std(), pair[1].std(), rtol=0.05, atol=0)


@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_property_7_neither_batch_split_nor_loss_scale_matters(mode: str) -> None:
    results = []
    for parts, scale in ((1, 1.0), (2, 1.0), (4, 1.0), (1, 1024.0), (2, 65536.0)):
        net, align = trunk(), objective(mode=mode)
        warm(net, align)
        data, source = Data(), torch.Generator().manual_seed(3)
        size = BATCH // parts
        for start in range(0, BATCH, size):
            accumulate(net, align, data, part=slice(start, start + size), scale=scale, generator=source)
        found = {name: value / scale for name, value in gradients(net, align).items()}
        align.update()
        results.append((found, {name: value.clone() for name, value in align.state_dict().items()}))
    for found, state in results[1:]:
        for name, value in found.items():
            torch.testing.assert_close(value, results[0][0][name], rtol=2e-3, atol=2e-6)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_property_8_shuffled_advantages_have_no_mean_gradient() -> None:
    means = {}
    for shuffled in (False, True):
        net, align = trunk(), objective(mode="sampled", shuffle_advantages=shuffled, **ISOLATED)
        warm(net, align)
        draws = [
            flat(policy_part(net, align, Data(), generator=torch.Generator().manual_seed(seed))) for seed in range(24)
        ]
        means[shuffled] = torch.stack(draws).mean(0).norm()
    assert means[True] < 0.3 * means[False]


def test_the_agreement_is_the_cosine_of_tangents_in_the_images_own_gradient() -> None:
    net, align, data = trunk(), objective(), Data()
    captured: dict[str, Tensor] = {}

    def tapped(x: Tensor, t: Tensor, labels: Tensor, taps: Taps) -> Tensor:
        def tap(h: Tensor) -> Tensor:
            captured["h"] = h.detach()
            out = taps.tokens[2](h)
            out.register_hook(lambda g: captured.update(g=g))
            return out

        return net(x, t, labels, Taps(tokens={2: tap}))

    accumulate(tapped, align, data)
    align.update()
    h, g = captured["h"], captured["g"] * BATCH
    _, pushed = torch.func.jvp(lambda x: unit(align.projectors[0](x)), (h,), (g,))
    u, y = unit(align.projectors[0](h)), unit(data.targets[0])
    expected = F.cosine_similarity(y - (y * u).sum(-1, keepdim=True) * u, -pushed, dim=-1).mean(1)
    logs = align.logs()
    for index in range(10):
        chosen = (data.time * 10).long() == index
        if chosen.any():
            torch.testing.assert_close(logs["agreement"][index], expected[chosen].mean(), rtol=1e-3, atol=1e-5)
        else:
            assert logs["agreement"][index].isnan()


def test_the_total_is_the_sum_of_its_three_parts() -> None:
    """The whole gradient against one written out with autograd, from the direction that the policy reports."""
    net, data = trunk(), Data()
    align = objective(perceptual=0.0, warmup=1.0, trust=0.3, mode="sampled", adapt_radius=False)
    warm(net, align)
    with torch.no_grad():
        for old in align.policies[0].old.buffers():
            old.add_(0.05 * torch.randn_like(old))
    policy, seen = align.policies[0], {}

    def keep(*arguments: Any, ascent: Any = policy.ascent) -> Any:
        seen["direction"], observed = ascent(*arguments)
        return seen["direction"], observed

    policy.ascent = keep
    found = policy_part(net, align, data, seen=25)
    tokens: dict[str, Tensor] = {}

    def keep_tokens(h: Tensor) -> Tensor:
        tokens["h"] = h
        return h

    t = data.time.view(-1, 1, 1, 1)
    net((1 - t) * data.clean + t * data.noise, data.time, data.labels, Taps(tokens={2: keep_tokens}))
    u, y = unit(align.projectors[0](tokens["h"])), unit(data.targets[0])
    with torch.no_grad():
        old = unit(policy.old(tokens["h"]))
    omega = policy.gate()[(data.time * 10).long()].unsqueeze(1)
    alpha = 0.75
    term = -alpha * (u * y).sum(-1) - (1 - alpha) * (u * seen["direction"]).sum(-1) - 0.3 * (u * old).sum(-1)
    (0.5 * (omega * term).mean()).backward()
    for name, value in gradients(net, align).items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-6)
