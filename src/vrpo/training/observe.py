"""What a run measures and draws of itself beside training, every so many images.

None of it touches the training random state: every draw comes from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo.decoding import decoder_of_state, latent_state
from vrpo.errors import ConfigError
from vrpo.files import replacing
from vrpo.models.transformer import DiffusionTransformer
from vrpo.processes import ALONE, World
from vrpo.sampling import ImageSampler, grid_image
from vrpo.training.setup import Parts
from vrpo.training.telemetry import Journal
from vrpo.training.validation import Validation
from vrpo.vision.autoencoders import Decoder, Pixels

Work = Callable[[], dict[str, Any]]


class BrokenOffError(Exception):
    """A run is asked to stop while it measures or draws; the processes break off at the same batch."""


class Observer:
    """Held-out losses, sample grids and small evaluations of a run's averaged weights.

    ``go_on`` is called after every batch, equally often by all processes, and may raise ``BrokenOffError``.
    """

    def __init__(self, parts: Parts, averaged: DiffusionTransformer, run: Path, world: World) -> None:
        """Load what the configuration asks for.

        Raises:
            ConfigError, DataError: it cannot be measured.
        """
        config, device = parts.config, parts.device
        self._parts, self._averaged, self._run, self._world = parts, averaged, run, world
        self.go_on: Callable[[], None] = _go_on
        self._sampler = ImageSampler(averaged, config, device=device, decoder=_decoder(parts))
        self._validation: Validation | None = None
        if parts.held_out is not None:
            depths = getattr(parts.objective, "depths", ())
            normaliser = parts.dataset.manifest.normaliser
            self._validation = Validation(
                config, parts.held_out, normaliser, parts.denoising, parts.targets, depths, device, world
            )
        with world.agreed():
            self.scorer: Work | None = self._build_scorer()

    def due(
        self, journal: Journal, images: int, passed: Callable[[int], bool], first: bool
    ) -> Iterator[tuple[str, Work]]:
        """Give the name and the work of what is due at ``images`` images and not in the journal yet.

        ``passed(every)`` says whether a multiple of ``every`` images was passed; ``first``: nothing is trained yet.
        """
        train = self._parts.config.train

        def is_due(kind: str, every: int) -> bool:
            return bool(every) and passed(every) and not journal.has(kind, images)

        if self._validation is not None and is_due("validation", train.validate_every):
            yield "validation", self._validate
        if is_due("samples", train.sample_every):
            yield "samples", lambda: self._save_grid(images)
        # An untrained network's samples are not worth scoring.
        if self.scorer is not None and not first and is_due("evaluation", train.evaluate_every):
            yield "evaluation", self.scorer

    def _validate(self) -> dict[str, Any]:
        assert self._validation is not None
        return self._validation(self._averaged, self._parts.trunk, self._parts.objective, self.go_on)

    def _save_grid(self, images: int) -> dict[str, Any]:
        folder = self._run / "samples"
        return save_grid(self._sampler, folder, images, self._parts.num_classes, self._world, self.go_on)

    def _build_scorer(self) -> Work | None:
        parts, config = self._parts, self._parts.config
        if config.evaluate.features is None or not config.train.evaluate_every:
            return None
        from vrpo.training.score import Scorer

        reference = parts.dataset
        if config.evaluate.reference == "validation":
            if parts.held_out is None:
                raise ConfigError("evaluate.reference is validation, but data.validation is not set: give that folder.")
            reference = parts.held_out
        scorer = Scorer(config, self._sampler, reference, parts.num_classes, parts.device, self._world)
        return lambda: scorer(self.go_on)


def _go_on() -> None:
    """Let everything be measured to its end."""


def _decoder(parts: Parts) -> Decoder:
    """Load the autoencoder where the run draws samples."""
    train, sample = parts.config.train, parts.config.sample
    if not (train.sample_every or (train.evaluate_every and parts.config.evaluate.features is not None)):
        return Pixels()
    state = latent_state(parts.dataset.manifest)
    return decoder_of_state(state, named=sample.decoder, any_decoder=sample.any_decoder, device=parts.device)


def draw_together(
    sampler: ImageSampler,
    indices: Sequence[int],
    labels: Tensor | None,
    seed: int,
    world: World,
    go_on: Callable[[], None] = _go_on,
) -> Tensor:
    """Return what ``sampler.images`` returns, drawn batch by batch by all processes."""
    if world.size == 1:
        return torch.cat(list(sampler.batches(indices, labels, seed, lambda done: go_on())))
    size = sampler.compute_batch
    starts = range(0, len(indices), size)
    drawn: dict[int, Tensor] = {}
    for mine in world.divided(len(starts)):
        part = slice(starts[mine], starts[mine] + size)
        drawn[part.start] = sampler.images(indices[part], None if labels is None else labels[part], seed)
        go_on()
    everything = {start: images for part in world.gather(drawn) for start, images in part.items()}
    return torch.cat([everything[start] for start in starts])


def save_grid(
    sampler: ImageSampler,
    folder: Path,
    images_seen: int,
    num_classes: int,
    world: World = ALONE,
    go_on: Callable[[], None] = _go_on,
) -> dict[str, Any]:
    """Draw a grid from the same noise and labels at every visit, save it as PNG, and return its record."""
    from PIL import Image

    settings = sampler.config.sample
    indices = range(settings.rows * settings.columns)
    # One class a column, as far as they go.
    labels = None
    if num_classes:
        labels = torch.tensor([(index % settings.columns) % num_classes for index in indices])
    pixels = draw_together(sampler, indices, labels, sampler.config.seed, world, go_on)
    file = folder / f"{images_seen:012d}.png"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            Image.fromarray(grid_image(pixels, settings.columns)).save(unfinished, format="PNG")

    world.ask_first(write)
    return {
        "file": f"{folder.name}/{file.name}",
        "rows": settings.rows,
        "columns": settings.columns,
        "labels": [] if labels is None else labels.tolist(),
    }
