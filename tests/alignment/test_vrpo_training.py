"""How VRPO behaves in training: faults, schedules, state, precision, ablations, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import (
    BATCH,
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
from vrpo.alignment.projector import unit
from vrpo.alignment.rewards import Reward, RewardContext, register_reward
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps


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
    found = policy_part(net, align, data)
    expected: dict[str, Tensor] = {}
    for image in range(BATCH):
        one = slice(image, image + 1)
        part = policy_part(net, objective("repa"), data, part=one)
        for name, value in part.items():
            if name.startswith("0."):
                weight = omega[int(data.time[image] * 10)]
                expected[name] = expected.get(name, 0) + weight * value
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


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
    assert same(net.state_dict(), other_net.state_dict())
    assert same(align.state_dict(), other.state_dict())


@pytest.mark.parametrize("mode", ["analytic", "sampled"])
def test_checkpointed_blocks_change_no_gradient(mode: str) -> None:
    found = []
    for checkpointed in (False, True):
        net, align = trunk(checkpoint_blocks=checkpointed), objective(mode=mode)
        warm(net, align)
        accumulate(net, align, Data(), generator=torch.Generator().manual_seed(0))
        found.append(gradients(net, align))
    assert same(*found)


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
        found.append(flat(gradients(net, align)) / scale)
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
