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
    PURE,
    TOKENS,
    WIDTH,
    Data,
    accumulate,
    gradients,
    objective,
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
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in found.values()])


def _policy_part(net: Any, align: Objective, data: Data, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of the policy's share alone: with the objective less without."""
    accumulate(net, align, data, **options)
    both = gradients(net, align)
    accumulate(net, Objective(), data, **options)
    plain = gradients(net, align)
    return {name: value - plain.get(name, 0) for name, value in both.items()}


@pytest.mark.parametrize("base", ["repa", "irepa"])
def test_property_1_repa_is_a_special_case_to_the_bit(base: str) -> None:
    shape: dict[str, Any] = {"depths": (1, 2), "widths": (WIDTH, 10)}
    net, data = trunk(), Data(widths=(WIDTH, 10))
    found = []
    for align in (objective(base, **shape), objective(**shape, base=base, **PURE)):
        accumulate(net, align, data)
        found.append(gradients(net, align))
    assert _same(*found)


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
    assert _same(gradients(net), expected)


def test_a_run_of_50_steps_is_repa_s_to_the_bit() -> None:
    runs = []
    for align in (objective("repa"), objective(**PURE)):
        net = trunk(zero_output=True)
        losses = train(net, align, 50)
        runs.append((losses, net.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert _same(runs[0][1], runs[1][1])


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
    assert _same(runs[0][1], runs[1][1])


@register_reward("test-constant")
def _constant(actions: Actions, context: RewardContext) -> Tensor:
    return torch.full(actions.weights.shape[:3], 3.7) + context.target.sum(-1, keepdim=True)


@register_reward("test-broken")
class _Broken(Reward):
    """Not a number at one token of the first image, infinite at another of the second."""

    def _spoil(self, values: Tensor) -> Tensor:
        values = values.clone()
        values[0, 3], values[1, 5, ..., 0] = torch.nan, torch.inf
        return values

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        return self._spoil(actions.dot(context.target))

    def preference(self, context: RewardContext) -> Tensor:
        return self._spoil(context.target)


def test_property_2_a_reward_constant_over_the_group_changes_no_gradient() -> None:
    found = []
    for rewards in ({}, {"test-constant": 2.0}):
        net, align = trunk(), objective(mode="sampled", rewards=rewards)
        warm(net, align)
        accumulate(net, align, Data(), generator=torch.Generator().manual_seed(5))
        found.append(_flat(gradients(net)))
    assert torch.equal(*found)


ISOLATED = {"trust": 0.0, "perceptual": 0.0, "gate": False, "warmup": 0.0}


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
        found[mode] = _flat(_policy_part(net, align, Data(), generator=torch.Generator().manual_seed(5)))
    assert F.cosine_similarity(found["analytic"], found["sampled"], dim=0) > 0.99
    assert found["sampled"].norm() / found["analytic"].norm() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rule", ["agreement", "sum", "per-reward", "centred"])
def test_property_4_holds_for_every_normaliser(rule: str) -> None:
    found = {}
    for mode in ("analytic", "sampled"):
        settings = {"group": 1024, "radius": 0.02} if mode == "sampled" else {}
        net, align = trunk(), objective(mode=mode, adapt_radius=False, advantage=rule, **ISOLATED, **settings)
        warm(net, align, 2)
        found[mode] = _flat(_policy_part(net, align, Data(), generator=torch.Generator().manual_seed(5)))
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
            _flat(_policy_part(net, align, Data(), generator=torch.Generator().manual_seed(seed))) for seed in range(24)
        ]
        means[shuffled] = torch.stack(draws).mean(0).norm()
    assert means[True] < 0.3 * means[False]


@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_a_reward_that_is_not_finite_is_dropped_counted_and_named(mode: str) -> None:
    net, align = trunk(), objective(mode=mode, rewards={"test-broken": 1.0})
    warm(net, align)
    accumulate(net, align, Data())
    found = gradients(net, align)
    align.update()
    logs = align.logs()
    assert all(value.isfinite().all() for value in found.values())
    assert logs["dropped_test-broken"] == 2
    assert logs["dropped_semantic"] == 0
    assert all(value.isfinite().all() for value in align.state_dict().values())
    assert logs["reward_test-broken"][~logs["reward_test-broken"].isnan()].isfinite().all()


def test_a_gradient_that_is_not_finite_drops_fidelity_where_it_is_and_spares_the_statistics() -> None:
    net, align = trunk(), objective()
    warm(net, align)
    data, kept = Data(), {}

    def spoilt(h: Tensor, t: Tensor, labels: Tensor, taps: Taps) -> Tensor:
        def tap(x: Tensor) -> Tensor:
            x = taps.tokens[2](x)
            x.register_hook(lambda g: torch.cat([g[:1] * torch.inf, g[1:]]))
            return x

        return net(h, t, labels, Taps(tokens={2: tap}))

    align.projectors[0].register_full_backward_hook(lambda m, i, o: kept.update(grad=o[0].clone()))
    accumulate(spoilt, align, data)
    align.update()
    logs = align.logs()
    assert logs["dropped_fidelity"] == TOKENS
    assert kept["grad"].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in align.parameters())
    assert all(value.isfinite().all() for value in align.state_dict().values())


@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_the_first_steps_of_a_network_whose_output_layer_is_zero_are_finite(mode: str) -> None:
    net, align = trunk(zero_output=True), objective(mode=mode, warmup=0.0)
    assert all(torch.tensor(train(net, align, 4)).isfinite())
    assert all(value.isfinite().all() for value in [*net.state_dict().values(), *align.state_dict().values()])


def test_alpha_falls_from_one_over_the_warm_up() -> None:
    align = objective(warmup=0.5, alpha_end=0.2)
    assert [round(align.alpha(n, 100), 6) for n in (0, 25, 50, 100)] == [1.0, 0.6, 0.2, 0.2]
    assert objective(warmup=0.0).alpha(0, 100) == 0.0


def test_the_gate_weighs_repa_by_time_bin() -> None:
    """REPA x omega, the gate alone: checked image by image against REPA's own gradients."""
    net, data = trunk(), Data()
    align = objective(**PURE | {"gate": True})
    statistics = align.policies[0].statistics
    row = statistics.names.index("agreement")
    agreement = torch.linspace(-0.12, 0.05, 10)
    statistics.total[row], statistics.count[row] = agreement, 1.0
    omega = (1 + agreement / 0.1).clamp(0.1, 1)
    found = _policy_part(net, align, data)
    expected: dict[str, Tensor] = {}
    for image in range(BATCH):
        one = slice(image, image + 1)
        part = _policy_part(net, objective("repa"), data, part=one)
        for name, value in part.items():
            if name.startswith("0."):
                weight = omega[int(data.time[image] * 10)]
                expected[name] = expected.get(name, 0) + weight * value
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


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
    found = _policy_part(net, align, data, seen=25)
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


def test_the_trust_region_holds_the_projector_back() -> None:
    """Its gradient points to the old policy; over the steps, every token takes its turn."""
    net, data = trunk(), Data()
    align = objective(semantic=0.0, relational=0.0, fidelity=0.0, perceptual=0.0, gate=False, warmup=0.0, trust=1.0)
    projector = align.projectors[0]
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    slices = {align._trusted(_batch_at(seen), 0, TOKENS).start for seen in range(0, 16 * 64, 16)}
    assert slices == set(range(16))
    optimiser = torch.optim.SGD(projector.parameters(), 3.0)
    policy = align.policies[0]

    tokens: dict[str, Tensor] = {}
    t = data.time.view(-1, 1, 1, 1)
    keep = Taps(tokens={2: lambda h: tokens.setdefault("h", h.detach())})
    net((1 - t) * data.clean + t * data.noise, data.time, data.labels, keep)

    def distance() -> float:
        with torch.no_grad():
            return (1 - (unit(projector(tokens["h"])) * unit(policy.old(tokens["h"]))).sum(-1)).mean().item()

    before = distance()
    for step in range(40):
        optimiser.zero_grad()
        accumulate(net, align, data, seen=step)
        optimiser.step()
    assert distance() < 0.7 * before


def _batch_at(seen: int) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(images_seen=seen)


def test_the_old_policy_is_an_average_that_is_saved_and_not_trained() -> None:
    net, align = trunk(), objective(old_decay=0.9)
    projector = align.projectors[0]
    expected = {name: value.clone() for name, value in projector.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for name, value in projector.named_parameters():
                value.add_(torch.randn_like(value))
                expected[name] = 0.9 * expected[name] + 0.1 * value
        align.update()
    found = dict(align.policies[0].old.named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert f"policies.0.old.{name}" in align.state_dict()
    assert not any("old" in name for name, _ in align.named_parameters())
    assert net is not None


@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_a_restored_run_repeats_the_next_step_to_the_bit(mode: str) -> None:
    def start() -> tuple[Any, Objective, torch.optim.Optimizer]:
        net, align = trunk(), objective(mode=mode)
        return net, align, torch.optim.AdamW([*net.parameters(), *align.parameters()], 1e-3)

    net, align, optimiser = start()
    train(net, align, 4, optimiser=optimiser)
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in (net, align)]
    inner = torch.optim.AdamW([*net.parameters(), *align.parameters()], 1e-3).state_dict()
    inner = {"state": {k: {n: v.clone() for n, v in s.items()} for k, s in optimiser.state_dict()["state"].items()},
             "param_groups": inner["param_groups"]}  # fmt: skip
    expected = train(net, align, 3, start=4, optimiser=optimiser)
    other_net, other, other_optimiser = start()
    other_net.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other_optimiser.load_state_dict(inner)
    assert train(other_net, other, 3, start=4, optimiser=other_optimiser) == expected
    assert _same(net.state_dict(), other_net.state_dict())
    assert _same(align.state_dict(), other.state_dict())


@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_checkpointed_blocks_change_no_gradient(mode: str) -> None:
    found = []
    for checkpointed in (False, True):
        net, align = trunk(checkpoint_blocks=checkpointed), objective(mode=mode)
        warm(net, align)
        accumulate(net, align, Data(), generator=torch.Generator().manual_seed(0))
        found.append(gradients(net, align))
    assert _same(*found)


def test_compiled_blocks_give_the_same_gradients() -> None:
    net, align = trunk(), objective()
    warm(net, align)
    accumulate(net, align, Data())
    expected = gradients(net, align)
    for block in net.blocks:
        block.compile(backend="aot_eager")
    accumulate(net, align, Data())
    for name, value in gradients(net, align).items():
        torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_16_bit_autocast_with_a_loss_scale_stays_near_float32(dtype: torch.dtype, mode: str) -> None:
    scale = 4096.0 if dtype == torch.float16 else 1.0
    net, align = trunk(), objective(mode=mode)
    warm(net, align)

    def run(*arguments: Any, autocast: bool) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return net(*arguments)

    found = []
    for autocast in (False, True):
        source = torch.Generator().manual_seed(0)
        accumulate(lambda *a, on=autocast: run(*a, autocast=on), align, Data(), scale=scale, generator=source)
        found.append(_flat(gradients(net, align)) / scale)
    assert found[1].isfinite().all()
    assert F.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize(
    "settings",
    [
        *({name: 0.0} for name in ("semantic", "relational", "fidelity", "perceptual")),
        *(
            {"advantage": rule, "mode": mode}
            for rule in ("sum", "per-reward", "centred")
            for mode in ("analytic", "sampled")
        ),
        {"mode": "sampled", "basis": "isotropic"},
        {"mode": "sampled", "group": 3, "radius": 0.1},
        {"mode": "sampled", "shuffle_advantages": True},
        {"mode": "sampled", "noise_preferences": True},
        {"noise_preferences": True},
        {"gate": False},
        {"alpha_end": 1.0, "trust": 0.0},
        {"base": "irepa"},
        {"base": "irepa", "mode": "sampled"},
        {"semantic": {"0": 1.0, "60": 0.0}},
        {"mode": "sampled", "fidelity": {"0": 0.0, "40": 0.0, "90": 1.0}},
        {"semantic": 0.0, "relational": 0.0, "fidelity": 0.0, "perceptual": 0.0},
    ],
    ids=str,
)
def test_every_ablation_runs_by_configuration_alone(settings: dict[str, Any]) -> None:
    widths = (WIDTH, 10)
    net, align = trunk(), objective(depths=(1, 2), widths=widths, **settings)
    for seen in (0, 30, 70):
        accumulate(net, align, Data(seen, widths=widths), seen=seen)
        align.update()
    assert all(value.isfinite().all() for value in gradients(net, align).values())
    logs = align.logs()
    assert {"alignment", "alpha"} <= set(logs)
    assert all(value.ndim == 0 or value.shape == (10,) for value in logs.values())


@pytest.mark.parametrize("reward", ["semantic", "relational", "fidelity"])
def test_noise_in_place_of_a_preference_is_as_long_and_points_elsewhere(reward: str) -> None:
    weights = {"semantic": 0.0, "relational": 0.0, "fidelity": 0.0, reward: 1.0}
    directions: dict[bool, Tensor] = {}
    for noise in (False, True):
        net, align = trunk(), objective(**ISOLATED, **weights, noise_preferences=noise)
        warm(net, align)
        policy = align.policies[0]

        def keep(*given: Any, ascent: Any = policy.ascent, noise: bool = noise) -> Any:
            found = ascent(*given)
            directions[noise] = found[0]
            return found

        policy.ascent = keep
        accumulate(net, align, Data(), generator=torch.Generator().manual_seed(5))
    plain, noisy = directions[False], directions[True]
    torch.testing.assert_close(noisy.norm(dim=-1), plain.norm(dim=-1), rtol=1e-3, atol=1e-5)
    assert plain.norm(dim=-1).mean() > 0.3
    assert F.cosine_similarity(noisy.flatten(), plain.flatten(), dim=0).abs() < 0.1
    # Every token has noise of its own.
    assert F.cosine_similarity(noisy[:, :1], noisy[:, 1:], dim=-1).abs().mean() < 0.4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rewards": {"semantic": 1.0}}, r"set align\.vrpo\.semantic"),
        ({"rewards": {"test-brokn": 1.0}}, "'test-broken'"),
        ({"rewards": {"test-constant": 1.0}}, r"no preference.*align\.vrpo\.mode sampled"),
        ({"basis": "isotropic"}, r"align\.vrpo\.mode sampled"),
        ({"shuffle_advantages": True}, r"align\.vrpo\.mode sampled"),
        ({"semantic": {"soon": 1.0}}, r"align\.vrpo\.semantic"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        objective(**settings)


def test_grids_that_are_not_square_are_refused() -> None:
    from vrpo.alignment.vrpo import Vrpo

    for settings, field in (({"base": "irepa"}, "base"), ({}, "perceptual")):
        config = AlignConfig.model_validate({"objective": "vrpo", "vrpo": settings, "projector_width": 8})
        with pytest.raises(ConfigError, match=field):
            Vrpo(config, hidden_size=8, depths=(1,), encoder_widths=(4,), tokens=12)


def test_nothing_is_computed_or_kept_without_gradients() -> None:
    net, align = trunk(), objective()
    with torch.no_grad():
        batch = Data()
        align.eval()
        taps = align.taps(_batch_of(batch))
        out = net(batch.noise, batch.time, batch.labels, taps)
        assert align.loss(lambda: out) is not None
    assert align.policies[0].statistics._step is None


def _batch_of(data: Data) -> Any:
    from vrpo.alignment.objective import AlignmentBatch

    return AlignmentBatch(data.targets, data.time, data.clean, None, 0, 100, 1 / BATCH)
