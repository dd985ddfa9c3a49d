"""What an alignment objective is: it sees the trunk's tokens and the encoder's, and adds its gradient to denoising.

The trainer calls, for every micro-batch: ``taps(batch)`` before the transformer runs, ``loss(...)`` after it, then one
``backward`` of the sum; and, after the optimiser's step, ``update()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vrpo.alignment.projector import unit
from vrpo.models.taps import NO_TAPS, Taps

Rerun = Callable[[slice, Taps], Tensor]
"""Denoise some of a micro-batch's images again, with other taps and no gradient: their losses."""


class TargetBatch(NamedTuple):
    """What the frozen encoders say of B clean images, each part a tuple with one tensor an encoder.

    Attributes:
        tokens: patch tokens (B, N, C_e) float32, not normalised; their mean token subtracted where asked for.
        keys: the last attention layer's keys (B, N, C_k), standardised; empty unless the objective reads them.
        values: its values (B, N, C_v), likewise.
        class_tokens: class tokens (B, C_c), standardised; empty unless the objective reads them.

    Standardised: the mean over the data is subtracted from every channel and all are divided by one number, so that
    the mean square is 1, that of the noise with which a class token is mixed. One number, not one a channel, keeps
    the geometry of the encoder's space and amplifies no channel that hardly varies. An encoder without attention
    gives its patch tokens as keys and values, and their mean over the image as class token.
    """

    tokens: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    class_tokens: tuple[Tensor, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> TargetBatch:
        """Return the batch with ``function`` applied to every tensor."""
        return TargetBatch(*(tuple(function(tensor) for tensor in part) for part in self))


@dataclass(frozen=True)
class AlignmentBatch:
    """What an objective may see of one micro-batch of B images.

    Attributes:
        targets: for each encoder, its tokens of the clean images, (B, N, C_e) float32, not normalised.
        time: (B,) in [0, 1], 0 = data, 1 = noise.
        clean: clean latents z0, (B, C, H, W).
        images: the clean images as uint8 (B, 3, h, w), or None where latents are trained on and nothing asked for them.
        images_seen: images the run has trained on before this step.
        budget: images the run will train on in all.
        sample_weight: the factor with which one image's denoising loss enters the scalar that is differentiated:
            1 / (images in the step on this process), times the loss scale if there is one. A gradient that arrives
            at a tap, divided by it, is that of the image's own loss, whatever the batch split and the loss scale.
        generator: source of the objective's own random numbers, a function of (seed, step).
        place: the first of these images in the step's batch over all processes, and that batch's size, where
            ``generator`` stands at the step's beginning; None where it goes on from micro-batch to micro-batch.
        watch: opens a section whose time is counted as the objective's; work in the backward pass goes into one.
        noisings: how many rows in a row are noisings of one image.
        keys, values, class_tokens: for each encoder as in ``TargetBatch``; empty unless the objective reads them.
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
    noisings: int = 1
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    class_tokens: tuple[Tensor, ...] = ()


class Objective(nn.Module):
    """Base of all objectives, and the objective ``none``: plain denoising.

    Parameters of an objective (projectors, probes) are trained with the trunk; its buffers are saved with the run.
    """

    name = "none"
    depths: tuple[int, ...] = ()
    """Blocks, counted from 1, after which tokens are aligned."""
    reads_images = False
    """Whether it reads a batch's ``images``, which otherwise need not be there."""

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the functions to call inside the transformer for this micro-batch."""
        return NO_TAPS

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return the scalar to add to the mean denoising loss of this micro-batch, or None.

        ``predict_clean()`` gives the one-step prediction of z0 from the network's output, (B, C, H, W),
        differentiable. Terms that act through a seam are not part of the returned value.
        """
        return None

    def gate(self, time: Tensor) -> Tensor | None:
        """Return the weight omega (B,) of alignment at times (B,), from the steps before this one; None: all 1."""
        return None

    def token_loss(self, image_losses: Tensor, token_losses: Tensor) -> Tensor:
        """Return the scalar to add for the representation token, from each image's detached denoising loss and its
        token's (B,): by default the tokens' mean.
        """
        return token_losses.mean()

    def observe(self, losses: Tensor, rerun: Rerun) -> None:
        """See each image's denoising loss (B,), detached; ``rerun(rows, taps)`` gives those of the same images, times
        and noise under other taps. Comes after ``loss``.
        """

    def prepare_target(self, target: Tensor) -> Tensor:
        """Return an encoder's tokens (B, N, C) as the projected tokens are compared with: unit vectors, float32."""
        return unit(target)

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


class Wrapper(Objective):
    """An objective with something beside it; by itself, the objective inside."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.name, self.depths = objective.name, objective.depths
        self.reads_images = objective.reads_images

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the inner objective's taps."""
        return self.objective.taps(batch)

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return the inner objective's loss."""
        return self.objective.loss(predict_clean)

    def gate(self, time: Tensor) -> Tensor | None:
        """Return the inner objective's weight of alignment at each time."""
        return self.objective.gate(time)

    def token_loss(self, image_losses: Tensor, token_losses: Tensor) -> Tensor:
        """Return the inner objective's loss of the representation token."""
        return self.objective.token_loss(image_losses, token_losses)

    def observe(self, losses: Tensor, rerun: Rerun) -> None:
        """Let the inner objective see the images' losses."""
        self.objective.observe(losses, rerun)

    def prepare_target(self, target: Tensor) -> Tensor:
        """Return the inner objective's targets."""
        return self.objective.prepare_target(target)

    def measure(self, batch: AlignmentBatch, tokens: Mapping[int, Tensor]) -> Tensor | None:
        """Return the inner objective's mean cosine."""
        return self.objective.measure(batch, tokens)

    def logs(self) -> dict[str, Tensor]:
        """Return the inner objective's logs."""
        return self.objective.logs()

    def update(self) -> None:
        """Advance the inner objective's statistics."""
        self.objective.update()
