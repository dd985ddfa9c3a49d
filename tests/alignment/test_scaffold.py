"""The scaffold: who supplies a block's keys and values, what internalising them costs, and when they change hands."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import BATCH, CHANNELS, HIDDEN, SIDE, TOKENS, WIDTH, Data, trunk

from vrpo.alignment import scaffold as scaffold_module
from vrpo.alignment.build import TrunkShape, build_objective, scaffold_depth
from vrpo.alignment.objective import Objective, TargetBatch
from vrpo.alignment.scaffold import WithScaffold
from vrpo.config import AlignConfig
from vrpo.diffusion.losses import FlowMatching
from vrpo.diffusion.paths import get_path
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps
from vrpo.models.transformer import DiffusionTransformer
from vrpo.training.step import DenoisingStep, draw_step

PURE = {"alpha_end": 1.0, "trust": 0.0, "gate": False}
BUDGET = 20 * BATCH


def make(align: dict[str, Any]) -> Objective:
    config = AlignConfig.model_validate({"objective": "repi", "projector_width": 48, "depth": 2, **align})
    torch.manual_seed(1)
    return build_objective(
        config, TrunkShape(HIDDEN, depth=3, num_heads=2, tokens=TOKENS), (WIDTH,), key_value_widths=(WIDTH, WIDTH)
    )


def scaffold(align: dict[str, Any]) -> WithScaffold:
    objective = make(align)
    assert isinstance(objective, WithScaffold)
    return objective


def backward(net: DiffusionTransformer, objective: Objective, step: int, parts: int = 1) -> float:
    """Run a step's forward and backward passes as the trainer does, and return its loss."""
    module = DenoisingStep(net, objective, FlowMatching(get_path("linear")), torch.float32)
    data = Data(step)
    draws = draw_step(
        0, step, count=BATCH, shape=(CHANNELS, SIDE, SIDE), noisings=1, label_dropout=0, device=torch.device("cpu"),
        token_width=net.token_width,
    )  # fmt: skip
    targets = TargetBatch(data.targets, data.targets, data.targets, (data.targets[0].mean(1),))
    total = 0.0
    for start in range(0, BATCH, BATCH // parts):
        rows = slice(start, start + BATCH // parts)
        output = module(
            data.clean[rows], data.labels[rows], draws.part(rows.start, rows.stop),
            targets.map(lambda tensor, rows=rows: tensor[rows]), None,
            images_seen=step * BATCH, budget=BUDGET, sample_weight=1 / BATCH,
        )  # fmt: skip
        output.loss.backward()
        total += output.loss.item()
    return total


def train(
    align: dict[str, Any], steps: int, token: bool = False
) -> tuple[list[float], DiffusionTransformer, Objective]:
    net, objective = trunk(), make(align)
    if token:
        net.add_token(WIDTH)
    optimiser = torch.optim.AdamW([*net.parameters(), *objective.parameters()], 1e-3)
    losses = []
    for step in range(steps):
        losses.append(backward(net, objective, step))
        optimiser.step()
        optimiser.zero_grad()
        objective.update()
    return losses, net, objective


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def by_hand(phase: str, key: Tensor, value: Tensor, gaps: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Any:
    gaps.append((k - key.detach()).square().mean() + (v - value.detach()).square().mean())
    return (q, key, value) if phase == "encoder" else (q, k, v)


def test_repi_supplies_keys_and_values_then_internalises_them() -> None:
    """Both phases against attention taps written out here."""
    data, net = Data(0), trunk()
    draws = draw_step(
        0, 0, count=BATCH, shape=(CHANNELS, SIDE, SIDE), noisings=1, label_dropout=0, device=torch.device("cpu")
    )
    t = draws.uniforms
    column = t.view(-1, 1, 1, 1)
    x, target = (1 - column) * data.clean + column * draws.noise, draws.noise - data.clean
    for phase, internalise in (("encoder", "after"), ("encoder", "always"), ("own", "after"), ("own", "always")):
        objective = scaffold({"weight": 0, "scaffold": {"steps": 1, "internalise": internalise}})
        if phase == "own":
            objective.update()
        key, value = (
            projection(data.targets[0]).view(BATCH, TOKENS, 2, HIDDEN // 2).transpose(1, 2)
            for projection in (objective.key_projection, objective.value_projection)
        )
        gaps: list[Tensor] = []
        tap = partial(by_hand, phase, key, value, gaps)
        output = net(x, t, data.labels, Taps(attention={1: tap}))
        pulled = phase == "own" or internalise == "always"
        expected = (output - target).square().mean() + (2 * gaps[0] if pulled else 0)
        expected.backward()
        wanted = {name: p.grad for name, p in net.named_parameters()}
        projected = objective.key_projection.weight.grad
        net.zero_grad()
        objective.zero_grad()
        assert backward(net, objective, 0) == pytest.approx(expected.item(), rel=1e-6)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], msg=f"{phase}: {name}")
        if phase == "own":
            assert objective.key_projection.weight.grad is None
        else:
            torch.testing.assert_close(objective.key_projection.weight.grad, projected)
        net.zero_grad()


def test_the_clock_is_a_special_case() -> None:
    """VRPO reduced to REPA with a clock is REPI, and so is the advantage when all bins change hands at one step."""
    losses, net, objective = train({"scaffold": {"steps": 4}}, 9)
    clock = train({"objective": "vrpo", "vrpo": PURE, "scaffold": {"supply": "clock", "steps": 4}}, 9)
    advantage = {"supply": "advantage", "fraction": 0.5, "earliest": 1.0, "latest": 4 / 20}
    policy = train({"objective": "vrpo", "vrpo": PURE, "scaffold": advantage}, 9)
    for other in (clock, policy):
        assert losses == other[0]
        assert same(net, other[1])
    assert same(objective, policy[2])
    shared = train({"scaffold": {"share": 4 / 20}}, 9)
    assert losses == shared[0]
    assert losses != train({"scaffold": {"steps": 5}}, 9)[0]


def test_each_image_has_the_supplier_of_its_time() -> None:
    net, data = trunk(), Data(0)
    x, t = data.clean, torch.linspace(0.01, 0.99, BATCH)
    outputs = {}
    for name, own in (("encoder", torch.zeros(10)), ("own", torch.ones(10)), ("mixed", (torch.arange(10) < 5).float())):
        objective = scaffold({"scaffold": {"supply": "advantage"}})
        objective.own.copy_(own)
        batch = Batch(data, t)
        outputs[name] = net(x, t, data.labels, objective.taps(batch))  # type: ignore[arg-type]
    early = t < 0.5
    torch.testing.assert_close(outputs["mixed"][early], outputs["own"][early])
    torch.testing.assert_close(outputs["mixed"][~early], outputs["encoder"][~early])
    assert (outputs["own"] - outputs["encoder"]).abs().max() > 1e-3


class Batch:
    """The part of a batch that suppliers look at."""

    def __init__(self, data: Data, time: Tensor) -> None:
        self.time, self.targets, self.keys, self.values = time, data.targets, data.targets, data.targets
        self.place, self.images_seen, self.budget = None, 0, 100


@pytest.mark.parametrize("own", [False, True])
def test_trials_measure_what_the_encoder_gains_and_leave_no_trace(own: bool) -> None:
    settings = {"scaffold": {"supply": "advantage", "fraction": 1.0, "time_bins": 1}}
    net, objective = trunk(), scaffold(settings)
    gradients = []
    for fraction in (1.0, 1e-9):
        tried = scaffold({"scaffold": {**settings["scaffold"], "fraction": fraction, "time_bins": 2}})
        tried.own.copy_(torch.tensor([float(own), 0.0]))
        backward(net, tried, 0)
        gradients.append([p.grad.clone() for p in net.parameters()])  # type: ignore[union-attr]
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    losses: dict[bool, float] = {}
    for mine in (False, True):
        alone = scaffold({"weight": 0, "scaffold": {"supply": "clock", "steps": 1, "weight": 0.0}})
        if mine:
            alone.update()
        losses[mine] = backward(net, alone, 0)
    objective.own.fill_(0)
    backward(net, objective, 0)
    objective.update()
    found = objective.logs()["scaffold_advantage"]
    assert found.item() == pytest.approx(losses[True] - losses[False], rel=1e-4)


def test_nothing_depends_on_the_split() -> None:
    settings = {"scaffold": {"supply": "advantage", "fraction": 0.25}}
    found = []
    for parts in (1, 2, 4):
        net, objective = trunk(), scaffold(settings)
        objective.own[:4] = 1
        for step in range(2):
            backward(net, objective, step, parts)
            objective.update()
        found.append((objective.logs()["scaffold_advantage"], [p.grad for p in net.parameters()]))
    for advantage, gradients in found[1:]:
        torch.testing.assert_close(advantage, found[0][0], equal_nan=True)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def look(objective: WithScaffold, advantages: list[float], seen: int) -> None:
    objective.trials[0] = 40 * torch.tensor(advantages)
    objective.trials[1] = 40
    objective._look(seen, 100)


def test_a_bin_changes_hands_when_its_advantage_stalls() -> None:
    objective = scaffold({"scaffold": {"supply": "advantage", "time_bins": 3, "patience": 2, "earliest": 0.04}})
    # By bin: grows; stalls once, grows, then falls back; of no use.
    series = [[0.1, 0.1, -0.1], [0.2, 0.1, -0.1], [0.3, 0.3, -0.2], [0.4, 0.1, -0.1], [0.5, 0.1, -0.1]]
    owned = []
    for index, advantages in enumerate(series):
        look(objective, advantages, index + 1)
        owned.append(objective.own.tolist())
    # The third waits for the earliest time only.
    assert owned == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]]
    look(objective, [0.6, 9.0, 9.0], 6)
    assert objective.own.tolist() == [0, 1, 1], "a hand-over is for good"
    assert objective.handed_at.tolist()[1:] == [5, 4]
    assert objective.ruled.tolist() == [0, 1, 1]
    objective._hand_over(torch.ones(3), 7)
    assert objective.ruled.tolist() == [0, 1, 1], "what the latest time ends, the rule has not decided"


def handed_over_at(advantages: list[float], **settings: Any) -> int | None:
    """Return the look, from 1, at which a scaffold of one time bin that sees these advantages is handed over."""
    rule = {"supply": "advantage", "time_bins": 1, "earliest": 0.0, "latest": 1.0, **settings}
    objective = scaffold({"scaffold": rule})
    for index, advantage in enumerate(advantages):
        look(objective, [advantage], index)
        if objective.own.item():
            return index + 1
    return None


def by_definition(advantages: list[float], growth: float, patience: int) -> int | None:
    """The rule of docs/method.md for one time bin, written out."""
    smooth, best, stalled = advantages[0], 0.0, 0
    for index, advantage in enumerate(advantages):
        smooth = 0.7 * smooth + 0.3 * advantage
        if smooth > best * (1 + growth):
            best, stalled = smooth, 0
        else:
            stalled += 1
        if stalled == patience:
            return index + 1
    return None


def test_the_rule_is_its_definition() -> None:
    draws = torch.Generator().manual_seed(5)
    found = set()
    for _ in range(20):
        noise = 0.03 * torch.randn(60, generator=draws)
        advantages = (0.1 * (1 - torch.exp(-torch.arange(60) / 15)) + noise).tolist()
        look = handed_over_at(advantages, growth=0.1, patience=4)
        assert look == by_definition(advantages, 0.1, 4)
        found.add(look)
    assert len(found) > 3, "the cases decide alike whatever the rule"


def test_slow_growth_is_growth_and_noise_is_none() -> None:
    assert handed_over_at([0.002 * look for look in range(1, 51)]) is None, "half a budget of steady growth"
    # Time constant 5 looks, noise of a fifth of the end: it levels off after some ten looks.
    draws = torch.Generator().manual_seed(1)
    looks = [
        handed_over_at((0.1 * (1 - torch.exp(-torch.arange(50) / 5)) + noise).tolist())
        for noise in 0.02 * torch.randn(40, 50, generator=draws)
    ]
    assert all(look is not None for look in looks)
    middle = sorted(look for look in looks if look is not None)[20]
    assert 12 <= middle <= 25


def test_few_trials_decide_nothing() -> None:
    objective = scaffold({"scaffold": {"supply": "advantage", "time_bins": 1, "patience": 1, "earliest": 0.0}})
    objective.trials.copy_(torch.tensor([[-3.0], [3.0]]))
    objective._look(50, 100)
    assert objective.own.item() == 0
    assert objective.trials[1].item() == 3, "they are kept for the next look"


@pytest.mark.parametrize(
    ("patience", "stop", "owned"),
    [(1, 3, [0, 0]), (1, 11, [0, 0]), (1, 15, [0, 1]), (2, 9, [0])],
    ids=["before-a-look", "between-looks", "between-hand-overs", "while-stalled"],
)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(patience: int, stop: int, owned: list[float]) -> None:
    rule = {"time_bins": len(owned), "patience": patience, "growth": 1.0, "earliest": 0.0, "latest": 1.0}
    settings = {"scaffold": {"supply": "advantage", "fraction": 1.0, **rule}}
    whole, stopped = scaffold(settings), scaffold(settings)
    net = trunk()
    for step in range(19):
        backward(net, whole, step)
        whole.update()
    for step in range(19):
        if step == stop:
            assert stopped.own.tolist() == owned
            state = stopped.state_dict()
            stopped = scaffold(settings)
            stopped.load_state_dict(state)
        backward(net, stopped, step)
        stopped.update()
    assert whole.own.tolist() == [1] * len(owned), "a bin did not change hands"
    found = dict(stopped.named_buffers())
    for name, value in whole.named_buffers():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def test_composes_with_a_token_and_with_attention_alignment() -> None:
    losses, net, _ = train({"scaffold": {"steps": 1}, "token": {"use": True}}, 3, token=True)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert net.representation is not None
    losses, _, _ = train({"objective": "haste", "scaffold": {"supply": "clock", "steps": 1}}, 3)
    assert all(torch.isfinite(torch.tensor(losses)))


def test_the_block_lies_before_the_aligned_one() -> None:
    assert scaffold_depth(AlignConfig(depth=(8,)), "XL", 28) == 4
    assert scaffold_depth(AlignConfig(), "S", 12) == 2
    assert scaffold_depth(AlignConfig(depth=(1,)), "N", 4) == 1
    with pytest.raises(ConfigError, match=r"align\.scaffold\.depth 9"):
        make({"scaffold": {"depth": 9}})
    with pytest.raises(ConfigError, match=r"align\.scaffold\.depth 3 lies above block 2, .* use 2 or less"):
        make({"scaffold": {"depth": 3}})


def test_internalisation_is_weighted_by_the_gate() -> None:
    gated = {**PURE, "gate": True}
    found = {}
    for weight in (0.0, 2.0):
        objective = scaffold(
            {"objective": "vrpo", "vrpo": gated, "scaffold": {"supply": "clock", "steps": 1, "weight": weight}}
        )
        objective.update()
        policy = objective.objective._policies()[0]
        bins = torch.linspace(-0.08, 0.02, 10)
        policy.statistics.count.fill_(1.0)
        policy.statistics.total[policy.statistics.names.index("agreement")] = bins
        gaps: list[Tensor] = []
        loss = scaffold_module.__dict__["_gap"]

        def kept(own: Tensor, given: Tensor, loss: Any = loss, gaps: list[Tensor] = gaps) -> Tensor:
            gaps.append(loss(own, given).detach())
            return loss(own, given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scaffold_module, "_gap", kept)
            found[weight] = backward(trunk(), objective, 0), sum(gaps)
    draws = draw_step(
        0, 0, count=BATCH, shape=(CHANNELS, SIDE, SIDE), noisings=1, label_dropout=0, device=torch.device("cpu")
    )
    omega = (1 + bins[(draws.uniforms * 10).long()] / 0.1).clamp(0.1, 1)
    assert omega.min() < 0.5
    expected = 2 * (omega * found[2.0][1]).mean()
    assert found[2.0][0] - found[0.0][0] == pytest.approx(expected.item(), rel=1e-4)
