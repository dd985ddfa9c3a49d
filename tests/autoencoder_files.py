"""Small autoencoders of the real classes with random weights, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import torch


def save_autoencoder(
    folder: Path, seed: int = 0, scaling_factor: float = 0.5, shift_factor: float | None = 0.25
) -> Path:
    """Save an AutoencoderKL that halves once: 3 x 16 x 16 pixels become 4 x 8 x 8 latents."""
    import diffusers

    torch.manual_seed(seed)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
    network.save_pretrained(folder)
    return folder


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """Save an AutoencoderTiny that halves once."""
    import diffusers

    torch.manual_seed(seed)
    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    network.save_pretrained(folder)
    return folder
