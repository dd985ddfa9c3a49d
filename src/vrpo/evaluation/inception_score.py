"""Inception Score: how sure a classifier is of each image, and how even it is over all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vrpo.errors import EvaluationError

CHUNK = 5_000


class InceptionScore:
    """IS of a stream of class logits, over contiguous chunks of 5,000 samples in their order, as in ADM's evaluator.

    The score of a chunk is exp of the mean over its samples of KL(p(y|x) || p(y)), p(y) being the chunk's mean
    (Salimans et al. 2016, eq. in sec. 4), and the score of the set the mean over its chunks; the last may be
    shorter. Sums are in float64, so they merge over batches and processes.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        # For each chunk: samples, the sum of p (C,), and the sum of p log p.
        self._sums: dict[int, tuple[int, Tensor, float]] = {}

    def update(self, logits: Tensor, start: int) -> None:
        """Add logits (B, C) of the samples ``start``, ``start`` + 1, ...; raises EvaluationError on NaN."""
        if not torch.isfinite(logits).all():
            raise EvaluationError("Logits contain NaN or infinite values; check the feature network's weights.")
        done = 0
        while done < len(logits):
            number, offset = divmod(start + done, self.chunk)
            part = logits[done : done + self.chunk - offset].double()
            log_p = part.log_softmax(dim=1)
            p = log_p.exp()
            self._add(number, len(part), p.sum(dim=0), float((p * log_p).sum()))
            done += len(part)

    def merge(self, other: InceptionScore) -> None:
        """Add all that ``other`` has seen, such as another process's samples."""
        if other.chunk != self.chunk:
            raise EvaluationError(
                f"Scores over chunks of {self.chunk} and {other.chunk} cannot be merged; use one size."
            )
        for number, sums in other._sums.items():
            self._add(number, *sums)

    def _add(self, number: int, count: int, p: Tensor, entropy: float) -> None:
        if number in self._sums:
            before = self._sums[number]
            count, p, entropy = before[0] + count, before[1] + p, before[2] + entropy
        self._sums[number] = (count, p, entropy)

    @property
    def scores(self) -> list[float]:
        """The score of each chunk, in order."""
        scores = []
        for _, (count, total, entropy) in sorted(self._sums.items()):
            q = total / count
            scores.append(float(np.exp(entropy / count - float(torch.special.xlogy(q, q).sum()))))
        return scores

    @property
    def mean(self) -> float:
        """The score; raises EvaluationError before any sample."""
        if not self._sums:
            raise EvaluationError("The Inception Score needs samples and there are none; sample some.")
        return float(np.mean(self.scores))

    @property
    def std(self) -> float:
        """Standard deviation between chunks."""
        return float(np.std(self.scores))
