"""Closed forms of operations against torch's counter on small networks that really run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vrpo.alignment.projector import MLPProjector
from vrpo.config import EncoderConfig
from vrpo.config_load import validate
from vrpo.models.transformer import build_transformer
from vrpo.planning.flops import autoencoder_flops, trunk_flops
from vrpo.planning.trace import DataShape, flop_counter, trace_encoder, trace_step


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("name", "size", "channels"), [("SiT-N/4", 16, 3), ("DiT-N/2", 16, 4), ("SiT-Ti/2", 8, 4)])
def test_the_trunk_s_operations_are_counted(name: str, size: int, channels: int, checkpoint: bool) -> None:
    model = build_transformer(
        name, input_size=size, in_channels=channels, num_classes=3, checkpoint_blocks=checkpoint
    ).train()
    arguments = torch.randn(2, channels, size, size), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    expected = trunk_flops(name, size, channels)
    with torch.no_grad(), flop_counter() as forward:
        model(*arguments)
    assert forward.get_total_flops() == 2 * expected.forward
    with flop_counter() as training:
        model(*arguments).sum().backward()
    assert training.get_total_flops() == 2 * expected.training(checkpoint_blocks=checkpoint)


def test_published_costs() -> None:
    """Table 4 of arXiv 2212.09748 counts multiply-adds: 118.64 G for DiT-XL/2 at 256 px, 524.60 G at 512 px."""
    for name, side, published in (
        ("DiT-S/2", 32, 6.06),
        ("DiT-B/2", 32, 23.01),
        ("DiT-L/2", 32, 80.71),
        ("DiT-XL/2", 32, 118.64),
        ("DiT-XL/2", 64, 524.60),
    ):
        assert trunk_flops(name, side, 4).forward / 2e9 == pytest.approx(published, rel=0.001)


def test_the_autoencoder_s_operations_are_counted() -> None:
    from diffusers import AutoencoderKL

    channels, layers = (8, 16, 24), 1
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    encode, decode = autoencoder_flops(32, channels=channels, layers=layers)
    with torch.no_grad():
        with flop_counter() as counted:
            latents = model.encode(torch.randn(1, 3, 32, 32)).latent_dist.mean
        assert counted.get_total_flops() == encode
        with flop_counter() as counted:
            model.decode(latents)
        assert counted.get_total_flops() == decode


def test_an_objective_costs_its_projector() -> None:
    values = {"model": {"name": "SiT-N/4"}, "align": {"objective": "repa", "projector_width": 64}}
    step = trace_step(validate(values, "the test"), DataShape(16, 16, 3, 3), (48,), share=4, micro=2)
    h = torch.randn(1, 16, 96, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        MLPProjector(96, 48, 64)(h).sum().backward()

    assert step.flops // 4 - trunk_flops("SiT-N/4", 16, 3).training() == counted.get_total_flops()


def test_an_encoder_s_operations_are_those_of_its_layers() -> None:
    trace = trace_encoder(EncoderConfig(name="dinov2-vit-s"), grid=4, reduced=False)
    tokens, width, depth = 17, 384, 12
    patches = 2 * 16 * 3 * 14**2 * width
    assert trace.flops == patches + depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    assert (trace.width, trace.input_size) == (width, 56)
    assert trace.parameters == pytest.approx(22.06e6, rel=0.001)
