"""Progress on a terminal, with an estimate; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vrpo.untrusted import printable
from vrpo.wording import clock

if TYPE_CHECKING:
    from vrpo.training.trainer import Report

PLAIN_SECONDS = 10.0


class TrainingDisplay:
    """A line that says where training is: images, losses, speed, time left."""

    def __init__(self, label: str = "", shown: bool = True) -> None:
        self.label = label
        self._live: Any = None
        self._task: Any = None
        self._last = 0.0
        self._begun: tuple[str, int, float] | None = None
        self._terminal = shown and sys.stderr.isatty()

    def __enter__(self) -> TrainingDisplay:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print one sentence above the line."""
        sentence = printable(sentence)
        if self._live is not None:
            self._live.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def report(self, report: Report) -> None:
        """Show a telemetry record."""
        record = report.record
        loss = record.get("denoising")
        detail = f"{report.images:,} of {report.budget:,} images  loss " + ("-" if loss is None else f"{loss:.4f}")
        if record.get("alignment") is not None:
            detail += f"  alignment {record['alignment']:.3f}"
        speed = record["images_per_second"]
        detail += f"  {speed:,.0f} images/s"
        if record.get("skipped"):
            detail += f"  {record['skipped']} steps skipped (not finite)"
        self._show(self.label or "training", report.images, report.budget, detail, speed)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far something is; after its first call also how long the rest takes at the same speed."""
        now = time.monotonic()
        if self._begun is None or self._begun[0] != what:
            self._begun = (what, done, now)
        _, first, began = self._begun
        self._show(what, done, total, f"{done:,} of {total:,}", (done - first) / max(now - began, 1e-9))

    def _show(self, what: str, done: int, total: int, detail: str, speed: float) -> None:
        what = printable(what)
        if self._live is not None:
            if self._task is None:
                self._task = self._live.add_task(what, total=total, detail=detail)
            self._live.update(self._task, description=what, completed=min(done, total), total=total, detail=detail)
            return
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and done < total:
            return
        self._last = now
        left = f"  {clock((total - done) / speed)} left" if speed and done < total else ""
        print(f"{what}: {detail}{left}", file=sys.stderr, flush=True)
