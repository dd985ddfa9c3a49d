"""Small folders of latents as REPA's and LightningDiT's tools leave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vrpo.data.transforms import decode
from vrpo.vision.autoencoders import load_autoencoder


def write_repa(folder: Path, files: Sequence[bytes], autoencoder: Path, images: bool = True, size: int = 16) -> Path:
    """Write what REPA's preprocessing writes of encoded images, latents in the order opposite to that of the images."""
    network = load_autoencoder(str(autoencoder))
    labels = []
    for i in reversed(range(len(files))):
        place = f"{i // 8:05d}"
        for part in ("images", "vae-sd"):
            if images or part == "vae-sd":
                (folder / part / place).mkdir(parents=True, exist_ok=True)
        if images:
            (folder / "images" / place / f"img{i:08d}.png").write_bytes(files[i])
        pixels = torch.from_numpy(decode(files[i], size)[0])[None]
        np.save(folder / "vae-sd" / place / f"img-mean-std-{i:08d}.npy", network.encode(pixels)[0].numpy())
        labels.append([f"{place}/img-mean-std-{i:08d}.npy", i % 3])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def write_lightning(
    folder: Path, dtype: torch.dtype = torch.float32, channels: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write ten latents and those of their mirror images in three shards, and return both."""
    folder.mkdir()
    latents, flips = torch.randn(2, 10, channels, 4, 4).mul(3).add(1).to(dtype)
    for shard, part in enumerate(torch.arange(10).split(4)):
        content = {"latents": latents[part].clone(), "latents_flip": flips[part].clone(), "labels": part % 5}
        save_file(content, folder / f"latents_rank00_shard{shard:03d}.safetensors")
    return latents, flips
