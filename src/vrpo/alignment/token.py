"""The representation token: the encoder's class token, denoised with the image (REG, arXiv 2507.01467)."""

from __future__ import annotations

import torch
from torch import Tensor

from vrpo.alignment.gate import RunningMeans, binned, time_bins
from vrpo.alignment.objective import AlignmentBatch, Objective, Wrapper
from vrpo.config import TokenConfig
from vrpo.models.taps import Taps

TIME_BINS = 10


class WithToken(Wrapper):
    """An objective and, besides, ``weight`` times the velocity loss of the representation token.

    The token itself belongs to the transformer, which samples it with the image; here is what it costs.
    """

    def __init__(self, objective: Objective, config: TokenConfig) -> None:
        super().__init__(objective)
        self.config = config
        self.statistics = RunningMeans(["loss"], TIME_BINS)
        self._time_bin: Tensor | None = None

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the inner objective's taps."""
        self._time_bin = time_bins(batch.time, TIME_BINS)
        return super().taps(batch)

    def token_loss(self, image_losses: Tensor, token_losses: Tensor) -> Tensor:
        """Return ``weight`` times the mean velocity loss of the tokens."""
        assert self._time_bin is not None
        self.statistics.observe({"loss": token_losses.detach()}, self._time_bin)
        return self.config.weight * token_losses.mean()

    def logs(self) -> dict[str, Tensor]:
        """Return the inner objective's logs and the token's loss by time bin."""
        logs = super().logs()
        taken = self.statistics.take()
        if taken:
            logs["token_loss"] = binned(*taken["loss"])
        return logs

    @torch.no_grad()
    def update(self) -> None:
        """Advance the statistics."""
        super().update()
        self.statistics.update()
