"""A small denoising step with real parts, and the exact arithmetic of a trainer, for tests of objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch, Objective
from vrpo.alignment.static import Irepa, Repa
from vrpo.alignment.vrpo import Vrpo
from vrpo.config import AlignConfig
from vrpo.models.transformer import DiffusionTransformer

SIDE, CHANNELS, TOKENS, WIDTH, HIDDEN, BATCH = 8, 3, 16, 24, 32, 8
PURE = {"alpha_end": 1.0, "trust": 0.0, "gate": False}


def trunk(*, zero_output: bool = False, seed: int = 0, **options: Any) -> DiffusionTransformer:
    """Return a three-block SiT whose blocks are not the identity they start as."""
    torch.manual_seed(seed)
    net = DiffusionTransformer(
        input_size=SIDE, patch_size=2, in_channels=CHANNELS, hidden_size=HIDDEN, depth=3, num_heads=2,
        num_classes=4, **options,
    )  # fmt: skip
    if not zero_output:
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return net


def objective(
    name: str = "vrpo",
    depths: Sequence[int] = (2,),
    widths: Sequence[int] = (WIDTH,),
    seed: int = 1,
    **settings: Any,
) -> Objective:
    """Return an objective; ``settings`` are those of ``VrpoConfig``."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "depths": depths, "encoder_widths": widths}
    config = AlignConfig.model_validate({"objective": name, "projector_width": 48, "vrpo": settings})
    if name == "none":
        return Objective()
    if name == "vrpo":
        return Vrpo(config, **shape, tokens=TOKENS)
    return {"repa": Repa, "irepa": Irepa}[name](config, **shape)


class Data:
    """One batch of noised images with targets, the same for the same seed."""

    def __init__(self, seed: int = 0, images: int = BATCH, widths: Sequence[int] = (WIDTH,)) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.clean = torch.randn(images, CHANNELS, SIDE, SIDE, generator=generator)
        self.noise = torch.randn(images, CHANNELS, SIDE, SIDE, generator=generator)
        self.time = torch.rand(images, generator=generator)
        self.labels = torch.randint(0, 4, (images,), generator=generator)
        self.targets = tuple(torch.randn(images, TOKENS, width, generator=generator) for width in widths)


def accumulate(
    net: Callable[..., Tensor],
    align: Objective,
    data: Data,
    *,
    seen: int = 50,
    budget: int = 100,
    part: slice = slice(None),
    total: int = BATCH,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run a forward and backward pass on ``part`` of the batch, and return the loss that was
    differentiated.
    """
    clean, noise, time = data.clean[part], data.noise[part], data.time[part]
    batch = AlignmentBatch(
        targets=tuple(target[part] for target in data.targets),
        time=time,
        clean=clean,
        images=None,
        images_seen=seen,
        budget=budget,
        sample_weight=scale / total,
        generator=generator,
    )
    taps = align.taps(batch)
    t = time.view(-1, 1, 1, 1).to(clean.dtype)
    output = net((1 - t) * clean + t * noise, time, data.labels[part], taps).to(clean.dtype)
    losses = (output - (noise - clean)).square().mean((1, 2, 3))
    extra = align.loss(lambda: output)
    weight = len(clean) / total
    loss = losses.mean() * weight
    if extra is not None:
        loss = loss + extra * weight
    (loss * scale).backward()
    return loss.detach()


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """Return every gradient by name, and forget them."""
    found = {}
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"{index}.{name}"] = parameter.grad.clone()
                parameter.grad = None
    return found


def warm(net: nn.Module, align: Objective, steps: int = 3) -> None:
    """Give an objective the statistics of a few steps, leaving all weights as they are."""
    for step in range(steps):
        accumulate(net, align, Data(100 + step), generator=torch.Generator().manual_seed(step))
        align.update()
    gradients(net, align)
    align.logs()


def train(net: nn.Module, align: Objective, steps: int, start: int = 0, optimiser: Any = None) -> list[float]:
    """Train for ``steps`` steps as a trainer would, and return the losses."""
    trained = [p for module in (net, align) for p in module.parameters() if p.requires_grad]
    optimiser = optimiser or torch.optim.AdamW(trained, 1e-3)
    losses = []
    for step in range(start, start + steps):
        optimiser.zero_grad()
        source = torch.Generator().manual_seed(step)
        loss = accumulate(net, align, Data(step), seen=step * BATCH, budget=50 * BATCH, generator=source)
        optimiser.step()
        align.update()
        losses.append(loss.item())
    return losses


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in found.values()])


def policy_part(net: Any, align: Objective, data: Data, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of the policy's share alone: with the objective less without."""
    accumulate(net, align, data, **options)
    both = gradients(net, align)
    accumulate(net, Objective(), data, **options)
    plain = gradients(net, align)
    return {name: value - plain.get(name, 0) for name, value in both.items()}


ISOLATED = {"trust": 0.0, "perceptual": 0.0, "gate": False, "warmup": 0.0}
