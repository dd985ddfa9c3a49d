"""Images against an integration written out here: without a token, and with one, which guidance acts on too."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small import network
from torch import Tensor

from vrpo.config_load import validate
from vrpo.diffusion.noise import SampleNoise
from vrpo.models.transformer import DiffusionTransformer
from vrpo.pixels import to_uint8
from vrpo.sampling import ImageSampler

COUNT, STEPS, SCALE, INTERVAL, TOKEN = 4, 5, 4.0, (0.3, 0.8), 6


def with_token(trunk: DiffusionTransformer) -> DiffusionTransformer:
    trunk.add_token(TOKEN)
    with torch.no_grad():
        for parameter in trunk.representation.parameters():  # type: ignore[union-attr]
            parameter.add_(0.3 * torch.randn(parameter.shape))
        # Attention that matters, so that the token shows in the image.
        for block in trunk.blocks:
            block.attention.output.weight.mul_(12)  # type: ignore[union-attr]
    return trunk


def by_hand(trunk: DiffusionTransformer, labels: Tensor, token: bool, token_guided: bool = True) -> Tensor:
    """Euler from noise to data in float64, guided within the interval; the token is dropped at the end."""
    width = TOKEN if token else 0
    pixels = 3 * 8 * 8
    shape = (pixels + width,) if token else (3, 8, 8)
    noise = SampleNoise(0, range(COUNT), shape, torch.device("cpu")).initial()
    flat = noise.double().flatten(1)
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist()

    def velocity(state: Tensor, t: float, named: Tensor) -> Tensor:
        image, rest = state[:, :pixels].float().view(-1, 3, 8, 8), state[:, pixels:].float()
        time = torch.full((COUNT,), t)
        if not token:
            return trunk(image, time, named).double().flatten(1)
        moved, carried = trunk(image, time, named, token=rest)
        return torch.cat([moved.flatten(1), carried], dim=1).double()

    for now, then in pairwise(times):
        drift = conditional = velocity(flat, now, labels)
        if INTERVAL[0] <= now <= INTERVAL[1]:
            null = velocity(flat, now, torch.full_like(labels, trunk.num_classes))
            drift = null + SCALE * (conditional - null)
            if not token_guided:
                drift[:, pixels:] = conditional[:, pixels:]
        flat = flat + (then - now) * drift
    return flat[:, :pixels].view(-1, 3, 8, 8).float()


def drawn(trunk: DiffusionTransformer, labels: Tensor) -> Tensor:
    settings = {"sampler": "ode-euler", "steps": STEPS, "guidance_scale": SCALE, "guidance_interval": INTERVAL}
    config = validate({"sample": {**settings, "compute_batch": COUNT}}, "the test")
    return ImageSampler(trunk, config, device="cpu").images(range(COUNT), labels, seed=0)


@pytest.mark.parametrize("token", [False, True], ids=["image-alone", "with-token"])
@torch.no_grad()
def test_images_are_those_of_a_plain_loop(token: bool) -> None:
    trunk = with_token(network()) if token else network()
    labels = torch.arange(COUNT)
    found, expected = drawn(trunk, labels), to_uint8(by_hand(trunk, labels, token))
    # One level where a value lies between two: the halves of a guided batch of 8 round unlike batches of 4.
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert found.float().std() > 20, "the images are not flat"


@torch.no_grad()
def test_guidance_acts_on_the_token_and_through_it_on_the_image() -> None:
    trunk, labels = with_token(network()), torch.arange(COUNT)
    guided, unguided = (to_uint8(by_hand(trunk, labels, True, whole)) for whole in (True, False))
    difference = (guided.int() - unguided.int()).abs()
    assert difference.max() > 1, "the token's guidance shows in no pixel, so the loop above tells nothing of it"
