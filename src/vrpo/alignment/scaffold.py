"""The scaffold: a block attends to the encoder's keys and values until it can do without (docs/method.md).

Under a clock that is REPI ("Scaffold then Internalize", 2026); by advantage, VRPO decides it by time bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo.alignment.gate import RunningMeans, binned, time_bins
from vrpo.alignment.objective import AlignmentBatch, Objective, Rerun, Wrapper
from vrpo.config import ScaffoldConfig
from vrpo.models.taps import AttentionTap, Taps
from vrpo.randomness import mix

# How often, as a share of the budget, the advantage's growth is looked at, and the trials that a time bin needs for it.
CHECK_SHARE = 0.01
CHECK_TRIALS = 32
# The weight of a look in the smoothed advantage: one look's noise is as large as several looks' growth.
SMOOTHING = 0.3


@dataclass(frozen=True)
class _Step:
    """A micro-batch between ``taps`` and ``observe``: whose turn each image is, and what internalising costs it.

    ``own`` (B,) is 1 where the block uses its own keys and values, ``pulled`` (B,) where these are pulled to the
    encoder's; ``mixed`` tells whether both kinds of suppliers occur.
    """

    batch: AlignmentBatch
    time_bin: Tensor
    own: Tensor
    pulled: Tensor
    any_own: bool
    mixed: bool
    gaps: list[Tensor]


class WithScaffold(Wrapper):
    """An objective and, inside one block, keys and values supplied by linear projections of the encoder's.

    The supplier of an image's keys and values is chosen by its time bin: at first the encoder everywhere, in the end
    the block itself everywhere. Where the block supplies, or from the beginning if ``internalise`` is ``always``,
    ``weight omega(t) (mean|K - sg K_e|^2 + mean|V - sg V_e|^2)`` pulls its own to the encoder's, with omega the inner
    objective's gate. The projections belong to the objective: the transformer stays a plain one.

    Under supply ``clock`` all bins change hands at once. Under ``advantage``, on every ``1 / fraction``-th image of a
    step the other supplier is tried too, on the same noise and time and without gradient; ``A = L_own - L_encoder`` is
    the encoder's advantage, smoothed over looks. A bin changes hands, for good, when in ``patience`` looks in a row its
    advantage has not grown by the share ``growth`` beyond what it was when it last grew, not before the share
    ``earliest`` of the budget and not after ``latest``.
    """

    own: Tensor
    steps: Tensor
    smooth: Tensor
    best: Tensor
    growth: Tensor
    stalled: Tensor
    trials: Tensor
    handed_at: Tensor
    ruled: Tensor

    def __init__(
        self,
        objective: Objective,
        config: ScaffoldConfig,
        *,
        by_advantage: bool,
        depth: int,
        hidden_size: int,
        num_heads: int,
        key_width: int,
        value_width: int,
    ) -> None:
        """Take the block ``depth``, counted from 1, and the channels of the encoder's keys and values."""
        super().__init__(objective)
        self.config, self.by_advantage, self.depth, self.num_heads = config, by_advantage, depth, num_heads
        self.key_projection = nn.Linear(key_width, hidden_size)
        self.value_projection = nn.Linear(value_width, hidden_size)
        for projection in (self.key_projection, self.value_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        bins = config.time_bins
        self.statistics = RunningMeans(["advantage", "gap"], bins)
        self.register_buffer("own", torch.zeros(bins))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("smooth", torch.full((bins,), torch.nan))
        self.register_buffer("best", torch.zeros(bins))
        self.register_buffer("growth", torch.zeros(bins))
        self.register_buffer("stalled", torch.zeros(bins))
        self.register_buffer("trials", torch.zeros(2, bins))
        self.register_buffer("handed_at", torch.full((bins,), torch.nan))
        self.register_buffer("ruled", torch.zeros(bins))
        # The host's copy of the buffers ``own`` and ``steps``; None: to be read.
        self._known: tuple[tuple[bool, ...], int] | None = None
        self.register_load_state_dict_post_hook(_forget)
        self._step: _Step | None = None
        self._seen = (0, 0, 0)

    def begin(self) -> None:
        """Take who supplies to be as it was made, without reading tensors, which may have no values."""
        self._known = (False,) * len(self.own), 0

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the inner objective's taps, and one that supplies keys and values to the block."""
        inner = super().taps(batch)
        self._advance(batch)
        owned, _ = self._read()
        time_bin = time_bins(batch.time, self.config.time_bins)
        mixed = any(owned) and not all(owned)
        own = self.own[time_bin]
        pulled = torch.ones_like(own) if self.config.internalise == "always" else own
        self._step = step = _Step(batch, time_bin, own, pulled, any(owned), mixed, [])
        supply: AttentionTap = partial(self._supply, step)
        before = inner.attention.get(self.depth)
        if before is not None:
            supply = _chain(before, supply)
        return Taps(tokens=inner.tokens, attention={**inner.attention, self.depth: supply})

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return the inner objective's loss plus what internalising costs the images whose block does it."""
        total = super().loss(predict_clean)
        step = self._step
        if step is None or not step.gaps:
            return total
        (gap,) = step.gaps
        self.statistics.observe({"gap": (gap.detach(), step.pulled > 0)}, step.time_bin)
        gate = self.objective.gate(step.batch.time)
        pull = step.pulled if gate is None else step.pulled * gate
        internalised = self.config.weight * (gap * pull).mean()
        return internalised if total is None else total + internalised

    def observe(self, losses: Tensor, rerun: Rerun) -> None:
        """Try the other supplier on some of the images."""
        super().observe(losses, rerun)
        step, self._step = self._step, None
        if step is None or not self.by_advantage or all(self._read()[0]):
            return
        stride = max(1, round(1 / self.config.fraction))
        first = 0 if step.batch.place is None else step.batch.place[0]
        # Another residue each step: with several noisings a residue belongs to one part of the times.
        rows = slice((mix(step.batch.images_seen) - first) % stride, None, stride)
        own = step.own[rows]
        counted = len(own) > 0
        if not counted:
            if not _several_processes():
                return
            # Of sharded weights all processes must ask equally often: one image is tried for nothing.
            rows, own = slice(0, 1), step.own[:1]
        swap = partial(self._swap, step.batch, rows, own)
        again = rerun(rows, Taps(attention={self.depth: swap}))
        advantage = torch.where(own > 0, losses[rows] - again, again - losses[rows])
        if counted:
            self.statistics.observe({"advantage": advantage}, step.time_bin[rows])

    def logs(self) -> dict[str, Tensor]:
        """Return the inner objective's logs and, by time bin: the encoder's advantage and its growth at the last look,
        the gap between own and supplied, who supplies (1: encoder), after how many images it changed, and whether the
        rule decided that (1) or the latest time (0).
        """
        logs = super().logs()
        taken = self.statistics.take()
        if not taken:
            return logs
        if self.by_advantage:
            logs["scaffold_advantage"] = binned(*taken["advantage"])
            logs["scaffold_growth"] = self.growth.clone()
            logs["scaffold_ruled"] = self.ruled.clone()
        logs["scaffold_gap"] = binned(*taken["gap"])
        logs["scaffold_encoder"] = 1 - self.own
        logs["scaffold_handed_at"] = self.handed_at.clone()
        return logs

    @torch.no_grad()
    def update(self) -> None:
        """Count the step and, where it is due, let bins change hands."""
        super().update()
        owned, steps = self._read()
        sums, counts = self.statistics.update()
        row = self.statistics.names.index("advantage")
        self.trials += torch.stack([sums[row], counts[row]])
        self.steps += 1
        self._known = owned, steps + 1
        seen, images, budget = self._seen
        every = max(1.0, CHECK_SHARE * budget)
        if self.by_advantage and not all(owned) and (seen + images) // every > seen // every:
            self._look(seen + images, budget)

    # -- who supplies -------------------------------------------------------------------------------------------------

    def _advance(self, batch: AlignmentBatch) -> None:
        """Let the clock, or the latest time of the advantage, end the scaffold."""
        images = len(batch.time) if batch.place is None else batch.place[1]
        self._seen = (batch.images_seen, images, batch.budget)
        owned, steps = self._read()
        if all(owned):
            return
        if self.by_advantage:
            over = batch.images_seen >= self.config.latest * batch.budget
        elif self.config.steps:
            over = steps >= self.config.steps
        else:
            over = batch.images_seen >= self.config.share * batch.budget
        if over:
            self._hand_over(torch.ones_like(self.own), batch.images_seen)
            self._known = (True,) * len(owned), steps

    def _look(self, seen: int, budget: int) -> None:
        """Compare the advantage to what it was when it last grew, in the bins that had enough trials."""
        total, count = self.trials
        enough = count >= CHECK_TRIALS
        advantage = total / count.clamp_min(1)
        advantage = torch.where(self.smooth.isnan(), advantage, self.smooth.lerp(advantage, SMOOTHING))
        grew = advantage > self.best * (1 + self.config.growth)
        self.growth.copy_(torch.where(enough, advantage - self.best, self.growth))
        self.stalled.copy_(torch.where(enough, torch.where(grew, 0.0, self.stalled + 1), self.stalled))
        # Growth too small to count stays to be counted with the next look's: slow growth is growth.
        self.best.copy_(torch.where(enough & grew, advantage, self.best))
        self.smooth.copy_(torch.where(enough, advantage, self.smooth))
        self.trials *= ~enough
        if seen >= self.config.earliest * budget:
            stalled = (self.stalled >= self.config.patience).float()
            self.ruled.copy_(torch.where((stalled > 0) & (self.own == 0), 1.0, self.ruled))
            self._hand_over(stalled, seen)
            self._known = None

    def _hand_over(self, bins: Tensor, seen: int) -> None:
        fresh = (bins > 0) & (self.own == 0)
        self.handed_at.masked_fill_(fresh, seen)
        self.own.copy_(torch.maximum(self.own, bins))

    def _read(self) -> tuple[tuple[bool, ...], int]:
        if self._known is None:
            self._known = tuple(value > 0 for value in self.own.tolist()), int(self.steps)
        return self._known

    # -- inside the block ---------------------------------------------------------------------------------------------

    def _supply(self, step: _Step, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys and values to attend to, and keep the gap between own and supplied."""
        batch = step.batch
        if not step.any_own:
            key, value = self._encoder(batch, k.dtype)
            if self.config.internalise == "always":
                step.gaps.append(_gap(k, key) + _gap(v, value))
            return q, _put(k, key), _put(v, value)
        with torch.set_grad_enabled(step.mixed and torch.is_grad_enabled()):
            key, value = self._encoder(batch, k.dtype)
        step.gaps.append(_gap(k, key) + _gap(v, value))
        if not step.mixed:
            return q, k, v
        return q, _put(k, key, step.own), _put(v, value, step.own)

    def _swap(
        self, batch: AlignmentBatch, rows: slice, own: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return for the images ``rows`` what the other supplier gives."""
        key, value = self._encoder(batch, k.dtype, rows)
        return q, _put(k, key, 1 - own), _put(v, value, 1 - own)

    def _encoder(self, batch: AlignmentBatch, dtype: torch.dtype, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the encoder's keys and values for the block, each (B, heads, N, head_dim)."""
        parts = (self.key_projection, batch.keys[0]), (self.value_projection, batch.values[0])
        key, value = (
            projection(given[rows]).to(dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, given in parts
        )
        return key, value


def looks_before_latest(config: ScaffoldConfig, budget: int) -> int:
    """Return how often a time bin's advantage is looked at before ``latest`` in a budget of so many images."""
    trials = CHECK_SHARE * budget * config.fraction / config.time_bins
    return int(config.latest / CHECK_SHARE / math.ceil(CHECK_TRIALS / trials))


def _put(own: Tensor, given: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return ``own`` (B, heads, N or more, head_dim) with ``given`` in its first N places, save where ``keep`` (B,).

    What stands behind the image's tokens, a representation token, keeps its own.
    """
    tokens = given.shape[2]
    if keep is not None:
        given = torch.where(keep.view(-1, 1, 1, 1) > 0, own[:, :, :tokens], given)
    return given if own.shape[2] == tokens else torch.cat([given, own[:, :, tokens:]], dim=2)


def _gap(own: Tensor, given: Tensor) -> Tensor:
    """Return the mean square (B,) between own and given, by which gradients reach the own only; float32."""
    with torch.autocast(own.device.type, enabled=False):
        difference = own[:, :, : given.shape[2]].float() - given.detach().float()
        return difference.square().flatten(1).mean(1)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _chain(first: AttentionTap, second: AttentionTap) -> AttentionTap:
    return lambda q, k, v: second(*first(q, k, v))


def _forget(module: nn.Module, keys: Any) -> None:
    if isinstance(module, WithScaffold):
        module._known = None
