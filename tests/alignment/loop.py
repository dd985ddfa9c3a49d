"""A training loop of another project, in small: what the drop-in is added to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrpo.alignment import Aligner
from vrpo.config import AlignConfig, DiffusionConfig
from vrpo.models.transformer import DiffusionTransformer
from vrpo.pixels import to_float
from vrpo.sampling import build_denoising
from vrpo.training.step import draw_step

BATCH, SIDE, TOKENS, HIDDEN, DEPTH, BUDGET = 8, 8, 16, 32, 4, 40
DENOISING = build_denoising("SiT", DiffusionConfig())


class Patches:
    """Encoders for tests: a fixed linear map of each patch."""

    def __init__(self, width: int = 24, grid: int = 4) -> None:
        self.width, self.grid = width, grid
        values = 3 * (SIDE // grid) ** 2
        self.matrix = torch.randn(values, width, generator=torch.Generator().manual_seed(width)) / values**0.5

    def tokens(self, images: Tensor) -> Tensor:
        patches = nn.functional.pixel_unshuffle(to_float(images), SIDE // self.grid)
        return patches.flatten(2).transpose(1, 2) @ self.matrix


def trunk() -> DiffusionTransformer:
    torch.manual_seed(0)
    net = DiffusionTransformer(
        input_size=SIDE, patch_size=2, in_channels=3, hidden_size=HIDDEN, depth=DEPTH, num_heads=2, num_classes=0
    )
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def config(objective: str, **vrpo: Any) -> AlignConfig:
    return AlignConfig.model_validate({"objective": objective, "projector_width": 48, "vrpo": vrpo})


def pictures(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def make(model: nn.Module, blocks: str | Sequence[str] = "blocks.1", **over: Any) -> Aligner:
    torch.manual_seed(1)
    values: dict[str, Any] = {"hidden_size": HIDDEN, "tokens": TOKENS, "encoders": Patches(), "budget": BUDGET}
    values = {**values, "objective": config("vrpo"), **over}
    return Aligner(model, blocks, **values)


def denoise(model: nn.Module, clean: Tensor, draws: Any) -> Tensor:
    """Return the denoising loss as somebody else's trainer would compute it."""
    noised = DENOISING.noised(clean, draws.noise, draws.uniforms)
    return DENOISING.loss(model(noised, draws.uniforms).float(), clean, draws.noise, draws.uniforms).mean()


def run(
    model: nn.Module,
    aligner: Aligner,
    steps: int = 4,
    *,
    parts: int = 1,
    scale: float = 1.0,
    inside: bool = False,
    forward: nn.Module | None = None,
) -> list[dict[str, Tensor]]:
    """Train with plain SGD, and return every step's gradients."""
    optimizer = torch.optim.SGD([*model.parameters(), *aligner.parameters()], lr=0.05)
    history, size = [], BATCH // parts
    for step in range(steps):
        images = pictures(step)
        draws = draw(step)
        for start in range(0, BATCH, size):
            part, some = draws.part(start, start + size), images[start : start + size]
            with aligner.step(some, part.uniforms):
                loss = denoise(model if forward is None else forward, to_float(some), part)
                if inside:
                    ((loss + aligner.loss()) * (scale / parts)).backward()
            if not inside:
                (scale * (loss + aligner.loss()) / parts).backward()
        history.append(gradients(model, aligner.objective, scale))
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()
    return history


def draw(step: int) -> Any:
    return draw_step(
        0, step, count=BATCH, shape=(3, SIDE, SIDE), noisings=1, label_dropout=0, device=torch.device("cpu")
    )


def gradients(model: nn.Module, objective: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    found = {}
    for prefix, module in (("model", model), ("objective", objective)):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
                found[f"{prefix}.{name.replace('_orig_mod.', '')}"] = parameter.grad.clone()
    return found


class Loop(nn.Module):
    """The blocks one after the other or, as trainers of large models do, each recomputed in the backward pass."""

    def __init__(self, net: DiffusionTransformer, reentrant: bool | None = None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        net = self.net
        tokens, condition = net.patch_embedding(x) + net.position_table, net.time_embedding(t)
        for block in net.blocks:
            if self.reentrant is None:
                tokens = block(tokens, condition)
            else:
                tokens = checkpoint(block, tokens, condition, use_reentrant=self.reentrant)
        return net._unpatchify(net.final(tokens, condition))


def noised() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), torch.rand(BATCH, generator=generator)
