"""The held-out loss of a run and its alignment there; every draw comes from a generator of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vrpo.alignment.objective import AlignmentBatch, Objective, TargetBatch
from vrpo.config import RunConfig
from vrpo.data.manifest import Normaliser
from vrpo.data.shards import ShardedDataset
from vrpo.devices import DTYPES
from vrpo.diffusion.losses import Denoising
from vrpo.diffusion.state import State
from vrpo.models.taps import NO_TAPS, Taps
from vrpo.models.transformer import DiffusionTransformer
from vrpo.processes import ALONE, World
from vrpo.randomness import STREAM_VALIDATION, mix, step_generator
from vrpo.training.latents import CleanLatents
from vrpo.training.targets import Targets
from vrpo.training.telemetry import plain

VALIDATION_BATCH = 128


class Validation:
    """Denoising loss and alignment on held-out images at fixed noise and evenly spread times."""

    def __init__(
        self,
        config: RunConfig,
        dataset: ShardedDataset,
        normaliser: Normaliser | None,
        denoising: Denoising,
        targets: Targets,
        depths: tuple[int, ...],
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        """Measure on ``dataset``; its latents, if any, are scaled by the training data's ``normaliser``."""
        self.world = world
        self.config, self.dataset, self.denoising = config, dataset, denoising
        self.targets, self.depths, self.device = targets, depths, device
        self.rows = np.unique(
            np.linspace(0, len(dataset) - 1, min(config.train.validation_images, len(dataset))).astype(np.int64)
        )
        # Its noise is of another stream's seed than that of training, at every step.
        self._clean = CleanLatents(dataset.latents, normaliser, mix(config.seed, STREAM_VALIDATION) >> 1, device)
        self._dtype = DTYPES[config.train.precision]
        self._kept: dict[int, TargetBatch] = {}

    @torch.no_grad()
    def __call__(
        self,
        averaged: DiffusionTransformer,
        trunk: DiffusionTransformer,
        objective: Objective,
        go_on: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Return the held-out denoising loss of the averaged weights and the alignment of the trained ones.

        What is not finite is None. ``go_on`` is called after every batch, equally often by all processes.
        """
        starts = range(0, len(self.rows), VALIDATION_BATCH)
        found: dict[int, tuple[Tensor, float | None]] = {}
        for mine in self.world.divided(len(starts)):
            start = starts[mine]
            found[start] = self._measure(start, averaged, trunk, objective)
            go_on()
        # In the order of the batches, whoever measured them.
        everything = {start: values for part in self.world.gather(found) for start, values in part.items()}
        losses = torch.cat([everything[start][0] for start in starts])
        record: dict[str, Any] = {"denoising": plain(losses.mean()), "held_out_images": len(self.rows)}
        cosines = [(everything[start][1], len(everything[start][0])) for start in starts]
        if all(cosine is not None for cosine, _ in cosines):
            total = sum(cosine * count for cosine, count in cosines if cosine is not None)
            record["alignment"] = total / len(self.rows) if math.isfinite(total) else None
        return record

    def _measure(
        self, start: int, averaged: DiffusionTransformer, trunk: DiffusionTransformer, objective: Objective
    ) -> tuple[Tensor, float | None]:
        """Return the losses (B,) of the batch from row ``start`` on the CPU, and its mean cosine if there is one."""
        rows = self.rows[start : start + VALIDATION_BATCH]
        pixels, stored, labels = self._read(rows)
        given = labels.to(self.device) if labels is not None and averaged.num_classes else None
        clean = self._clean(pixels, stored, start, count=len(rows))
        generator = step_generator(self.config.seed, start, STREAM_VALIDATION, self.device)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        # Evenly spread over the whole set, the same at every visit.
        spread = (torch.arange(start, start + len(rows), device=self.device) + 0.5) / len(self.rows)
        times = self.denoising.times(spread)
        noised = self.denoising.noised(clean, noise, times)
        targets = TargetBatch() if pixels is None else self._held_out_targets(start, pixels)
        token = None
        if averaged.token_width:
            # Drawn last: images have the same noise with and without a token.
            token_noise = torch.randn(targets.class_tokens[0].shape, generator=generator, device=self.device)
            token = self.denoising.noised(targets.class_tokens[0], token_noise, times)
        state = State(noised, token)
        # The image's part alone, which compares with models that have no token.
        losses = self.denoising.loss(self._run(averaged, state, times, given), clean, noise, times)
        cosine = None
        if pixels is not None and self.targets.encoders:
            kept: dict[int, Tensor] = {}
            self._run(trunk, state, times, given, self._keep(kept))
            batch = AlignmentBatch(
                targets=targets.tokens,
                time=self.denoising.unit_time(times),
                clean=clean,
                images=pixels,
                images_seen=0,
                budget=1,
                sample_weight=1.0,
            )
            cosine = objective.measure(batch, kept)
        return losses.cpu(), None if cosine is None else float(cosine)

    def _read(self, rows: np.ndarray) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return pixels, stored latents and labels of held-out rows, each where it is needed and there."""
        if self.dataset.latents is None:
            pixels, labels = self.dataset.read(rows)
            return pixels.to(self.device), None, labels
        known = self.dataset.labels()
        labels_of = None if known is None else torch.from_numpy(known[rows])
        stored = self.dataset.read_latents(rows).to(self.device)
        images = self.dataset.read(rows)[0].to(self.device) if self.targets.encoders else None
        return images, stored, labels_of

    def _held_out_targets(self, start: int, pixels: Tensor) -> TargetBatch:
        """Return the encoders' tokens of one batch, computed at the first visit and kept as fp16 in main memory."""
        if start not in self._kept:
            self._kept[start] = self.targets.online(pixels).map(lambda tokens: tokens.half().cpu())
        return self._kept[start].map(lambda tokens: tokens.to(self.device).float())

    def _keep(self, kept: dict[int, Tensor]) -> Taps:
        def keeper(depth: int) -> Any:
            def keep(tokens: Tensor) -> Tensor:
                kept[depth] = tokens
                return tokens

            return keep

        return Taps(tokens={depth: keeper(depth) for depth in self.depths})

    def _run(
        self, network: DiffusionTransformer, x: State, t: Tensor, labels: Tensor | None, taps: Taps = NO_TAPS
    ) -> Tensor:
        """Return the network's output for the image."""
        training = network.training
        network.eval()
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            if x.token is None:
                output = network(x.image, t, labels, taps)
            else:
                output, _ = network(x.image, t, labels, taps, token=x.token)
        network.train(training)
        return output.float()
