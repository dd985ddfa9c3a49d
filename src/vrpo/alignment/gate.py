"""Running means by time bin, and the gate that turns alignment down where it disagrees with denoising."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A running mean remembers about 100 steps, as the old policy does.
DECAY = 0.99
# Below this weight a bin counts as never seen.
_UNSEEN = 1e-6

Observation = Tensor | tuple[Tensor, Tensor]


def gate_value(agreement: Tensor, scale: float, floor: float) -> Tensor:
    """Return ``omega = clip(1 + m/c0, floor, 1)`` for the running agreement ``m``."""
    return (1 + agreement / scale).clamp(floor, 1)


class RunningMeans(nn.Module):
    """Decayed means of named per-token values, by time bin.

    Values are summed over the micro-batches of a step and enter the means, over all processes, in
    ``update`` only: what a step uses is the state before it, and nothing depends on how the step was split.
    A mean is the ratio of the decayed sum of values to the decayed count, which needs no correction for
    starting from nothing.
    """

    total: Tensor
    count: Tensor

    def __init__(self, names: Iterable[str], bins: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.bins = bins
        self.register_buffer("total", torch.zeros(len(self.names), bins))
        self.register_buffer("count", torch.zeros(len(self.names), bins))
        # Sums of the present step, and since the last report: (2, names, bins). They are no buffers, because
        # DistributedDataParallel would overwrite each process's own with those of the first.
        self._step: Tensor | None = None
        self._report: Tensor | None = None

    def observe(self, values: Mapping[str, Observation], time_bin: Tensor) -> None:
        """Add values (B, N) or (B,), each alone or with a mask of those that count, at bins (B,).

        What is not finite never counts: one such number would stay in the decayed sums of all bins for good.
        """
        sums, counts = [], []
        zero = torch.zeros(len(time_bin), device=time_bin.device)
        for name in self.names:
            value = values.get(name)
            if value is None:
                sums.append(zero)
                counts.append(zero)
                continue
            numbers, mask = value if isinstance(value, tuple) else (value, None)
            numbers = numbers.float().reshape(len(time_bin), -1)
            counted = numbers.isfinite()
            if mask is not None:
                counted &= mask.reshape(len(time_bin), -1)
            sums.append(torch.where(counted, numbers, 0.0).sum(1))
            counts.append(counted.sum(1, dtype=torch.float32))
        rows = torch.stack(sums + counts)
        place = torch.zeros(len(time_bin), self.bins, device=rows.device)
        place.scatter_(1, time_bin.unsqueeze(1), 1.0)
        step = (rows @ place).view(2, len(self.names), self.bins)
        self._step = step if self._step is None else self._step + step

    def means(self, name: str) -> Tensor:
        """Return the running mean of ``name``, (bins,); an unseen bin has that of all bins, or zero."""
        row = self.names.index(name)
        total, count = self.total[row], self.count[row]
        overall = total.sum() / count.sum().clamp_min(_UNSEEN)
        return torch.where(count > _UNSEEN, total / count.clamp_min(_UNSEEN), overall)

    def update(self) -> Tensor:
        """Let the step's sums, over all processes, enter the means; return them, (2, names, bins)."""
        step, self._step = self._step, None
        if step is None:
            step = torch.zeros(2, *self.total.shape, device=self.total.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(step)
        self.total.mul_(DECAY).add_(step[0])
        self.count.mul_(DECAY).add_(step[1])
        self._report = step if self._report is None else self._report + step
        return step

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return, for each name, sums and counts by bin since the last call, each (bins,)."""
        report, self._report = self._report, None
        if report is None:
            return {}
        return {name: (report[0, row], report[1, row]) for row, name in enumerate(self.names)}


def time_bins(time: Tensor, bins: int) -> Tensor:
    """Return the bin (B,) of each time in [0, 1]."""
    return (time * bins).long().clamp(0, bins - 1)


def binned(sums: Tensor, counts: Tensor) -> Tensor:
    """Return means by bin, not a number where a bin is empty."""
    return sums / counts


def pooled(sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over all bins, a scalar."""
    return sums.sum() / counts.sum()
