"""Class prototypes: what the encoders' pooled tokens of a class are on average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Images counted in a step: the means are exact enough after some thousand of a class, and cost nothing.
ROWS = 32
PREFIX = "prototypes."


class Prototypes:
    """The running mean, by class, of each encoder's prepared tokens pooled over an image.

    Attributes:
        means: for each encoder (K, C_e) float32; zero for a class not met yet.
        counts: images of each class in the means, (K,).
    """

    def __init__(self, num_classes: int, widths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, device=device)
        self.means = [torch.zeros(num_classes, width, device=device) for width in widths]

    @torch.no_grad()
    def add(self, targets: Sequence[Tensor], labels: Tensor, prepare: Callable[[Tensor], Tensor]) -> None:
        """Count in the first images of a batch: each encoder's tokens (B, N, C_e), labels (B,), never the null class.

        ``prepare`` is the objective's ``prepare_target``. An image whose tokens are not finite is left out. Nothing
        waits for the device.
        """
        labels = labels[:ROWS]
        # A product and not a scattered sum, whose order on a GPU is another one each time.
        classes = torch.arange(len(self.counts), device=labels.device)
        pooled = [prepare(tokens[:ROWS]).mean(1) for tokens in targets]
        usable = torch.stack([rows.isfinite().all(1) for rows in pooled]).all(0)
        members = ((classes[:, None] == labels) & usable).to(self.counts.dtype)
        seen = members.sum(1)
        self.counts += seen
        for mean, rows in zip(self.means, pooled, strict=True):
            finite = torch.where(usable[:, None], rows, 0)  # nothing times what is not finite is not nothing
            mean += (members @ finite - seen[:, None] * mean) / self.counts.clamp_min(1)[:, None]

    def state(self) -> dict[str, Tensor]:
        """Return tensors for a checkpoint; none where there are no classes or encoders."""
        if not len(self.counts) or not self.means:
            return {}
        parts = {f"{PREFIX}mean.{index}": mean for index, mean in enumerate(self.means)}
        return {**parts, f"{PREFIX}counts": self.counts}

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take what ``state`` returned out of ``tensors``, where it is there, and return the others."""
        for name, own in self.state().items():
            if name in tensors:
                own.copy_(tensors[name])
        return {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
