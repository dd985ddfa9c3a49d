"""The representation token: the encoder's class token, denoised with the image (REG, arXiv 2507.01467)."""

from __future__ import annotations

import torch
from torch import Tensor

from vrpo.alignment.advantage import combine, group_spread
from vrpo.alignment.gate import RunningMeans, binned, time_bins
from vrpo.alignment.objective import AlignmentBatch, Objective, Wrapper
from vrpo.config import TokenConfig
from vrpo.models.taps import Taps

TIME_BINS = 10


class WithToken(Wrapper):
    """An objective and, besides, ``weight`` times the velocity loss of the representation token.

    The token itself belongs to the transformer, which samples it with the image; here is what it costs. With a
    temperature ``tau`` the token is a policy: among the noisings of one image, those whose token noise came with a
    better denoised image count more, by ``exp(A / tau)``. One noising an image, or a large ``tau``, is REG.
    """

    def __init__(self, objective: Objective, config: TokenConfig) -> None:
        super().__init__(objective)
        self.config = config
        policy = [] if config.tau is None else ["spread", "evenness"]
        self.statistics = RunningMeans(["loss", *policy], TIME_BINS)
        self._time_bin: Tensor | None = None
        self._noisings = 1

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the inner objective's taps."""
        self._time_bin, self._noisings = time_bins(batch.time, TIME_BINS), batch.noisings
        return super().taps(batch)

    def token_loss(self, image_losses: Tensor, token_losses: Tensor) -> Tensor:
        """Return ``weight`` times the weighted mean of the tokens' velocity losses."""
        assert self._time_bin is not None
        seen = {"loss": token_losses.detach()}
        if self.config.tau is not None:
            spread = group_spread(_centred(image_losses, self._noisings))
            weights = self._weights(image_losses, self.config.tau)
            token_losses = token_losses * weights
            groups = weights.view(-1, self._noisings)
            evenness = 1 / groups.square().mean(1, keepdim=True)
            seen |= {
                name: value.expand(-1, self._noisings).reshape(-1)
                for name, value in (("spread", spread), ("evenness", evenness))
            }
        self.statistics.observe(seen, self._time_bin)
        return self.config.weight * token_losses.mean()

    def logs(self) -> dict[str, Tensor]:
        """Return the inner objective's logs and, by time bin, the token's loss; of the policy also the spread of the
        image's loss among its noisings, and how evenly they count (1: all alike, 1/M: one of M).
        """
        logs = super().logs()
        taken = self.statistics.take()
        return logs | {f"token_{name}": binned(*values) for name, values in taken.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Advance the statistics."""
        super().update()
        self.statistics.update()

    @torch.no_grad()
    def _weights(self, image_losses: Tensor, tau: float) -> Tensor:
        """Return the weight (B,) of each token's loss, with mean one over an image's noisings.

        The reward is the image's fidelity, minus its denoising loss; the advantage that of docs/method.md for one
        reward, whose size is the running mean of the spread by time bin.
        """
        assert self._time_bin is not None
        reward = -_centred(image_losses.float(), self._noisings)
        size = self.statistics.means("spread")
        inverse = torch.where(size > 0, 1 / size, 0.0)[self._time_bin].view(-1, self._noisings)
        advantage = combine([reward * inverse], [1.0], rule="sum", sigma0=self.config.sigma0, length=group_spread)
        weights = (advantage / tau).exp().clamp(max=self.config.clip)
        return (weights / weights.mean(1, keepdim=True)).view(-1)


def _centred(losses: Tensor, noisings: int) -> Tensor:
    """Return losses (B,) by image, less the mean over its noisings: (images, noisings)."""
    groups = losses.view(-1, noisings)
    return groups - groups.mean(1, keepdim=True)
