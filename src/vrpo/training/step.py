"""One denoising step as a module: trunk and objective together, so that one wrapper reduces both gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch, Objective
from vrpo.diffusion.losses import Denoising, stratify
from vrpo.models.transformer import DiffusionTransformer
from vrpo.randomness import STREAM_NOISE, STREAM_OBJECTIVE, step_generator


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step's B noised images: a function of (seed, step)."""

    uniforms: Tensor
    noise: Tensor
    dropped: Tensor
    generator: torch.Generator

    def part(self, start: int, stop: int) -> Draws:
        """Return the draws of images ``start`` to ``stop``."""
        where = slice(start, stop)
        return Draws(self.uniforms[where], self.noise[where], self.dropped[where], self.generator)


def draw_step(
    seed: int,
    step: int,
    *,
    count: int,
    shape: tuple[int, int, int],
    noisings: int,
    label_dropout: float,
    device: torch.device,
) -> Draws:
    """Draw times, noise and label drops for ``count`` noised images of ``shape`` (C, H, W).

    The whole step is drawn at once whatever its split into micro-batches. Times are stratified over each image's
    noisings; so is a plain step's single time over nothing, which is the uniform draw itself.
    """
    generator = step_generator(seed, step, STREAM_NOISE, device)
    uniforms = torch.rand(count, generator=generator, device=device)
    noise = torch.randn(count, *shape, generator=generator, device=device)
    dropped = torch.rand(count, generator=generator, device=device) < label_dropout
    own = step_generator(seed, step, STREAM_OBJECTIVE, device)
    return Draws(stratify(uniforms, noisings), noise, dropped, own)


@dataclass(frozen=True)
class StepOutput:
    """What a micro-batch gives: the scalar to differentiate, and per-image losses for the log."""

    loss: Tensor
    denoising: Tensor
    alignment_loss: Tensor | None
    unit_time: Tensor


class DenoisingStep(nn.Module):
    """Trunk, objective and denoising loss of one micro-batch."""

    def __init__(
        self, trunk: DiffusionTransformer, objective: Objective, denoising: Denoising, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.objective = objective
        self.denoising = denoising
        self.dtype = dtype

    def forward(
        self,
        clean: Tensor,
        labels: Tensor | None,
        draws: Draws,
        targets: tuple[Tensor, ...],
        images: Tensor | None,
        *,
        images_seen: int,
        budget: int,
        sample_weight: Tensor | float,
    ) -> StepOutput:
        """Noise B clean latents (B, C, H, W), predict, and add the objective's loss.

        ``sample_weight`` is the weight of one image's loss in the result (see ``AlignmentBatch``).
        """
        denoising = self.denoising
        t = denoising.times(draws.uniforms)
        if labels is not None:
            labels = torch.where(draws.dropped, self.trunk.num_classes, labels)
        noised = denoising.noised(clean, draws.noise, t)
        batch = AlignmentBatch(
            targets=targets,
            time=denoising.unit_time(t),
            clean=clean,
            images=images,
            images_seen=images_seen,
            budget=budget,
            sample_weight=sample_weight,
            generator=draws.generator,
        )
        taps = self.objective.taps(batch)
        with torch.autocast(clean.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.trunk(noised, t, labels, taps).float()
            extra = self.objective.loss(lambda: denoising.predict_data(output, noised, t))
        losses = denoising.loss(output, clean, draws.noise, t)
        weight = sample_weight * len(clean)
        total = losses.mean() * weight
        if extra is not None:
            total = total + extra * weight
        return StepOutput(total, losses.detach(), None if extra is None else extra.detach(), batch.time)
