"""How far a preparation is: a bar, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vrpo.processes import World

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""Told of images done and images in all."""


@dataclass(frozen=True)
class Reporting:
    """Where progress is told: to a function, on a bar, or nowhere; the first process draws the bar on ``console``."""

    progress: bool | Progress
    console: Console | None

    @contextmanager
    def begin(self, name: str, total: int, done: int, world: World) -> Iterator[Progress]:
        """Give the function to call while this process prepares ``total`` images of the source ``name``."""
        if callable(self.progress):
            yield self.progress
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        share = "" if world.size == 1 else f", process 1 of {world.size}"
        with Bar(*columns, console=self.console, disable=not self.progress or not world.first) as bar:
            task = bar.add_task(f"preparing {name}{share}", total=total, completed=done)
            yield lambda finished, _: bar.update(task, completed=finished)
