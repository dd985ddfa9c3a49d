"""Images of a run: sample i is a function of (seed, i), whatever else is drawn beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import network

from vrpo.config import RunConfig
from vrpo.config_load import validate
from vrpo.errors import ConfigError
from vrpo.models.transformer import DiffusionTransformer
from vrpo.sampling import ImageSampler, check_sampling, sample_labels
from vrpo.sampling.sampler import default_compute_batch


def config(sampler: str = "ode-euler", guidance: float = 1.0, **more: Any) -> RunConfig:
    sample = {"sampler": sampler, "steps": 4, "guidance_scale": guidance, "compute_batch": 4, **more}
    return validate({"sample": sample}, "the test")


class Watched(DiffusionTransformer):
    """A transformer that records how many images it sees, and rounds differently for every place in the batch."""

    seen: list[int]

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.seen.append(len(x))
        place = torch.arange(len(x)) / len(x)
        return super().forward(x, *rest) + 0.1 * place[:, None, None, None]


def watched(kind: str = "SiT", num_classes: int = 4) -> Watched:
    trained = network(kind, num_classes)
    built = Watched(**trained.config).eval()
    built.load_state_dict(trained.state_dict())
    built.seen = []
    return built


KINDS = [("SiT", "ode-euler"), ("SiT", "ode-heun"), ("SiT", "sde"), ("DiT", "ddim"), ("DiT", "ddpm")]


@pytest.mark.parametrize(("kind", "sampler"), KINDS)
def test_an_image_is_the_same_to_the_bit_whatever_is_drawn_beside_it(kind: str, sampler: str) -> None:
    """Even with a network whose arithmetic depends on the batch's size and on the image's place in it."""
    trunk = watched(kind)
    labels = sample_labels(range(11), 4, "balanced", 0)
    assert labels is not None
    whole = ImageSampler(trunk, config(sampler, 1.5), device="cpu").images(range(11), labels, seed=3)
    for part in ([0], [5], [2, 3, 4, 5], [10, 1, 9], [7, 7], range(3, 11)):
        other = ImageSampler(trunk, config(sampler, 1.5, batch_size=3), device="cpu")
        assert torch.equal(other.images(part, labels[list(part)], seed=3), whole[list(part)])
    assert set(trunk.seen) == {8}, "both halves of the guidance, four images each"
    assert not torch.equal(whole[0], whole[4]), "samples of one class differ by their noise"
    assert not torch.equal(other.images(range(11), labels, seed=4), whole)


def test_one_sample_under_two_labels_is_two_images() -> None:
    sampler = ImageSampler(network(), config(), device="cpu")
    first, second = sampler.images([5, 5], torch.tensor([0, 3]), seed=0)
    assert not torch.equal(first, second)
    assert torch.equal(sampler.images([5], torch.tensor([3]), seed=0)[0], second)


@pytest.mark.parametrize(
    ("device", "tokens", "batch"),
    [
        ("cpu", 64, 16),
        ("cpu", 16, 16),
        ("cpu", 256, 4),
        ("cpu", 4096, 4),
        ("cuda", 64, 256),
        ("cuda", 256, 64),
        ("cuda", 196, 64),
        ("cuda", 1, 512),
        ("cuda", 4096, 8),
    ],
)
def test_the_batch_of_the_network_follows_the_device_and_the_tokens(device: str, tokens: int, batch: int) -> None:
    assert default_compute_batch(torch.device(device), tokens) == batch


def test_images_are_told_as_they_are_done() -> None:
    told: list[int] = []
    sampler = ImageSampler(network(), config(), device="cpu")
    sizes = [len(batch) for batch in sampler.batches(range(2, 11), torch.zeros(9).long(), 0, told.append)]
    assert (sizes, told) == ([2, 4, 3], [2, 6, 9])


def test_precision_is_the_runs_or_its_own() -> None:
    trunk, labels = network(), torch.arange(4)
    plain = ImageSampler(trunk, config(), device="cpu").images(range(4), labels, 0)
    rounded = ImageSampler(trunk, config(precision="bf16"), device="cpu").images(range(4), labels, 0)
    as_trained = config().model_copy(update={"train": config().train.model_copy(update={"precision": "bf16"})})
    assert torch.equal(ImageSampler(trunk, as_trained, device="cpu").images(range(4), labels, 0), rounded)
    assert 0 < (plain.float() - rounded.float()).abs().max() < 16


def test_guided_channels_are_part_of_the_protocol_where_they_are_not_all() -> None:
    trunk, labels = network(), torch.arange(4)

    def drawn(guidance: float, channels: int | None) -> tuple[torch.Tensor, object]:
        sampler = ImageSampler(trunk, config("sde", guidance, guidance_channels=channels), device="cpu")
        return sampler.images(range(4), labels, 0), sampler.protocol.get("guidance_channels")

    every, first, all_named = drawn(3.0, None), drawn(3.0, 1), drawn(3.0, 3)
    assert (every[1], first[1], all_named[1], drawn(1.0, 1)[1]) == (None, 1, None, None)
    assert torch.equal(every[0], all_named[0])
    assert not torch.equal(every[0], first[0])
    beside_a_token = config(guidance=2.0, guidance_channels=1).sample
    with pytest.raises(ConfigError, match=r"sample.guidance_channels 1 leaves open .* the token"):
        check_sampling("SiT", beside_a_token, True, 0.1, 3, token=True)


def test_guidance_needs_classes_and_is_refused_before_the_network_runs() -> None:
    trunk = watched(num_classes=0)
    with pytest.raises(ConfigError, match=r"sample.guidance_scale 2 needs classes, and there are none"):
        ImageSampler(trunk, config("ode-euler", 2.0), device="cpu")
    assert not trunk.seen


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("SiT", {"sampler": "ddpm"}, r"^sample.sampler 'ddpm' does not fit SiT: choose one of: ode-euler"),
        ("SiT", {"guidance_interval": (0.7, 0.3)}, r"^sample.guidance_interval 0.7 0.3 ends before it starts"),
        ("DiT", {"sampler": "ddim", "steps": 240}, r"^sample.steps 240 does not divide"),
        ("SiT", {"guidance_channels": 4}, r"^sample.guidance_channels 4 is not among the 3 channels that are sampled"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(kind: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ImageSampler(watched(kind), config(**changes), device="cpu")
