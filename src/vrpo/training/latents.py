"""What the diffusion is trained on: pixels in [-1, 1], or normalised samples of stored posteriors."""

from __future__ import annotations

import torch
from torch import Tensor

from vrpo.data.manifest import LatentRecord, Normaliser
from vrpo.pixels import to_float
from vrpo.randomness import STREAM_LATENTS, step_generator


class CleanLatents:
    """From the stored rows of a batch to its clean latents z0.

    The normaliser is that of the data the trunk is trained on, whatever data the rows are from; None for pixels.
    """

    def __init__(
        self, record: LatentRecord | None, normaliser: Normaliser | None, seed: int, device: torch.device
    ) -> None:
        self.record, self.seed, self.device = record, seed, device
        if normaliser is not None:
            self._shift, self._scale = (
                torch.tensor(values, device=device)[:, None, None] for values in (normaliser.shift, normaliser.scale)
            )

    def __call__(
        self, pixels: Tensor | None, stored: Tensor | None, step: int, *, count: int, start: int = 0
    ) -> Tensor:
        """Return z0 float32 (B, C, h, w) of uint8 pixels (B, 3, H, W) or stored latents (B, C or 2C, h, w).

        The posterior's noise is a function of (seed, ``step``): it is drawn for all ``count`` images of the step, of
        which these are those from ``start`` on.
        """
        if self.record is None:
            assert pixels is not None  # such a data set holds nothing else
            return to_float(pixels)
        assert stored is not None
        latents = stored.float()
        if self.record.posterior:
            mean, deviation = latents.chunk(2, dim=1)
            generator = step_generator(self.seed, step, STREAM_LATENTS, self.device)
            noise = torch.randn(count, *mean.shape[1:], generator=generator, device=self.device)
            latents = mean + deviation * noise[start : start + len(mean)]
        return (latents - self._shift) * self._scale
