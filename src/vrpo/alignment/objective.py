"""What an alignment objective is: it sees the trunk's tokens and the encoder's, and adds its gradient to denoising.

The trainer calls, for every micro-batch: ``taps(batch)`` before the transformer runs, ``loss(...)`` after it, then one
``backward`` of the sum; and, after the optimiser's step, ``update()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vrpo.models.taps import NO_TAPS, Taps


@dataclass(frozen=True)
class AlignmentBatch:
    """What an objective may see of one micro-batch of B images.

    Attributes:
        targets: for each encoder, its tokens of the clean images, (B, N, C_e) float32, not normalised.
        time: (B,) in [0, 1], 0 = data, 1 = noise.
        clean: clean latents z0, (B, C, H, W).
        images: the clean images as uint8 (B, 3, h, w), or None where only latents are stored.
        images_seen: images the run has trained on before this step.
        budget: images the run will train on in all.
        sample_weight: the factor with which one image's denoising loss enters the scalar that is differentiated:
            1 / (images in the step on this process), times the loss scale if there is one. A gradient that arrives
            at a tap, divided by it, is that of the image's own loss, whatever the batch split and the loss scale.
        generator: source of the objective's own random numbers, a function of (seed, step).
        place: the first of these images in the step's batch over all processes, and that batch's size, where
            ``generator`` stands at the step's beginning; None where it goes on from micro-batch to micro-batch.
        watch: opens a section whose time is counted as the objective's; work in the backward pass goes into one.
    """

    targets: tuple[Tensor, ...]
    time: Tensor
    clean: Tensor
    images: Tensor | None
    images_seen: int
    budget: int
    sample_weight: Tensor | float
    generator: torch.Generator | None = None
    place: tuple[int, int] | None = None
    watch: Callable[[], AbstractContextManager[None]] = nullcontext


class Objective(nn.Module):
    """Base of all objectives, and the objective ``none``: plain denoising.

    Parameters of an objective (projectors, probes) are trained with the trunk; its buffers are saved with the run.
    """

    name = "none"
    depths: tuple[int, ...] = ()
    """Blocks, counted from 1, after which tokens are aligned."""

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the functions to call inside the transformer for this micro-batch."""
        return NO_TAPS

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return the scalar to add to the mean denoising loss of this micro-batch, or None.

        ``predict_clean()`` gives the one-step prediction of z0 from the network's output, (B, C, H, W),
        differentiable. Terms that act through a seam are not part of the returned value.
        """
        return None

    def measure(self, batch: AlignmentBatch, tokens: Mapping[int, Tensor]) -> Tensor | None:
        """Return the mean cosine on held-out images as a scalar, or None where nothing is aligned.

        ``tokens[d]`` are the trunk's tokens after each block ``d`` of ``depths``, (B, N, D). Trains nothing
        and leaves the logs alone.
        """
        return None

    def logs(self) -> dict[str, Tensor]:
        """Return detached values since the last call: scalars, or vectors by time bin. No host synchronisation."""
        return {}

    def update(self) -> None:
        """Advance running statistics and averaged copies, once after each optimiser step."""
