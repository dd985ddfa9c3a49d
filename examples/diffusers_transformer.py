"""VRPO under diffusers: its DiT and its noise schedule, with the alignment added in four lines."""

import argparse

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits
from torch.nn import functional as F

from vrpo.alignment import Aligner
from vrpo.config import AlignConfig
from vrpo.vision.encoders import load_encoder


def main(steps: int, encoder: str, weights: str | None) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = (torch.tensor(digits.images) * 15.9).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(4, -1).repeat_interleave(4, -2)  # 32 x 32 pixels
    labels = torch.tensor(digits.target)

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        num_layers=3,
        sample_size=32,
        patch_size=8,
        num_embeds_ada_norm=1000,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    aligner = Aligner(  # 1
        model,
        "transformer_blocks.1",
        hidden_size=64,
        tokens=16,
        encoders=load_encoder(encoder, weights=weights, grid=4),
        budget=32 * steps,
        objective=AlignConfig(objective="vrpo", projector_width=128),
    )
    aligner.center(images[:256])  # for random and convolutional encoders, once
    optimizer = torch.optim.AdamW([*model.parameters(), *aligner.parameters()], 1e-3)

    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (32,))
        clean = images[rows] / 127.5 - 1
        noise, t = torch.randn_like(clean), torch.randint(1000, (32,))
        with aligner.step(images[rows], t / 999, clean):  # 2
            output = model(scheduler.add_noise(clean, noise, t), t, labels[rows]).sample
        denoising = F.mse_loss(output, noise)
        (denoising + aligner.loss()).backward()  # 3
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()  # 4
        if step % max(1, steps // 10) == 0:
            print(f"step {step:4d}  denoising {denoising:.3f}  alignment {aligner.logs()['alignment']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--encoder", default="test_vit", help="such as dinov2-vit-b")
    parser.add_argument("--weights", default="random", help="a local file, or 'published'")
    given = parser.parse_args()
    main(given.steps, given.encoder, None if given.weights == "published" else given.weights)
