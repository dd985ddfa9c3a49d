"""The representation token: what it adds to the loss, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import BATCH, CHANNELS, SIDE, TOKENS, Data, trunk

from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.alignment.objective import AlignmentBatch, Objective, TargetBatch
from vrpo.alignment.token import WithToken
from vrpo.config import AlignConfig, TokenConfig
from vrpo.diffusion.losses import FlowMatching
from vrpo.diffusion.paths import get_path
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.training.step import DenoisingStep, StepOutput, draw_step

C_TOKEN = 24


def model(token: int = C_TOKEN) -> DiffusionTransformer:
    net = trunk()
    if token:
        net.add_token(token)
        torch.nn.init.normal_(net.representation.output.weight, std=0.1)  # type: ignore[union-attr]
    return net


def step(net: DiffusionTransformer, align: dict[str, Any], noisings: int = 1, seen: int = 20) -> StepOutput:
    config = AlignConfig.model_validate({"projector_width": 48, "depth": 2, **align})
    torch.manual_seed(1)
    objective = build_objective(config, TrunkShape(32, depth=3, num_heads=2, tokens=TOKENS), (C_TOKEN,))
    module = DenoisingStep(net, objective, FlowMatching(get_path("linear")), torch.float32)
    data = Data(widths=(C_TOKEN,))
    draws = draw_step(
        0, 0, count=BATCH, shape=(CHANNELS, SIDE, SIDE), noisings=noisings, label_dropout=0,
        device=torch.device("cpu"), token_width=net.token_width,
    )  # fmt: skip
    targets = TargetBatch(data.targets, class_tokens=(data.targets[0].mean(1),))
    output = module(
        data.clean, data.labels, draws, targets, None, images_seen=seen, budget=100, sample_weight=1 / BATCH
    )
    output.loss.backward()
    return output


def test_other_weights_start_the_same_with_and_without_a_token() -> None:
    torch.manual_seed(0)
    plain = build_transformer("SiT-N/4", input_size=16, in_channels=3, num_classes=3)
    torch.manual_seed(0)
    other = build_transformer("SiT-N/4", input_size=16, in_channels=3, num_classes=3)
    other.add_token(8)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.config["token_width"] == 8
    again = DiffusionTransformer(**other.config)
    again.load_state_dict(other.state_dict())


def test_loss_is_the_image_s_plus_a_weighted_velocity_loss_of_the_token() -> None:
    net = model()
    output = step(net, {"objective": "none", "token": {"use": True, "weight": 0.25}})
    data = Data(widths=(C_TOKEN,))
    draws = draw_step(
        0, 0, count=BATCH, shape=(CHANNELS, SIDE, SIDE), noisings=1, label_dropout=0, device=torch.device("cpu"),
        token_width=C_TOKEN,
    )  # fmt: skip
    assert draws.token_noise is not None
    t, token = draws.uniforms, data.targets[0].mean(1)
    x = (1 - t).view(-1, 1, 1, 1) * data.clean + t.view(-1, 1, 1, 1) * draws.noise
    noised = (1 - t).view(-1, 1) * token + t.view(-1, 1) * draws.token_noise
    image, velocity = net(x, t, data.labels, token=noised)
    of_token = (velocity - (draws.token_noise - token)).square().mean()
    of_image = (image - (draws.noise - data.clean)).square().mean()
    assert output.token_loss is not None
    torch.testing.assert_close(output.token_loss, 0.25 * of_token.detach())
    torch.testing.assert_close(output.loss.detach(), (of_image + 0.25 * of_token).detach())


def test_images_and_token_attend_to_each_other() -> None:
    net = model()
    x, t, labels, token = torch.randn(2, 3, SIDE, SIDE), torch.rand(2), torch.tensor([0, 1]), torch.randn(2, C_TOKEN)
    image, velocity = net(x, t, labels, token=token)
    moved, _ = net(x, t, labels, token=token + 1)
    _, answered = net(x + 1, t, labels, token=token)
    assert (image - moved).abs().max() > 1e-4
    assert (velocity - answered).abs().max() > 1e-4


def test_taps_see_the_image_s_tokens_only() -> None:
    net = model()
    arguments = (torch.randn(2, 3, SIDE, SIDE), torch.rand(2), torch.tensor([0, 1]))
    token = torch.randn(2, C_TOKEN)
    shapes = []

    def tap(h: torch.Tensor) -> torch.Tensor:
        shapes.append(h.shape[1])
        return h.view_as(h)

    plain = net(*arguments, token=token)
    tapped = net(*arguments, Taps(tokens={2: tap}), token=token)
    assert shapes == [TOKENS]
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


@pytest.mark.parametrize("side", ["repa", "irepa", "vrpo", "haste", "contrastive"])
def test_composes_with_every_objective(side: str) -> None:
    net = model()
    output = step(net, {"objective": side, "token": {"use": True}})
    assert output.alignment_loss is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_reg_is_repa_with_a_token() -> None:
    first, second = model(), model()
    step(first, {"objective": "reg"})
    step(second, {"objective": "repa", "token": {"use": True}})
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    first, second = model(), model()
    second.checkpoint_blocks = True
    for net in (first, second):
        step(net, {"objective": "reg"})
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_refusals_are_sentences() -> None:
    with pytest.raises(ConfigError, match="use a SiT"):
        build_transformer("DiT-N/4", input_size=16, in_channels=3, num_classes=3).add_token(8)
    t = torch.zeros(1)
    with pytest.raises(ConfigError, match="has a representation token: pass"):
        model()(torch.zeros(1, 3, SIDE, SIDE), t)
    with pytest.raises(ConfigError, match="has no representation token"):
        model(0)(torch.zeros(1, 3, SIDE, SIDE), t, token=torch.zeros(1, C_TOKEN))


def trained(token: dict[str, Any], noisings: int, steps: int = 4) -> tuple[list[float], DiffusionTransformer]:
    """Train with a token for some steps on two images' noisings, with the trainer's parts."""
    net = model()
    config = AlignConfig.model_validate({"objective": "reg", "projector_width": 48, "depth": 2, "token": token})
    torch.manual_seed(1)
    objective = build_objective(config, TrunkShape(32, depth=3, num_heads=2, tokens=TOKENS), (C_TOKEN,))
    module = DenoisingStep(net, objective, FlowMatching(get_path("linear")), torch.float32)
    optimiser = torch.optim.AdamW([*net.parameters(), *objective.parameters()], 1e-3)
    losses = []
    for index in range(steps):
        data = Data(index, images=BATCH // noisings, widths=(C_TOKEN,))
        draws = draw_step(
            0, index, count=BATCH, shape=(CHANNELS, SIDE, SIDE), noisings=noisings, label_dropout=0.5,
            device=torch.device("cpu"), token_width=C_TOKEN, pairing=config.token.pairing,
        )  # fmt: skip
        targets = TargetBatch(data.targets, class_tokens=(data.targets[0].mean(1),))
        clean, labels = (tensor.repeat_interleave(noisings, 0) for tensor in (data.clean, data.labels))
        output = module(
            clean, labels, draws, targets.map(lambda tensor: tensor.repeat_interleave(noisings, 0)), None,
            images_seen=index * BATCH, budget=100, sample_weight=1 / BATCH,
        )  # fmt: skip
        output.loss.backward()
        losses.append(output.loss.item())
        optimiser.step()
        optimiser.zero_grad()
        objective.update()
    return losses, net


Trained = tuple[list[float], DiffusionTransformer]


def assert_equal(first: Trained, second: Trained) -> None:
    assert first[0] == second[0]
    for a, b in zip(first[1].parameters(), second[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pair", ["time", "noise", "none"])
def test_reg_is_the_limit_of_a_large_tau(pair: str) -> None:
    assert_equal(trained({"pair": pair}, 4), trained({"pair": pair, "tau": 1e30}, 4))
    assert trained({"pair": pair, "tau": 0.5}, 4)[0] != trained({"pair": pair}, 4)[0]


def test_one_noising_is_reg() -> None:
    assert_equal(trained({}, 1), trained({"tau": 0.1}, 1))


def test_weights_are_the_formula() -> None:
    config = TokenConfig(tau=0.5, clip=3.0, sigma0=0.25)
    objective = WithToken(Objective(), config)
    time = torch.tensor([0.05, 0.05, 0.05, 0.95, 0.95, 0.95])
    losses = torch.tensor([1.0, 2.0, 6.0, 0.4, 0.4, 0.4])
    batch = AlignmentBatch((), time, time, None, 0, 1, 1.0, noisings=3)
    for _ in range(2):  # the size of the spread is known from the second step on
        objective.taps(batch)
        objective.token_loss(losses, torch.ones(6))
        objective.update()
    weights = objective._weights(losses, 0.5)
    centred = -(losses[:3].double() - 3)
    scaled = centred / centred.square().mean().sqrt()
    advantage = scaled / (scaled.square().mean().sqrt() + 0.25)
    expected = (advantage / 0.5).exp().clamp(max=3.0)
    torch.testing.assert_close(weights[:3].double(), expected / expected.mean())
    assert weights[3:].tolist() == [1, 1, 1]
    assert weights[0] > weights[1] > weights[2] > 0
    assert objective.token_loss(losses, weights * 0 + torch.arange(6.0)).item() == pytest.approx(
        0.03 * (weights * torch.arange(6.0)).mean().item()
    )


def test_one_loss_that_is_not_finite_leaves_the_policy_on() -> None:
    objective = WithToken(Objective(), TokenConfig(tau=0.5))
    time = torch.tensor([0.05, 0.05, 0.95, 0.95])
    good, bad = torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([torch.nan, 2.0, 3.0, 1.0])
    batch = AlignmentBatch((), time, time, None, 0, 1, 1.0, noisings=2)
    for losses in (good, bad):
        objective.taps(batch)
        objective.token_loss(losses, torch.ones(4))
        objective.update()
    weights = objective._weights(good, 0.5)
    assert weights[0] > 1 > weights[1]
    assert weights[3] > 1 > weights[2]


@pytest.mark.parametrize("pairing", ["time", "noise"])
def test_paired_noisings_share_what_they_say(pairing: Any) -> None:
    draws = draw_step(
        0, 3, count=8, shape=(3, 4, 4), noisings=4, label_dropout=0.5, device=torch.device("cpu"), token_width=5,
        pairing=pairing,
    )  # fmt: skip
    groups = [draws.uniforms.view(2, 4), draws.dropped.view(2, 4)]
    assert all((group == group[:, :1]).all() for group in groups)
    noise = draws.noise.view(2, 4, -1)
    assert ((noise == noise[:, :1]).all()).item() == (pairing == "noise")
    assert draws.token_noise is not None
    assert len(draws.token_noise.unique(dim=0)) == 8
