"""HASTE: alignment of features and of attention maps, both ended early (arXiv 2505.16792)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch
from vrpo.alignment.projector import unit
from vrpo.alignment.static import Repa, RunningMean
from vrpo.config import AlignConfig
from vrpo.models.taps import NO_TAPS, Taps

ALIGNED_HEADS = 12
AFFINITY_TEMPERATURE = 0.1
FIXED_SHARE = 0.4
TRIGGER_DECAY = 0.99
TRIGGER_ARMED_SHARE = 0.05
TRIGGER_PERIOD = 50


class Haste(Repa):
    """REPA plus attention-map alignment, ended at a count of images or when it opposes denoising.

    Encoders here give tokens, not attention maps. The teacher's map is therefore the affinity of its tokens,
    ``softmax(y y' / 0.1)`` over the other tokens of the image, averaged over encoders. The student's is
    ``softmax(q k' / sqrt(head_dim))`` over the other tokens, averaged over a block's first 12 heads (HASTE's
    code aligns as many as its teacher has, and leaves the rest free). The loss is their cross-entropy. A
    token's affinity with itself is 1 whatever the image, so both maps leave the diagonal out.

    The trigger follows the cosine between the gradients of denoising and of feature alignment at the deepest
    aligned tokens, which the ordinary backward pass brings there. Alignment ends when its running mean (decay
    0.99) is below ``trigger_cosine``, looked at every 50 steps from 5% of the budget on. HASTE's own analysis
    compares gradients of parameters, which takes a second backward pass.
    """

    name = "haste"
    stopped: Tensor
    steps: Tensor
    trigger_sum: Tensor
    trigger_weight: Tensor

    def __init__(
        self,
        config: AlignConfig,
        *,
        hidden_size: int,
        depths: Sequence[int],
        encoder_widths: Sequence[int],
        num_heads: int,
    ) -> None:
        super().__init__(config, hidden_size=hidden_size, depths=depths, encoder_widths=encoder_widths)
        self.haste = config.haste
        deepest = max(depths)
        self.attention_depths = self.haste.attention_depths or tuple({max(1, deepest - 1), deepest})
        self.aligned_heads = min(num_heads, ALIGNED_HEADS)
        self.register_buffer("stopped", torch.zeros((), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("trigger_sum", torch.zeros(()))
        self.register_buffer("trigger_weight", torch.zeros(()))
        # The host's copies of the buffers ``stopped`` and ``steps``; None: to be read.
        self._progress: tuple[bool, int] | None = None
        self.register_load_state_dict_post_hook(_forget_progress)
        self._maps: dict[int, Tensor] = {}
        self._attention = RunningMean()
        self._gradient: Tensor | None = None
        # Of the step's two gradients: their product and their squares, summed over micro-batches.
        self._products: Tensor | None = None
        self._armed = False

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return taps on the aligned blocks' tokens and attention, or none once alignment has ended."""
        if self._ended(batch):
            return NO_TAPS
        self._armed = batch.images_seen >= TRIGGER_ARMED_SHARE * batch.budget
        self._maps = {}
        self._gradient = None
        tokens = super().taps(batch).tokens
        if self.haste.attention_weight == 0:
            return Taps(tokens=tokens)
        return Taps(
            tokens=tokens,
            attention={depth: partial(self._keep_attention, depth) for depth in self.attention_depths},
        )

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return the weighted feature loss plus the weighted attention loss, or None once both have ended."""
        batch, maps = self._batch, self._maps
        self._maps = {}
        features = super().loss(predict_clean)
        if batch is None or features is None or not maps:
            return features
        teacher = torch.stack([affinity_map(target) for target in batch.targets]).mean(0)
        attention = torch.stack([cross_entropy(teacher, student) for student in maps.values()]).mean()
        self._attention.add(attention)
        return features + self.haste.attention_weight * attention

    def logs(self) -> dict[str, Tensor]:
        """Return the mean cosine and attention loss since the last call, and the trigger's running mean."""
        logs = super().logs()
        attention = self._attention.take()
        if attention is not None:
            logs["attention"] = attention
        if logs and self.haste.stop == "trigger":
            logs["gradient_cosine"] = self._trigger_mean()
        return logs

    def update(self) -> None:
        """Count an optimiser step and, where it is due, let the trigger decide."""
        if self.haste.stop == "fixed":
            return
        stopped, steps = self._read_progress()
        if stopped:
            return
        self.steps += 1
        self._follow()
        if (steps + 1) % TRIGGER_PERIOD == 0 and self._armed:
            stopped = bool(self._trigger_mean() < self.haste.trigger_cosine)
            self.stopped.fill_(stopped)
        self._progress = (stopped, steps + 1)

    def _ended(self, batch: AlignmentBatch) -> bool:
        if self.haste.stop == "fixed":
            return batch.images_seen >= (self.haste.stop_images or FIXED_SHARE * batch.budget)
        return self._read_progress()[0]

    def _read_progress(self) -> tuple[bool, int]:
        if self._progress is None:
            self._progress = (bool(self.stopped), int(self.steps))
        return self._progress

    def _keep(self, depth: int, h: Tensor) -> Tensor:
        if self.haste.stop == "fixed" or depth != max(self.depths) or not h.requires_grad:
            return super()._keep(depth, h)
        # Two aliases of the tokens, so that each loss's gradient can be seen before autograd adds them up.
        mine, onward = h.view_as(h), h.view_as(h)
        mine.register_hook(self._keep_gradient)
        onward.register_hook(self._keep_gradient)
        super()._keep(depth, mine)
        return onward

    def _keep_gradient(self, gradient: Tensor) -> None:
        if self._gradient is None:
            self._gradient = gradient
            return
        a, b = gradient.float().flatten(), self._gradient.float().flatten()
        self._gradient = None
        products = torch.stack([torch.dot(a, b), a.square().sum(), b.square().sum()])
        self._products = products if self._products is None else self._products + products

    def _follow(self) -> None:
        """Let the step's cosine, of the gradients over all micro-batches and processes, enter the trigger's mean."""
        products, self._products = self._products, None
        if products is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(products)
        cosine = products[0] / (products[1].sqrt() * products[2].sqrt())
        # The first step brings no denoising gradient, and a skipped step no finite one: 0/0 and inf/inf.
        counts = torch.isfinite(cosine)
        self.trigger_sum.lerp_(torch.where(counts, cosine, 0.0), 1 - TRIGGER_DECAY)
        self.trigger_weight.lerp_(counts.float(), 1 - TRIGGER_DECAY)

    def _trigger_mean(self) -> Tensor:
        return self.trigger_sum / self.trigger_weight.clamp_min(1e-12)

    def _keep_attention(self, depth: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self._batch is not None
        # A representation token stands behind the image's.
        tokens = self._batch.targets[0].shape[1]
        self._maps[depth] = student_map(q[:, : self.aligned_heads, :tokens], k[:, : self.aligned_heads, :tokens])
        return q, k, v


def affinity_map(target: Tensor, temperature: float = AFFINITY_TEMPERATURE) -> Tensor:
    """Return ``softmax(y y' / temperature)`` over the other tokens of the image, (B, N, C) -> (B, N, N)."""
    with torch.autocast(target.device.type, enabled=False):
        y = unit(target)
        return _softmax_over_others(y @ y.transpose(-1, -2) / temperature)


def student_map(q: Tensor, k: Tensor) -> Tensor:
    """Return the mean over heads of ``softmax(q k' / sqrt(head_dim))`` over the other tokens, (B, N, N).

    ``q`` and ``k`` are (B, heads, N, head_dim); the arithmetic is float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float() / sqrt(q.shape[-1]), k.float()
        return _softmax_over_others(q @ k.transpose(-1, -2)).mean(1)


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``-sum_m teacher_nm log student_nm``, averaged over images and tokens n."""
    return -(teacher * student.clamp_min(1e-12).log()).sum(-1).mean()


def _softmax_over_others(logits: Tensor) -> Tensor:
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill(own, float("-inf")).softmax(-1)


def _forget_progress(module: nn.Module, _keys: object) -> None:
    module._progress = None  # type: ignore[assignment]
