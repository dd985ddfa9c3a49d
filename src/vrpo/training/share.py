"""What each process takes of a step: its part of the batch, and the passes that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from vrpo.errors import ConfigError
from vrpo.processes import ALONE, World


@dataclass(frozen=True)
class Share:
    """One process's part of every step: noised images ``start`` to ``stop`` of the batch, ``micro`` a pass."""

    start: int
    stop: int
    micro: int

    @property
    def size(self) -> int:
        """Noised images of a step on this process."""
        return self.stop - self.start

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step."""
        return self.size // self.micro


def share(batch_size: int, micro_batch: int, noisings: int, world: World = ALONE) -> Share:
    """Divide a step's ``batch_size`` noised images among the processes.

    Raises:
        ConfigError: it does not divide into whole groups of noisings.
    """
    group = noisings * world.size
    if batch_size % group:
        nearest = max(1, round(batch_size / group)) * group
        if world.size == 1:
            raise ConfigError(
                f"train.batch_size {batch_size} is not a multiple of train.noisings {noisings}: use {nearest}."
            )
        groups = "" if noisings == 1 else f" in whole groups of train.noisings {noisings}"
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide among {world.size} processes{groups}: use {nearest}."
        )
    size = batch_size // world.size
    micro = min(micro_batch or size, size)
    if size % micro or micro % noisings:
        divisors = [n for n in range(noisings, size + 1, noisings) if size % n == 0]
        closest = min(divisors, key=lambda n: abs(n - micro))
        whole = f"train.batch_size {size}" if world.size == 1 else f"the {size} images a step of each process"
        raise ConfigError(
            f"train.micro_batch {micro} does not divide {whole} into whole groups of noisings: use {closest}."
        )
    return Share(world.rank * size, (world.rank + 1) * size, micro)


def describe_share(part: Share, world: World) -> str:
    """Return the sentence that says how a step is divided, among processes and into passes."""
    passes = "in one pass" if part.passes == 1 else f"in {part.passes} passes of {part.micro}"
    whole = part.size * world.size
    if world.size == 1:
        return f"A step's {whole} images are taken {passes}."
    return f"A step's {whole} images are divided among {world.size} processes: {part.size} each, {passes}."
