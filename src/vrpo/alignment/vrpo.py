"""VRPO: the representation as a policy that is rewarded for what it does for generation (docs/method.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import cast

import torch
from torch import Tensor, nn

from vrpo.alignment import probe  # noqa: F401  (registers the perceptual reward)
from vrpo.alignment.gate import time_bins
from vrpo.alignment.head import Draws, PolicyHead, Settings
from vrpo.alignment.objective import AlignmentBatch
from vrpo.alignment.projector import ConvProjector, MLPProjector, unit
from vrpo.alignment.rewards import RewardContext
from vrpo.alignment.schedule import Schedule
from vrpo.alignment.seam import attach
from vrpo.alignment.static import Repa, spatial_normalise
from vrpo.alignment.tangents import Pushforward, improvement, linearize
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps
from vrpo.randomness import mix

BUILT_IN = ("semantic", "relational", "fidelity", "perceptual")
# The probe's share of the total loss. AdamW does not notice it; the limit on the common gradient norm does.
PROBE_WEIGHT = 0.1
# In analytic mode the trust region alone needs the old policy: a sixteenth of the tokens, in turn, estimate
# it at a sixteenth of the cost.
TRUST_STRIDE = 16


@dataclass(frozen=True)
class _Pass:
    """One head's share of a micro-batch, between its tap and its backward pass.

    ``old`` is the old policy's mean at the tokens ``trusted``, which are all of them in sampled mode.
    """

    head: int
    projected: Tensor
    pushforward: Pushforward | None
    context: RewardContext
    draws: Draws
    trusted: slice
    old: Tensor | None


class Vrpo(Repa):
    """The sum ``omega(t) [alpha (1 - <u,y>) + (1 - alpha) L_pg + beta (1 - <u,u_old>)]``, weighted by lambda.

    What is known in the forward pass (REPA's share and the trust region) is an ordinary loss. The policy's
    share needs the gradient of denoising at the aligned tokens and enters through a seam. With ``alpha = 1``
    throughout, no gate and no trust region nothing is left but REPA, which then runs as REPA does.
    """

    name = "vrpo"

    def __init__(
        self,
        config: AlignConfig,
        *,
        hidden_size: int,
        depths: Sequence[int],
        encoder_widths: Sequence[int],
        tokens: int,
    ) -> None:
        """Build projectors as REPA does, then a policy head for each.

        Raises ConfigError for settings that have no effect together, unknown rewards and grids that are not
        square.
        """
        super().__init__(config, hidden_size=hidden_size, depths=depths, encoder_widths=encoder_widths)
        self.vrpo = settings = config.vrpo
        clashes = [name for name in settings.rewards if name in BUILT_IN]
        if clashes:
            raise ConfigError(
                f"align.vrpo.rewards sets '{clashes[0]}', which has a field of its own: set align.vrpo.{clashes[0]}."
            )
        values = {name: getattr(settings, name) for name in BUILT_IN} | dict(settings.rewards)
        schedules = {name: Schedule(value, f"align.vrpo.{name}") for name, value in values.items()}
        self.weights = {name: schedule for name, schedule in schedules.items() if not schedule.is_zero}
        if settings.alpha_end == 1:
            self.weights = {}
        self.repa_only = not self.weights and not settings.gate and settings.trust == 0
        self.samples = settings.mode == "sampled" and bool(self.weights)
        keep_old = settings.trust > 0 or self.samples
        self.policies = nn.ModuleList(
            PolicyHead(settings, projector, encoder_widths[encoder], list(self.weights), keep_old=keep_old)
            for (_, encoder), projector in zip(self.heads, self.projectors, strict=True)
        )
        rewards = [policy.reward(name) for policy in self._policies() for name in self.weights]
        self.reads_gradient = settings.gate or any(reward.reads_gradient for reward in rewards)
        self.reads_images = any(reward.reads_images for reward in rewards)
        self._check(tokens)
        self._step: _Step | None = None
        self._alpha: float = 1.0

    def make_projector(self, in_width: int, out_width: int) -> nn.Module:
        """Return the projector of one head."""
        if self.config.vrpo.base == "irepa":
            return ConvProjector(in_width, out_width)
        return MLPProjector(in_width, out_width, self.config.projector_width)

    def prepare_target(self, target: Tensor) -> Tensor:
        """Return unit targets (B, N, C), spatially normalised first where iREPA's are asked for."""
        if self.config.vrpo.base == "irepa":
            target = spatial_normalise(target.float(), self.config.gamma)
        return unit(target)

    def alpha(self, images_seen: int, budget: int) -> float:
        """Return REPA's share, which falls linearly from 1 to ``alpha_end`` over the warm-up."""
        warmup, end = self.vrpo.warmup * budget, self.vrpo.alpha_end
        left = max(0.0, 1 - images_seen / warmup) if warmup > 0 else 0.0
        return end + (1 - end) * left

    @torch.no_grad()
    def gate(self, time: Tensor) -> Tensor | None:
        """Return omega (B,) at times (B,), the mean over heads; None where the gate is off."""
        if not self.vrpo.gate:
            return None
        time_bin = time_bins(time, self.vrpo.time_bins)
        return torch.stack([policy.gate()[time_bin] for policy in self._policies()]).mean(0)

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return taps that act on the tokens after each aligned block."""
        if self.repa_only:
            return super().taps(batch)
        with torch.no_grad(), torch.autocast(batch.time.device.type, enabled=False):
            targets = [self.prepare_target(target) for target in batch.targets]
            time_bin = time_bins(batch.time, self.vrpo.time_bins)
            gates = [policy.gate()[time_bin] if self.vrpo.gate else None for policy in self._policies()]
        weights = {name: schedule(batch.images_seen) for name, schedule in self.weights.items()}
        self._alpha = self.alpha(batch.images_seen, batch.budget)
        self._step = _Step(
            batch=batch,
            targets=targets,
            settings=Settings({name: weight for name, weight in weights.items() if weight}, time_bin),
            gates=gates,
            alpha=self._alpha,
            means={},
            passes={},
        )
        return Taps(tokens={depth: partial(self._act, self._step, depth) for depth in self.depths})

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return lambda times REPA's share and the trust region, and what trains the probes."""
        if self.repa_only:
            return super().loss(predict_clean)
        step, self._step = self._step, None
        if step is None:
            return None
        losses, probes, cosines = [], [], []
        with torch.autocast(step.batch.time.device.type, enabled=False):
            for index in range(len(self.heads)):
                u, context = step.means[index], step.passes[index].context
                cosine = (u * context.target).sum(-1)
                cosines.append(cosine.detach().mean())
                losses += self._head_losses(step, index, u, cosine)
                probes += self._probe_losses(index, context)
        self._cosines.add(torch.stack(cosines))
        total = self.config.weight * torch.stack(losses).mean() if losses else None
        if probes:
            trained = PROBE_WEIGHT * torch.stack(probes).sum()
            total = trained if total is None else total + trained
        return total

    def logs(self) -> dict[str, Tensor]:
        """Return alignment, alpha, and for each head its rewards, gate and policy statistics."""
        logs = super().logs()
        if self.repa_only or not logs:
            return logs
        logs["alpha"] = torch.full_like(logs["alignment"], self._alpha)
        for (depth, encoder), policy in zip(self.heads, self._policies(), strict=True):
            place = "" if len(self.heads) == 1 else f"_depth{depth}_encoder{encoder + 1}"
            logs |= {name + place: value for name, value in policy.logs().items()}
        return logs

    @torch.no_grad()
    def update(self) -> None:
        """Advance the statistics and the old policies."""
        if self.repa_only:
            return
        for policy, projector in zip(self._policies(), self.projectors, strict=True):
            policy.update(projector)

    def _act(self, step: _Step, depth: int, h: Tensor) -> Tensor:
        """Project ``h``, keep what the losses need, and return ``h`` joined to the policies' means."""
        indices = [index for index, (where, _) in enumerate(self.heads) if where == depth]
        # A node of its own, where the heads' gradients are summed before they meet that of the blocks above.
        seen = h.view_as(h)
        for index in indices:
            projector = self.projectors[index]
            pushforward = None
            if self.reads_gradient and torch.is_grad_enabled():
                projected, pushforward = linearize(projector, seen)
            else:
                projected = projector(seen)
            with torch.autocast(h.device.type, enabled=False):
                u = unit(projected)
            target = step.targets[self.heads[index][1]].to(u.dtype)
            policy = self._policy(index)
            trusted = self._trusted(step.batch, index, h.shape[1])
            old = None if policy.old is None else self._old_mean(policy, h[:, trusted])
            mean = old if self.samples and old is not None else u.detach()
            step.means[index] = u
            step.passes[index] = _Pass(
                head=index,
                projected=projected.detach(),
                pushforward=pushforward,
                context=RewardContext(mean, target, None, step.batch),
                draws=policy.draw(u, step.batch.generator, step.batch.place) if step.settings.weights else {},
                trusted=trusted,
                old=old,
            )
        if not torch.is_grad_enabled() or not (self.weights or self.vrpo.gate):
            return h
        passes = [step.passes[index] for index in indices]

        def respond(g: Tensor, *means: Tensor) -> list[Tensor | None]:
            with step.batch.watch():
                return self._respond(step.settings, step.gates, step.alpha, passes, g, *means)

        return attach(h, [step.means[index] for index in indices], respond)

    def _respond(
        self,
        settings: Settings,
        gates: Sequence[Tensor | None],
        alpha: float,
        passes: Sequence[_Pass],
        g: Tensor,
        *means: Tensor,
    ) -> list[Tensor | None]:
        """Return the gradient of the policies' losses at ``means``, given that of denoising at ``h``."""
        batch = passes[0].context.batch
        image_weight = _column(batch.sample_weight)
        # Times N: the size of one token's own gradient, whatever the number of images and tokens in the mean.
        g = g.to(means[0].dtype) / image_weight * g.shape[1]
        usable = g.isfinite().all(-1, keepdim=True)
        g = torch.where(usable, g, 0.0)
        answers: list[Tensor | None] = []
        for part, u in zip(passes, means, strict=True):
            context = part.context
            if part.pushforward is not None:
                q = improvement(part.pushforward, part.projected, g)
                context = replace(context, improvement=torch.where(usable, q, torch.nan))
            policy = self._policy(part.head)
            direction, seen = policy.ascent(u, context, settings, part.draws)
            policy.statistics.observe(seen, settings.time_bin)
            if alpha == 1:
                answers.append(None)
                continue
            if direction is None:
                # Not None: a projector that has no other loss in this step still gets its (zero) gradient.
                answers.append(torch.zeros_like(u))
                continue
            share = self.config.weight * (1 - alpha) / (u.shape[1] * len(self.heads))
            gate = gates[part.head]
            factor = image_weight if gate is None else image_weight * _column(gate.to(u.dtype))
            answers.append(direction * (-share * factor))
        return answers

    def _head_losses(self, step: _Step, index: int, u: Tensor, cosine: Tensor) -> list[Tensor]:
        """Return one head's share of REPA and of the trust region, as far as they have a weight."""
        gate = step.gates[index]

        def gated(similarity: Tensor) -> Tensor:
            return -(similarity if gate is None else similarity * gate.unsqueeze(1)).mean()

        total = None
        if step.alpha:
            total = gated(cosine) if step.alpha == 1 else step.alpha * gated(cosine)
        if self.vrpo.trust:
            part = step.passes[index]
            assert part.old is not None
            term = self.vrpo.trust * gated((u[:, part.trusted] * part.old).sum(-1))
            total = term if total is None else total + term
        return [] if total is None else [total]

    def _probe_losses(self, index: int, context: RewardContext) -> list[Tensor]:
        policy = self._policy(index)
        losses = [policy.reward(name).loss(context) for name in self.weights]
        return [loss for loss in losses if loss is not None]

    def _trusted(self, batch: AlignmentBatch, index: int, tokens: int) -> slice:
        """Return the tokens whose distance to the old policy counts in this step."""
        whole_grid = isinstance(self.projectors[index], ConvProjector)
        if whole_grid or self.samples:
            return slice(None)
        stride = min(TRUST_STRIDE, tokens)
        return slice(mix(batch.images_seen) % stride, None, stride)

    @staticmethod
    def _old_mean(policy: PolicyHead, h: Tensor) -> Tensor:
        with torch.no_grad():
            projected = policy.old_policy(h)
            with torch.autocast(h.device.type, enabled=False):
                return unit(projected)

    def _policy(self, index: int) -> PolicyHead:
        return cast(PolicyHead, self.policies[index])

    def _policies(self) -> list[PolicyHead]:
        return [self._policy(index) for index in range(len(self.policies))]

    def _check(self, tokens: int) -> None:
        settings = self.vrpo
        if isqrt(tokens) ** 2 != tokens and (settings.base == "irepa" or "perceptual" in self.weights):
            remedy = "base repa" if settings.base == "irepa" else "perceptual 0"
            raise ConfigError(
                f"align.vrpo.{remedy.split()[0]} needs a square grid but the model has {tokens} tokens: "
                f"use square images, or align.vrpo.{remedy}."
            )
        if settings.mode == "analytic":
            for policy in self._policies():
                for name in self.weights:
                    if not policy.reward(name).differentiable:
                        raise ConfigError(
                            f"The reward '{name}' has a score but no preference, which "
                            "analytic mode follows: set align.vrpo.mode sampled, or give it a preference."
                        )
            if settings.shuffle_advantages or settings.basis == "isotropic":
                field = "shuffle_advantages" if settings.shuffle_advantages else "basis 'isotropic'"
                raise ConfigError(
                    f"align.vrpo.{field} is about sampled actions, of which analytic mode has none: set "
                    "align.vrpo.mode sampled."
                )


@dataclass(frozen=True)
class _Step:
    """A micro-batch between ``taps`` and ``loss``."""

    batch: AlignmentBatch
    targets: list[Tensor]
    settings: Settings
    gates: list[Tensor | None]
    alpha: float
    means: dict[int, Tensor]
    passes: dict[int, _Pass]


def _column(value: Tensor | float) -> Tensor | float:
    """Return a value an image (B,) in a shape that multiplies (B, N, C); others as they are."""
    return value.view(-1, 1, 1) if isinstance(value, Tensor) and value.ndim == 1 else value
