"""When steps are not finite: how many in a row, which term of the loss, at which step, on which samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrpo.checkpoints import find_checkpoints, step_of
from vrpo.data.loader import Loader
from vrpo.errors import CheckpointError
from vrpo.processes import World
from vrpo.training.rewind import read_rewinds
from vrpo.training.state import RunState
from vrpo.training.step import StepOutput

_NAMED = 3
# The terms of a step's loss: that of the images, and what an objective adds.
_TERMS = ("denoising loss", "alignment loss", "token loss")


@dataclass(frozen=True)
class Trouble:
    """One process's part of a span of non-finite steps.

    ``first`` is the first of them (counted from 0), ``terms`` names what was not finite, ``rows`` are places in this
    process's batch of the first step whose own loss was not finite; empty where none or all of them are, None where
    that step was before the run was resumed.
    """

    first: int
    terms: tuple[str, ...]
    rows: NDArray[np.int64] | None


class Watch:
    """What is not finite in the present span of such steps, kept on the device until it is asked for.

    Of a span, however long, its first step is kept and what any of its losses were. Nothing is known of steps before
    the run was resumed, where a span may have begun.
    """

    def __init__(self) -> None:
        self._images: list[Tensor] = []
        self._beside: dict[str, list[Tensor]] = {name: [] for name in _TERMS[1:]}
        self._first: Tensor | None = None
        self._bad: Tensor | None = None
        self._terms: Tensor | None = None

    def add(self, output: StepOutput) -> None:
        """Note one pass of a step; the host waits for nothing."""
        self._images.append(output.denoising.isfinite().logical_not())
        for found, extra in zip(self._beside.values(), (output.alignment_loss, output.token_loss), strict=True):
            if extra is not None:
                found.append(extra.isfinite().logical_not().any())

    def end(self, step: int, in_a_row: Tensor) -> None:
        """End a step (counted from 0), the last of ``in_a_row`` () that were not finite; the host waits for nothing."""
        bad = torch.cat(self._images)
        beside = [torch.stack(found).any() if found else bad.new_zeros(()) for found in self._beside.values()]
        terms = torch.stack([bad.any(), *beside])
        self._images = []
        for found in self._beside.values():
            found.clear()
        if self._first is None or self._bad is None or self._terms is None:
            self._first, self._bad, self._terms = in_a_row.new_full((), -1, dtype=torch.int64), bad, terms
        begins = in_a_row == 1
        self._first = torch.where(begins, step, self._first)
        self._bad = torch.where(begins, bad, self._bad)
        self._terms = terms | (self._terms & (in_a_row > 1))

    def diagnose(self, step: int, in_a_row: int) -> Trouble:
        """Return what was not finite in the ``in_a_row`` steps before ``step`` (counted from 0), of which the last has
        ended.
        """
        assert self._first is not None
        assert self._bad is not None
        assert self._terms is not None
        first = step - in_a_row
        found = zip(_TERMS, self._terms.tolist(), strict=True)
        terms = tuple(name for name, present in found if present)
        if int(self._first) != first:
            return Trouble(first, terms, None)
        rows = np.flatnonzero(self._bad.cpu().numpy())
        return Trouble(first, terms, rows if len(rows) < len(self._bad) else rows[:0])


class NonFiniteError(CheckpointError):
    """Training met too many non-finite steps in a row."""


def diagnosis(found: Trouble, in_a_row: int, run: Path, state: RunState, loader: Loader, world: World) -> str:
    """Return the sentence for ``in_a_row`` such steps at the end, from what every process found; all of them ask.

    It names the term, the samples, and the last checkpoint before.
    """
    train, counters, dataset = state.config.train, state.counters, state.parts.dataset
    alone, own = np.zeros((2, 0), dtype=np.int64)
    if found.rows is not None:
        own = loader.indices(found.first + counters.passed)
        alone = np.unique(own[found.rows // train.noisings])
    told = world.gather((found.terms, [dataset.key(row) for row in alone], [dataset.key(row) for row in own]))
    terms = {term for names, _, _ in told for term in names}
    bad = [key for _, keys, _ in told for key in keys]
    samples = "before the run was resumed (on which samples is not known)"
    if found.rows is not None:
        samples = _name_samples(bad or [key for _, _, keys in told for key in keys], bool(bad))
    good = next((path for path in find_checkpoints(run) if step_of(path) <= found.first), None)
    remedy = "start again with a lower train.lr or --train.precision fp32."
    rewinds, images = read_rewinds(run), found.first * train.batch_size
    if rewinds and rewinds[-1].images == images:
        # Other data met it at the same step; and the same request again would do nothing.
        remedy = f"a rewind to {images} images, past other data, did not help: {remedy}"
    elif good is not None:
        remedy = (
            f"the last good checkpoint is {good.name}; go back to it, past these data, with --resume --rewind "
            f"{images}, or {remedy}"
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
