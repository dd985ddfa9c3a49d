"""The perceptual distance on the one-step prediction: its gradient, its gates, and that it costs nothing when off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy import BATCH, CHANNELS, SIDE, TOKENS, Data, gradients, objective, trunk, warm

from vrpo.alignment.image_distance import WithImageDistance, choose, load_distance
from vrpo.alignment.objective import AlignmentBatch, Objective
from vrpo.config import ImageDistanceConfig
from vrpo.config_load import validate
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps
from vrpo.training.trainer import Trainer
from vrpo.vision.perceptual import EncoderDistance

ALWAYS: dict[str, Any] = {"kind": "encoder", "start": 0.0, "max_time": 0.6, "fraction": 0.7, "weight": 0.4}


def small_distance(seed: int = 7) -> EncoderDistance:
    """Return the distance in the tokens of a small random network in float64."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(CHANNELS, 6, 3, stride=2), nn.SiLU(), nn.Conv2d(6, 5, 2)).double()
    return EncoderDistance(lambda images: network(images.double()).flatten(2).mT)


def watched(align: Objective, distance: Any = None, **settings: Any) -> WithImageDistance:
    config = ImageDistanceConfig.model_validate(ALWAYS | settings)
    return WithImageDistance(align, distance or small_distance(), config)


def as_double(data: Data) -> Data:
    data.clean, data.noise, data.time = data.clean.double(), data.noise.double(), data.time.double()
    return data


def run(
    net: Callable[..., Tensor],
    align: Objective,
    data: Data,
    part: slice = slice(None),
    seen: int = 50,
    scale: float = 1,
) -> Tensor:
    """Run a forward and backward pass with the trainer's arithmetic, and return the unscaled loss."""
    clean, noise, time = data.clean[part], data.noise[part], data.time[part]
    targets = tuple(target[part] for target in data.targets)
    source = torch.Generator().manual_seed(3)
    batch = AlignmentBatch(targets, time, clean, None, seen, 100, scale / BATCH, source)
    taps = align.taps(batch)
    t = time.view(-1, 1, 1, 1)
    noised = (1 - t) * clean + t * noise
    output = net(noised, time, data.labels[part], taps)
    total = (output - (noise - clean)).square().mean((1, 2, 3)).mean()
    extra = align.loss(lambda: noised - t * output)
    total = (total if extra is None else total + extra) * len(clean) / BATCH
    (total * scale).backward()
    return total.detach()


def prediction(net: Callable[..., Tensor], data: Data, taps: Taps | None = None) -> Tensor:
    t = data.time.view(-1, 1, 1, 1)
    noised = (1 - t) * data.clean + t * data.noise
    return noised - t * net(noised, data.time, data.labels, taps or Taps())


def test_gradient_of_the_loss_is_its_finite_difference() -> None:
    data = as_double(Data())
    align = watched(Objective())
    batch = AlignmentBatch((), data.time, data.clean, None, 50, 100, 1 / BATCH)
    chosen = choose(data.time, 50, 0.6, 0.7)
    assert 2 <= chosen.sum() < (data.time < 0.6).sum()

    def loss(predicted: Tensor) -> Tensor:
        align.taps(batch)
        return align.loss(lambda: predicted)

    predicted = data.clean + 0.3 * data.noise
    assert torch.autograd.gradcheck(loss, predicted.requires_grad_())
    expected = 0.4 * small_distance()(predicted, data.clean)[chosen].sum() / BATCH
    torch.testing.assert_close(loss(predicted), expected)
    (gradient,) = torch.autograd.grad(loss(predicted), predicted)
    assert torch.equal(gradient.abs().amax((1, 2, 3)) > 0, chosen)


def test_gradient_of_the_weights_is_its_finite_difference() -> None:
    net, data = trunk().double(), as_double(Data())
    align = watched(objective("repa").double())
    run(net, align, data)
    found = gradients(net)
    direction = {name: torch.randn_like(value) for name, value in net.named_parameters() if value.requires_grad}
    along = sum((found[f"0.{name}"] * direction[name]).sum() for name in direction if f"0.{name}" in found)
    values = []
    for step in (1e-6, -1e-6):
        moved = trunk().double()
        with torch.no_grad():
            for name, value in moved.named_parameters():
                if name in direction:
                    value += step * direction[name]
        values.append(run(moved, align, data))
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, along, rtol=1e-5, atol=1e-8)


def test_what_arrives_at_the_seam_includes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """VRPO's fidelity and gate read ``g``: with the distance on, ``g`` is the gradient of both losses."""
    net, data = trunk().double(), as_double(Data())
    arrived = []
    for on in (False, True):
        align = objective().double()
        respond = align._respond
        monkeypatch.setattr(align, "_respond", lambda *a, f=respond: (arrived.append(a[4].clone()), f(*a))[1])
        run(net, watched(align) if on else align, data)

    kept: list[Tensor] = []
    predicted = prediction(net, data, Taps(tokens={2: lambda h: kept.append(h) or h}))
    chosen = choose(data.time, 50, 0.6, 0.7)
    distance = 0.4 * small_distance()(predicted, data.clean)[chosen].sum() / BATCH
    (expected,) = torch.autograd.grad(distance, kept[0])
    assert expected.abs().max() > 1e-7
    torch.testing.assert_close(arrived[1] - arrived[0], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.125, 0.6])
@pytest.mark.parametrize("times", ["uniform", "stratified", "discrete"])
def test_choice_is_the_fraction_at_every_low_time_and_none_above(fraction: float, times: str) -> None:
    generator = torch.Generator().manual_seed(0)
    seen: list[tuple[Tensor, Tensor]] = []
    for step in range(400):
        time = torch.rand(64, generator=generator)
        if times == "stratified":
            time = (torch.arange(4).repeat(16) + time) / 4
        elif times == "discrete":
            time = (time * 1000).floor() / 999
        seen.append((time, choose(time, 64 * step, 0.3, fraction)))
    time, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert not chosen[time >= 0.3].any()
    for low in np.arange(0, 0.3, 0.05):
        inside = (time >= low) & (time < low + 0.05)
        # Four standard deviations of independent choices.
        tolerance = 4 * (fraction * (1 - fraction) / inside.sum().item()) ** 0.5
        assert chosen[inside].double().mean().item() == pytest.approx(fraction, abs=tolerance)
    # The count of a step varies no more than that of independent choices.
    counts = torch.stack([mask.sum() / (moment < 0.3).sum() for moment, mask in seen])
    assert counts.std() < 1.3 * (fraction * (1 - fraction) / (0.3 * 64)) ** 0.5


def test_choice_changes_from_step_to_step_but_not_with_the_split() -> None:
    time = torch.rand(64) * 0.3
    masks = [choose(time, 64 * step, 0.3, 0.5) for step in range(8)]
    assert len({tuple(mask.tolist()) for mask in masks}) == 8
    assert torch.equal(torch.cat([choose(part, 64, 0.3, 0.5) for part in time.split(16)]), masks[1])
    assert choose(time, 0, 0.3, 1.0).all()


def test_only_the_images_chosen_are_compared_and_logged() -> None:
    seen: list[Tensor] = []

    def distance(predicted: Tensor, images: Tensor) -> Tensor:
        seen.append(images)
        return (predicted - images).square().mean((1, 2, 3))

    net, data = trunk(), Data()
    align = watched(Objective(), distance)
    run(net, align, data)
    chosen = choose(data.time, 50, 0.6, 0.7)
    assert torch.equal(seen[0], data.clean[chosen])
    predicted = prediction(net, data).detach()
    logs = align.logs()
    torch.testing.assert_close(logs["image_distance"], (predicted - data.clean)[chosen].square().mean())
    assert not logs["image_distance"].requires_grad
    assert align.logs() == {}
    align = watched(Objective(), distance, max_time=1e-6)
    assert run(net, align, data) > 0
    assert len(seen) == 1
    assert align.logs()["image_distance"].isnan()


def test_weight_is_a_schedule_and_starts_late() -> None:
    calls: list[int] = []

    def distance(predicted: Tensor, images: Tensor) -> Tensor:
        calls.append(len(images))
        return predicted.mean((1, 2, 3)) * 0 + 1

    data = Data()
    align = watched(Objective(), distance, fraction=1.0, max_time=1.0, start=0.4, weight={"40": 0.0, "80": 2.0})
    values = {}
    for seen in (0, 39, 40, 60, 90):
        align.taps(AlignmentBatch((), data.time, data.clean, None, seen, 100, 1 / BATCH))
        loss = align.loss(lambda: data.clean)
        values[seen] = None if loss is None else loss.item()
    assert values == {0: None, 39: None, 40: None, 60: pytest.approx(1.0), 90: pytest.approx(2.0)}
    assert calls == [BATCH, BATCH]


@pytest.mark.parametrize("name", ["none", "repa", "vrpo"])
def test_nothing_depends_on_the_split_or_the_loss_scale(name: str) -> None:
    found = []
    for parts, scale in ((1, 1.0), (4, 1.0), (2, 64.0)):
        net, align = trunk().double(), watched(objective(name).double())
        warm(net.float(), align.objective.float())
        net, align = net.double(), align.double()
        data, size = as_double(Data()), BATCH // parts
        for start in range(0, BATCH, size):
            run(net, align, data, slice(start, start + size), scale=scale)
        found.append({key: value / scale for key, value in gradients(net, align).items()})
        found[-1]["log"] = align.logs()["image_distance"]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["repa", "vrpo"])
def test_off_and_not_yet_on_change_no_bit(name: str) -> None:
    def forbidden(*_: Tensor) -> Tensor:
        pytest.fail("nothing is compared")

    assert add(ImageDistanceConfig(), align := objective(name)) is align
    found = []
    for wrap in (lambda inner: inner, lambda inner: watched(inner, forbidden, start=0.9)):
        net, align = trunk(), objective(name)
        warm(net, align)
        loss = run(net, wrap(align), Data())
        found.append({"loss": loss, **gradients(net, align), **align.logs()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def add(config: ImageDistanceConfig, align: Objective | None = None, **changes: Any) -> Objective:
    shape: dict[str, Any] = {"channels": 3, "image_size": SIDE, "tokens": TOKENS, "device": torch.device("cpu")}
    distance = load_distance(config, **(shape | changes))
    inner = align or Objective()
    return inner if distance is None else WithImageDistance(inner, distance, config)


def random_encoder(**settings: Any) -> ImageDistanceConfig:
    return ImageDistanceConfig.model_validate(
        ALWAYS | {"network": "resnet10t", "network_weights": "random", "input_size": 32, "feature": 1} | settings
    )


def test_frozen_network_belongs_to_nobody_and_stays_frozen() -> None:
    align = objective("repa")
    names, parameters = set(align.state_dict()), list(align.parameters())
    wrapped = add(random_encoder(), align)
    assert {name.removeprefix("objective.") for name in wrapped.state_dict()} == names
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in parameters]
    assert (wrapped.name, wrapped.depths) == (align.name, align.depths)
    wrapped.train()
    data = Data()
    (features,) = wrapped._distance[0]._features
    first = features(data.clean)
    run(trunk(), wrapped, data)
    assert torch.equal(features(data.clean), first)


def test_distance_is_float32_under_autocast() -> None:
    data, align = Data(), add(random_encoder(fraction=1.0))
    batch = AlignmentBatch((), data.time, data.clean, None, 50, 100, 1 / BATCH)
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            align.taps(batch)
            values.append(align.loss(lambda: data.clean + 0.1 * data.noise))
    assert values[0] > 0
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        ({}, {"channels": 4}, "compares images, but the latents have 4 channels: train on pixels"),
        ({"network": None}, {}, "kind 'encoder' needs a network: set align.perceptual_image.network"),
        ({"network": "resnet10"}, {}, "There is no encoder 'resnet10': did you mean 'resnet10t'"),
        ({"kind": "lpips", "network": None}, {}, "needs local weights: set align.perceptual_image.linear_weights"),
        ({"kind": "lpips", "network_weights": None}, {}, "local weights: set align.perceptual_image.network_weights"),
        ({"weight": {"soon": 1.0}}, {}, "align.perceptual_image.weight has a point at 'soon'"),
    ],
)
def test_refusals_are_one_sentence(settings: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        add(random_encoder(**settings), **changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def lpips_config(tmp_path: Path) -> ImageDistanceConfig:
    from torchvision.models import alexnet

    network, linear = tmp_path / "alexnet.safetensors", tmp_path / "linear.safetensors"
    state = alexnet(weights=None).state_dict()
    save_file({key: value for key, value in state.items() if key.startswith("features")}, network)
    widths = (64, 192, 384, 256, 256)
    save_file({f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}, linear)
    files = {"network_weights": str(network), "linear_weights": str(linear)}
    return ImageDistanceConfig.model_validate(ALWAYS | files | {"kind": "lpips", "network": "alex", "input_size": 40})


def test_lpips_adds_to_the_loss_and_refuses_images_too_small(lpips_config: ImageDistanceConfig) -> None:
    data, align = Data(), add(lpips_config)
    plain = run(trunk(), Objective(), data)
    loss = run(trunk(), align, data)
    compared = choose(data.time, 50, 0.6, 0.7).sum()
    torch.testing.assert_close(loss - plain, 0.4 * align.logs()["image_distance"] * compared / BATCH)
    with pytest.raises(ConfigError, match=r"cannot take images of 8 px: set .*input_size to 31 or more"):
        add(lpips_config.model_copy(update={"input_size": None}))


def test_networks_are_told_by_their_weights(lpips_config: ImageDistanceConfig) -> None:
    def fingerprint(linear: Path) -> str:
        config = lpips_config.model_copy(update={"linear_weights": str(linear)})
        distance = load_distance(config, channels=3, image_size=SIDE, tokens=TOKENS, device=torch.device("cpu"))
        assert distance is not None
        return str(distance.fingerprint)

    assert lpips_config.linear_weights is not None
    linear = Path(lpips_config.linear_weights)
    first = fingerprint(linear)
    assert first.startswith("lpips-alex weights=")
    moved = linear.rename(linear.with_name("moved.safetensors"))
    assert fingerprint(moved) == first
    save_file({name: 2 * value for name, value in load_file(moved).items()}, moved)
    assert fingerprint(moved) != first


def test_real_encoder_ranks_images_by_noise(shared_data: Path) -> None:
    from zipfile import ZipFile

    from PIL import Image

    with ZipFile(shared_data / "cifar10-test.zip") as archive:
        files = [name for name in archive.namelist() if not name.endswith("/")][::1250][:8]
        pictures = [np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in files]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    config = random_encoder(
        network="tf_efficientnet_lite0",
        network_weights=str(shared_data / "efficientnet_lite0_imagenet_timm.safetensors"),
        feature=None,
        input_size=128,
    )
    (distance,) = add(config, image_size=32, tokens=16)._distance
    noise = torch.randn_like(images)
    with torch.no_grad():
        true, faint, strong = (distance(images + size * noise, images) for size in (0.0, 0.1, 0.5))
        other = distance(images.roll(1, 0), images)
    assert true.abs().max() < 1e-5
    assert (true < faint).all()
    assert (faint < strong).all()
    assert (faint < other).all()
    predicted = (images + 0.3 * noise).requires_grad_()
    before = distance(predicted, images)
    (gradient,) = torch.autograd.grad(before.sum(), predicted)
    with torch.no_grad():
        step = 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (distance(predicted - step, images) < before).all()


def test_run_with_vrpo(tmp_path: Path) -> None:
    """The whole trainer: late start, telemetry, the same weights from a split step."""
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    source = ArraySource(pictures, np.arange(48) % 3, ("a", "b", "c"), "noise")
    prepare(source, tmp_path / "data", size=16, workers=1, progress=False)
    encoder = {"name": "resnet10t", "weights": "random", "feature": 1, "input_size": 16}
    distance = {"kind": "encoder", "network": "resnet10t", "network_weights": "random", "feature": 1, "input_size": 32}

    def train(folder: str, micro_batch: int = 0, **settings: Any) -> None:
        values = {
            "data": {"path": str(tmp_path / "data")},
            "model": {"name": "SiT-N/4"},
            "encoder": encoder,
            "align": {"objective": "vrpo", "projector_width": 32, "depth": 2, "perceptual_image": settings},
            "train": {"images": 96, "batch_size": 16, "micro_batch": micro_batch, "log_every": 16, "device": "cpu"},
        }
        Trainer(validate(values, "the test"), tmp_path / folder, say=lambda _: None).train()

    def weights(folder: str) -> dict[str, Tensor]:
        return load_file(tmp_path / folder / "checkpoints" / "step-00000006" / "model.safetensors")

    on = distance | {"weight": {"0": 1.0}, "max_time": 1.0, "fraction": 0.5}
    train("off")
    train("later", **on | {"start": 1.0})
    assert all(torch.equal(value, weights("later")[name]) for name, value in weights("off").items())

    train("on", **on)
    lines = (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    logged = [record.get("objective/image_distance") for record in records]
    assert logged[:3] == [None] * 3
    assert all(value > 0 for value in logged[3:])
    assert not all(torch.equal(value, weights("on")[name]) for name, value in weights("off").items())

    train("split", 4, **on)
    for name, value in weights("on").items():
        torch.testing.assert_close(weights("split")[name], value, rtol=2e-3, atol=2e-5)
