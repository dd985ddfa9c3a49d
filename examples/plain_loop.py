"""VRPO in a torch loop of your own: a small transformer on handwritten digits, in seconds on a CPU."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from vrpo.alignment import Aligner
from vrpo.config import AlignConfig
from vrpo.models.transformer import DiffusionTransformer


class Teacher(nn.Module):
    """The encoder: anything frozen that has a `width` and gives tokens, here the map of a small classifier."""

    width = 32

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Conv2d(3, 64, 4, stride=4), nn.SiLU(), nn.Conv2d(64, 32, 3, padding=1))
        head, scale = nn.Linear(32, 10), 255.0
        optimizer = torch.optim.AdamW([*self.parameters(), *head.parameters()], 3e-3)
        for _ in range(40):
            F.cross_entropy(head(F.silu(self.map(images / scale)).mean((2, 3))), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        return self.map(images / 255.0).flatten(2).transpose(1, 2)


def main(steps: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = (torch.tensor(digits.images) * 15.9).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(2, -1).repeat_interleave(2, -2)  # 16 x 16 pixels: 4 x 4 tokens
    labels = torch.tensor(digits.target)

    model = DiffusionTransformer(
        input_size=16, patch_size=4, in_channels=3, hidden_size=64, depth=4, num_heads=2, num_classes=10
    )
    teacher = Teacher(images[:256], labels[:256])
    align = AlignConfig(objective="vrpo", projector_width=128)
    aligner = Aligner(
        model, "blocks.1", hidden_size=64, tokens=16, encoders=teacher, budget=32 * steps, objective=align
    )
    optimizer = torch.optim.AdamW([*model.parameters(), *aligner.parameters()], 1e-3)

    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (32,))
        clean = images[rows] / 127.5 - 1
        noise, time = torch.randn_like(clean), torch.rand(32)
        t = time[:, None, None, None]
        with aligner.step(images[rows], time, clean):
            velocity = model((1 - t) * clean + t * noise, time, labels[rows])
        denoising = F.mse_loss(velocity, noise - clean)
        (denoising + aligner.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()
        if step % max(1, steps // 10) == 0:
            print(f"step {step:4d}  denoising {denoising:.3f}  alignment {aligner.logs()['alignment']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
