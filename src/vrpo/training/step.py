"""One denoising step: noised images, the trunk with the objective's taps in it, and the sum of the losses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch, Objective, TargetBatch
from vrpo.config import Pairing
from vrpo.diffusion.losses import Denoising, stratify
from vrpo.diffusion.state import State
from vrpo.models.taps import Taps
from vrpo.models.transformer import DiffusionTransformer
from vrpo.randomness import STREAM_NOISE, STREAM_OBJECTIVE, step_generator
from vrpo.training.telemetry import Stopwatch


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step's B noised images: a function of (seed, step).

    They are those of images ``first`` onwards of the step's ``total``, over all passes and processes.
    """

    uniforms: Tensor
    noise: Tensor
    dropped: Tensor
    seed: int
    step: int
    first: int
    total: int
    noisings: int = 1
    token_noise: Tensor | None = None

    @property
    def generator(self) -> torch.Generator:
        """A source of the objective's own draws for the whole step, at its beginning."""
        return step_generator(self.seed, self.step, STREAM_OBJECTIVE, self.noise.device)

    def part(self, start: int, stop: int) -> Draws:
        """Return the draws of images ``start`` to ``stop``."""
        where = slice(start, stop)
        token_noise = None if self.token_noise is None else self.token_noise[where]
        return replace(
            self,
            uniforms=self.uniforms[where],
            noise=self.noise[where],
            dropped=self.dropped[where],
            first=self.first + start,
            token_noise=token_noise,
        )


def draw_step(
    seed: int,
    step: int,
    *,
    count: int,
    shape: tuple[int, int, int],
    noisings: int,
    label_dropout: float,
    device: torch.device,
    token_width: int = 0,
    pairing: Pairing = "none",
) -> Draws:
    """Draw times, noise and label drops for ``count`` noised images of ``shape`` (C, H, W), and noise for tokens.

    The whole step is drawn at once whatever its split into micro-batches. Times are stratified over each image's
    noisings; so is a plain step's single time over nothing, which is the uniform draw itself. Under ``pairing``
    "time" an image's noisings share time and label drop instead, and under "noise" the image's noise too.
    """
    generator = step_generator(seed, step, STREAM_NOISE, device)
    uniforms = torch.rand(count, generator=generator, device=device)
    noise = torch.randn(count, *shape, generator=generator, device=device)
    dropped = torch.rand(count, generator=generator, device=device) < label_dropout
    if pairing == "none":
        uniforms = stratify(uniforms, noisings)
    else:
        uniforms, dropped = _shared(uniforms, noisings), _shared(dropped, noisings)
        noise = _shared(noise, noisings) if pairing == "noise" else noise
    # Drawn last: images have the same noise with and without a token.
    token_noise = torch.randn(count, token_width, generator=generator, device=device) if token_width else None
    return Draws(
        uniforms,
        noise,
        dropped,
        seed,
        step,
        first=0,
        total=count,
        noisings=noisings,
        token_noise=token_noise,
    )


@dataclass(frozen=True)
class StepOutput:
    """What a micro-batch gives: the scalar to differentiate, and per-image losses for the log."""

    loss: Tensor
    denoising: Tensor
    alignment_loss: Tensor | None
    unit_time: Tensor
    token_loss: Tensor | None = None


class DenoisingStep(nn.Module):
    """Trunk, objective and denoising loss of one micro-batch."""

    def __init__(
        self, trunk: DiffusionTransformer, objective: Objective, denoising: Denoising, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.trunk = trunk
        # What is called: the trunk, or what wraps it.
        self.run_trunk: nn.Module = trunk
        self.objective = objective
        self.denoising = denoising
        self.dtype = dtype
        self.stopwatch: Stopwatch | None = None

    def forward(
        self,
        clean: Tensor,
        labels: Tensor | None,
        draws: Draws,
        targets: TargetBatch,
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
            targets=targets.tokens,
            time=denoising.unit_time(t),
            clean=clean,
            images=images,
            images_seen=images_seen,
            budget=budget,
            sample_weight=sample_weight,
            generator=draws.generator,
            place=(draws.first, draws.total),
            watch=self._watch,
            noisings=draws.noisings,
            keys=targets.keys,
            values=targets.values,
            class_tokens=targets.class_tokens,
        )
        token, token_noise = None, draws.token_noise
        if token_noise is not None:
            token = denoising.noised(targets.class_tokens[0], token_noise, t)
        state = State(noised, token)

        def rerun(rows: slice, taps: Taps) -> Tensor:
            with torch.no_grad():
                some = State(noised[rows], None if token is None else token[rows])
                again = self._run(self.trunk, some, t[rows], None if labels is None else labels[rows], taps)
                return denoising.loss(again.image, clean[rows], draws.noise[rows], t[rows])

        with self._watch():
            taps = self._timed(self.objective.taps(batch))
        with torch.autocast(clean.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self._run(self.run_trunk, state, t, labels, taps)
            with self._watch():
                extra = self.objective.loss(lambda: denoising.predict_data(output.image, noised, t))
        losses = denoising.loss(output.image, clean, draws.noise, t)
        seen = losses.detach()
        weight = sample_weight * len(clean)
        total = losses.mean() * weight
        if extra is not None:
            total = total + extra * weight
        token_loss = None
        if token_noise is not None and output.token is not None:
            velocity = denoising.loss(output.token, targets.class_tokens[0], token_noise, t)
            with self._watch():
                token_loss = self.objective.token_loss(seen, velocity)
            total = total + token_loss * weight
        with self._watch():
            self.objective.observe(seen, rerun)
        # A loss that is not finite makes every gradient so, in all processes: the step is skipped by all of them.
        total = total * (1 + 0 * total.detach())
        return StepOutput(total, seen, _detached(extra), batch.time, _detached(token_loss))

    def _run(self, trunk: nn.Module, state: State, t: Tensor, labels: Tensor | None, taps: Taps) -> State:
        """Return what the trunk, or what wraps it, says of a noised state, float32."""
        with torch.autocast(t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if state.token is None:
                return State(trunk(state.image, t, labels, taps).float())
            image, token = trunk(state.image, t, labels, taps, token=state.token)
        return State(image.float(), token.float())

    def _watch(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stopwatch is None else self.stopwatch.section()

    def _timed(self, taps: Taps) -> Taps:
        """Return taps whose forward work is counted as the objective's."""

        def timed(tap: Callable[..., Any]) -> Callable[..., Any]:
            def call(*tensors: Tensor) -> Any:
                with self._watch():
                    return tap(*tensors)

            return call

        return Taps(
            tokens={depth: timed(tap) for depth, tap in taps.tokens.items()},
            attention={depth: timed(tap) for depth, tap in taps.attention.items()},
        )


def _shared(draws: Tensor, noisings: int) -> Tensor:
    """Return every image's first draw for all of its noisings."""
    return draws[::noisings].repeat_interleave(noisings, dim=0)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
