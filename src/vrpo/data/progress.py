"""How far a preparation is: a bar, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""Told of images done and images in all."""


@dataclass(frozen=True)
class Reporting:
    """Where progress is told: to a function, on a bar, or nowhere; the bar is drawn on ``console``."""

    progress: bool | Progress
    console: Console | None

    @contextmanager
    def begin(self, name: str, total: int, done: int) -> Iterator[Progress]:
        """Give the function to call while ``total`` images of the source ``name`` are prepared."""
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
        with Bar(*columns, console=self.console, disable=not self.progress) as bar:
            task = bar.add_task(f"preparing {name}", total=total, completed=done)
            yield lambda finished, _: bar.update(task, completed=finished)
