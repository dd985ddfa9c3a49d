"""Noise for sampling that belongs to a sample, not to the batch in which it happens to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vrpo.randomness import STREAM_SAMPLE, mix


class NoiseSource(Protocol):
    """What a stochastic sampler draws its noise from."""

    @property
    def generators(self) -> list[torch.Generator]:
        """One CPU generator a sample, for schedulers that draw by themselves."""

    def step(self) -> Tensor:
        """Return the unit Gaussian noise of the next step, (B, C, H, W)."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the samples only."""


class SampleNoise:
    """Noise of the samples ``indices`` of run ``seed``, each a function of (seed, index) alone.

    Sample i is the same whatever the batch size, the other samples or the number of processes. Numbers come
    from the CPU so that they do not depend on the device either.

    With several ``candidates`` each sample has as many rows, one after the other; the first is the sample's own.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        candidates: int = 1,
    ) -> None:
        """Take the ``seed``, B sample ``indices``, and the ``shape`` (C, H, W) and ``device`` of a sample."""
        self._seed = seed
        self._shape = tuple(shape)
        self._device = torch.device(device)
        # Further words keep candidates and steps independent of the initial noise, in whatever order they are drawn.
        rows = [(int(index), candidate) for index in indices for candidate in range(candidates)]
        self._starts = [(index, 2 * candidate) if candidate else (index,) for index, candidate in rows]
        self._generators = [_generator(seed, index, 2 * candidate + 1) for index, candidate in rows]

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of the step noise, one a sample; drawing from them moves `step` on too."""
        return self._generators

    def initial(self) -> Tensor:
        """Return the noise from which sampling starts, (B, C, H, W) float32; the same at every call."""
        return self._draw([_generator(self._seed, *words) for words in self._starts])

    def step(self) -> Tensor:
        """Return the noise of the next step, (B, C, H, W) float32."""
        return self._draw(self._generators)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the rows only; `generators` is the same list, shortened."""
        self._starts = [self._starts[row] for row in rows]
        self._generators[:] = [self._generators[row] for row in rows]

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        # Pinned memory lets the copy, and the draw of the next step, run beside the network.
        pinned = self._device.type == "cuda"
        noise = torch.empty(len(generators), *self._shape, dtype=torch.float32, pin_memory=pinned)
        for row, generator in zip(noise, generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self._device, non_blocking=True)


def _generator(seed: int, index: int, *more: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(seed, STREAM_SAMPLE, index, *more) >> 1)
