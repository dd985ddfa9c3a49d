"""Static objectives: the target of a token is fixed, whatever the representation does to generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch, Objective
from vrpo.alignment.projector import ConvProjector, MLPProjector, unit
from vrpo.config import AlignConfig
from vrpo.models.taps import Taps


class RunningMean:
    """The mean of the tensors added since it was last taken, kept on their device."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        """Count ``value``, detached, in."""
        value = value.detach()
        self._sum = value if self._sum is None else self._sum + value
        self._count += 1

    def take(self) -> Tensor | None:
        """Return the mean, or None where nothing was added, and start afresh."""
        mean = None if self._sum is None else self._sum / self._count
        self._sum, self._count = None, 0
        return mean


class Repa(Objective):
    """REPA: ``-lambda`` times the cosine between projected tokens and encoder tokens (arXiv 2410.06940).

    There is one head for each pair of aligned depth and encoder; the cosine is averaged over tokens, images
    and heads, as REPA averages over its encoders.
    """

    name = "repa"

    def __init__(
        self, config: AlignConfig, *, hidden_size: int, depths: Sequence[int], encoder_widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.config = config
        self.depths = tuple(depths)
        self.heads = tuple((depth, encoder) for depth in depths for encoder in range(len(encoder_widths)))
        self.projectors = nn.ModuleList(
            self.make_projector(hidden_size, encoder_widths[encoder]) for _, encoder in self.heads
        )
        self._batch: AlignmentBatch | None = None
        self._tokens: dict[int, Tensor] = {}
        self._cosines = RunningMean()

    def make_projector(self, in_width: int, out_width: int) -> nn.Module:
        """Return the projector of one head."""
        return MLPProjector(in_width, out_width, self.config.projector_width)

    def prepare_target(self, target: Tensor) -> Tensor:
        """Return unit targets (B, N, C) in float32 from an encoder's raw tokens."""
        return unit(target)

    def head_loss(self, projected: Tensor, target: Tensor, cosine: Tensor) -> Tensor:
        """Return one head's loss from unit tokens (B, N, C) and their mean cosine."""
        return -cosine

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return taps that keep the tokens after each aligned block until ``loss``."""
        self._batch = batch
        self._tokens = {}
        return Taps(tokens={depth: partial(self._keep, depth) for depth in self.depths})

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return ``lambda`` times the mean of the heads' losses."""
        batch, tokens = self._batch, self._tokens
        self._batch, self._tokens = None, {}
        if batch is None:
            return None
        losses, cosines = self._compare(batch, tokens)
        self._cosines.add(cosines)
        return self.config.weight * losses.mean()

    @torch.no_grad()
    def measure(self, batch: AlignmentBatch, tokens: Mapping[int, Tensor]) -> Tensor:
        """Return the mean cosine between projected ``tokens`` (by depth) and the targets, over all heads."""
        return self._compare(batch, tokens)[1].mean()

    def logs(self) -> dict[str, Tensor]:
        """Return the mean cosine since the last call, and by head where there are several."""
        cosines = self._cosines.take()
        if cosines is None:
            return {}
        logs = {"alignment": cosines.mean()}
        if len(self.heads) > 1:
            for (depth, encoder), cosine in zip(self.heads, cosines.unbind(), strict=True):
                logs[f"alignment_depth{depth}_encoder{encoder + 1}"] = cosine
        return logs

    def _keep(self, depth: int, h: Tensor) -> Tensor:
        self._tokens[depth] = h
        return h

    def _compare(self, batch: AlignmentBatch, tokens: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return every head's loss and mean cosine, each (heads,)."""
        losses, cosines = [], []
        with torch.autocast(batch.time.device.type, enabled=False):
            targets = [self.prepare_target(target) for target in batch.targets]
        for (depth, encoder), projector in zip(self.heads, self.projectors, strict=True):
            projected = projector(tokens[depth])
            with torch.autocast(projected.device.type, enabled=False):
                projected = unit(projected)
                cosine = (projected * targets[encoder]).sum(-1).mean()
                losses.append(self.head_loss(projected, targets[encoder], cosine))
            cosines.append(cosine)
        return torch.stack(losses), torch.stack(cosines)


class Irepa(Repa):
    """iREPA: REPA with a 3x3 convolutional projector and spatially normalised targets (arXiv 2512.10794)."""

    name = "irepa"

    def make_projector(self, in_width: int, out_width: int) -> nn.Module:
        """Return the projector of one head."""
        return ConvProjector(in_width, out_width)

    def prepare_target(self, target: Tensor) -> Tensor:
        """Return unit targets after spatial normalisation."""
        return unit(spatial_normalise(target.float(), self.config.gamma))


def spatial_normalise(target: Tensor, gamma: float, eps: float = 1e-6) -> Tensor:
    """Return ``(y - gamma mean_N y) / std_N y`` by channel, for tokens (B, N, C) (arXiv 2512.10794)."""
    centred = target - gamma * target.mean(1, keepdim=True)
    return centred / (target.std(1, keepdim=True) + eps)


class Contrastive(Repa):
    """InfoNCE (arXiv 1807.03748, eq. 4) by token position: own encoder token against other images'.

    The negatives of a token are the tokens at the same position of the other images in the micro-batch on
    this process. Larger batches are split evenly into groups of at most 256 images, so that memory stays
    below 256 B N similarities a head.
    """

    name = "contrastive"
    group_limit = 256

    def head_loss(self, projected: Tensor, target: Tensor, cosine: Tensor) -> Tensor:
        """Return one head's cross-entropy from unit tokens (B, N, C)."""
        images = projected.shape[0]
        groups = ceil(images / self.group_limit)
        total = projected.new_zeros(())
        for mine, theirs in zip(projected.chunk(groups), target.chunk(groups), strict=True):
            logits = torch.einsum("inc,jnc->nij", mine, theirs) / self.config.temperature
            answer = torch.arange(len(mine), device=logits.device).expand(logits.shape[0], -1)
            total = total + F.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="sum")
        return total / (images * projected.shape[1])
