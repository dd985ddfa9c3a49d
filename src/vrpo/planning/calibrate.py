"""How fast this machine trains: the run's own step on random images, for a few seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo.alignment.objective import TargetBatch
from vrpo.config import RunConfig
from vrpo.errors import ConfigError
from vrpo.planning.plan import Plan
from vrpo.planning.trace import (
    DataShape,
    build_networks,
    precision_of,
    random_distance,
    random_encoder,
    run_step,
    targets_like,
)
from vrpo.sampling import build_denoising
from vrpo.training.optim import Optimizer
from vrpo.training.step import DenoisingStep

LONG_ENOUGH = 2.0  # seconds of one timed step
WINDOWS = 3
SHARE_OF_ROOM = 0.8


@dataclass(frozen=True)
class Speed:
    """Images a second of one process, and how many images the timed pass held."""

    images_per_second: float
    images: int


def measure(config: RunConfig, shape: DataShape, plan: Plan, *, device: torch.device, available: float) -> Speed:
    """Time the step of ``config`` on ``device``: targets, forward and backward pass, and the optimiser's step.

    The pass is doubled in size until it takes two seconds, holds a process' share, or fills the memory.

    Raises:
        ConfigError: the networks alone do not fit into ``available`` bytes.
    """
    room = SHARE_OF_ROOM * available - plan.memory.persistent - plan.memory.gradients
    if room < 0:
        raise ConfigError(
            f"This machine has {available / 1e9:.0f} GB, and the networks of '{plan.model}' with their gradients and "
            f"moments take {(plan.memory.persistent + plan.memory.gradients) / 1e9:.0f} GB: plan for another machine "
            "with --gpu NAME."
        )
    with device:
        encoders = [
            random_encoder(
                encoder,
                grid=plan.grid,
                device=device,
                dtype=torch.bfloat16 if _reduced(encoder.precision, device) else torch.float32,
            )
            for encoder in config.encoders
        ]
        widths = tuple(encoder.width for encoder in encoders)
        trunk, objective = build_networks(config, shape, widths, random_distance(config, shape, device))
    module = DenoisingStep(trunk, objective, build_denoising(trunk.kind, config.diffusion), precision_of(config))
    optimizer = Optimizer(module.parameters(), config.train, device)

    def targets_of(pixels: Tensor) -> TargetBatch:
        return targets_like(tuple(encoder.tokens(pixels) for encoder in encoders), config)

    def time_step(images: int) -> tuple[float, float]:
        """Return the seconds of the passes and of the optimiser's step, each the least of a few."""
        found: list[tuple[float, float]] = []
        while len(found) <= WINDOWS:  # the first one warms up
            start = _now(device)
            run_step(module, config, shape, widths, share=images, micro=images, device=device, targets_of=targets_of)
            between = _now(device)
            optimizer.step(config.train.batch_size)
            found.append((between - start, _now(device) - between))
            if between - start > 4 * LONG_ENOUGH:
                break
        timed = found[1:] or found
        return min(passed for passed, _ in timed), min(updated for _, updated in timed)

    images = config.train.noisings
    while True:
        passed, updated = time_step(images)
        double = 2 * images
        too_large = double > plan.micro or plan.memory.activations * double / plan.micro > room
        if passed > LONG_ENOUGH or too_large:
            break
        images = double
    return Speed(plan.share / (passed * plan.share / images + updated), images)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reduced(precision: str, device: torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
