"""When steps are not finite: how many in a row, which term of the loss, at which step, on which samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrpo.data.loader import Loader
from vrpo.errors import CheckpointError
from vrpo.training.checkpoint import find_checkpoints, step_of
from vrpo.training.distributed import World
from vrpo.training.state import RunState
from vrpo.training.step import StepOutput

_NAMED = 3


class _Pass(NamedTuple):
    """One pass: where each image's denoising loss is not finite, and whether the objective's is not."""

    images: Tensor
    objective: Tensor


@dataclass(frozen=True)
class Trouble:
    """One process's part of a span of non-finite steps.

    ``first`` is the first of them (counted from 0), ``terms`` names what was not finite, ``rows`` are places in this
    process's batch of the first step whose own loss was not finite; empty where none or all of them are.
    """

    first: int
    terms: tuple[str, ...]
    rows: NDArray[np.int64]


class Watch:
    """The finiteness of the last ``steps`` steps' losses, kept on the device until it is asked for."""

    def __init__(self, steps: int) -> None:
        self._steps: deque[tuple[int, list[_Pass]]] = deque(maxlen=steps)

    def begin(self, step: int) -> None:
        """Start a step (counted from 0)."""
        self._steps.append((step, []))

    def add(self, output: StepOutput) -> None:
        """Note one pass of the step; the host waits for nothing."""
        images = output.denoising.isfinite().logical_not()
        objective = images.new_zeros(())
        for extra in (output.alignment_loss, output.token_loss):
            if extra is not None:
                objective = objective | extra.isfinite().all().logical_not()
        self._steps[-1][1].append(_Pass(images, objective))

    def diagnose(self, in_a_row: int) -> Trouble:
        """Return what was not finite in the last ``in_a_row`` steps, as far back as is known."""
        span = list(self._steps)[-in_a_row:]
        first, passes = span[0]
        bad = torch.cat([part.images for part in passes]).cpu().numpy()
        terms = []
        if any(bool(part.images.any()) for _, parts in span for part in parts):
            terms.append("denoising loss")
        if any(bool(part.objective) for _, parts in span for part in parts):
            terms.append("objective's loss")
        rows = np.flatnonzero(bad)
        return Trouble(first, tuple(terms), rows if len(rows) < len(bad) else rows[:0])


class NonFiniteError(CheckpointError):
    """Training met too many non-finite steps in a row."""


def diagnosis(found: Trouble, in_a_row: int, run: Path, state: RunState, loader: Loader, world: World) -> str:
    """Return the sentence for ``in_a_row`` such steps at the end, from what every process found; all of them ask.

    It names the term, the samples, and the last checkpoint before.
    """
    train, counters, dataset = state.config.train, state.counters, state.parts.dataset
    own = loader.indices(found.first + counters.passed)
    alone = np.unique(own[found.rows // train.noisings])
    told = world.gather((found.terms, [dataset.key(row) for row in alone], [dataset.key(row) for row in own]))
    terms = {term for names, _, _ in told for term in names}
    bad = [key for _, keys, _ in told for key in keys]
    samples = _name_samples(bad or [key for _, _, keys in told for key in keys], bool(bad))
    good = next((path for path in find_checkpoints(run) if step_of(path) <= found.first), None)
    remedy = "start again with a lower train.lr or --train.precision fp32."
    if good is not None:
        remedy = (
            f"the last good checkpoint is {good.name}; go back to it, past these data, with --resume --rewind "
            f"{found.first * train.batch_size}, or {remedy}"
        )
    return (
        f"training stopped at step {counters.step}: the {_name_terms(terms)} was not finite in the last {in_a_row} "
        f"steps, first in step {found.first + 1} {samples}; {remedy}"
    )


def _name_terms(terms: set[str]) -> str:
    """Return the words for what was not finite; where every loss was, it was the gradient."""
    return " and the ".join(sorted(terms)) if terms else "gradient (every loss was finite)"


def _name_samples(keys: list[str], alone: bool) -> str:
    """Return the words for the samples: those whose own loss was not finite, or the batch they came in."""
    more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
    named = ", ".join(f"'{key}'" for key in keys[:_NAMED]) + more
    return f"on {named}" if alone else f"on the batch of {named}"
