"""One policy head: the rewards, old policy and running statistics of one aligned depth and one encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from vrpo.alignment import advantage
from vrpo.alignment.gate import Observation, RunningMeans, binned, gate_value, pooled
from vrpo.alignment.policy import (
    Actions,
    adapted_radius,
    antithetic,
    log_ratio,
    orthonormal_frame,
    sample_actions,
    surrogate_gradient,
    tangent,
)
from vrpo.alignment.rewards import Reward, RewardContext, build_reward
from vrpo.alignment.tangents import whole
from vrpo.config import VrpoConfig
from vrpo.errors import ConfigError

# The radius adapts within these multiples of the configured one.
RADIUS_RANGE = (0.1, 3.0)

Draws = Mapping[str, Tensor]


def draw(
    images: int,
    shapes: Mapping[str, tuple[int, ...]],
    like: Tensor,
    source: torch.Generator | None,
    place: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return named Gaussian tensors, (images, *shape) each, drawn at once and image by image.

    With ``place`` (see ``AlignmentBatch``) the whole step is drawn and the rows of these images are taken, so that
    nothing depends on how the step was split.

    With a row an image, a batch drawn in parts on a CPU equals the batch drawn whole: torch's CPU generator
    fills in blocks of 16, to which rows are padded.
    """
    sizes = [prod(shape) for shape in shapes.values()]
    row = -(-sum(sizes) // 16) * 16
    device = like.device if source is None else source.device
    first, total = place or (0, images)
    numbers = torch.randn(total, row, generator=source, device=device)[first : first + images]
    numbers = numbers.to(like.device, like.dtype)
    parts = numbers[:, : sum(sizes)].split(sizes, dim=1)
    return {name: part.reshape(images, *shapes[name]) for name, part in zip(shapes, parts, strict=True)}


@dataclass(frozen=True)
class Settings:
    """One step: the weights of the active rewards, and each image's time bin (B,)."""

    weights: dict[str, float]
    time_bin: Tensor


class PolicyHead(nn.Module):
    """A spherical policy around ``u = normalise(projector(h))`` and how its rewards want it to move."""

    radius: Tensor

    def __init__(
        self, config: VrpoConfig, projector: nn.Module, width: int, rewards: Sequence[str], *, keep_old: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.rewards = nn.ModuleDict({name: build_reward(name, width) for name in rewards})
        self.old = frozen_copy(projector) if keep_old else None
        kinds = [f"{name}/{kind}" for name in rewards for kind in ("reward", "size", "dropped")]
        shared = ["agreement", "direction"]
        sampled = ["clipped", "ratio_variance"] if config.mode == "sampled" else []
        self.statistics = RunningMeans([*kinds, *shared, *sampled], config.time_bins)
        self.register_buffer("radius", torch.tensor(float(config.radius)))
        if config.mode == "sampled" and self._directions() == 0:
            raise ConfigError(
                "align.vrpo.mode 'sampled' has no direction to explore: "
                "set align.vrpo.random_directions above 0, or give a weight to a reward with a preference."
            )

    def reward(self, name: str) -> Reward:
        """Return the reward called ``name``."""
        return cast(Reward, self.rewards[name])

    def old_policy(self, h: Tensor) -> Tensor:
        """Return the old policy's projection of ``h``, (B, N, C)."""
        assert self.old is not None
        return self.old(h)

    def gate(self) -> Tensor:
        """Return ``omega`` by time bin, from the statistics of the steps before this one."""
        return gate_value(self.statistics.means("agreement"), self.config.gate_scale, self.config.gate_floor)

    def draw(self, u: Tensor, source: torch.Generator | None, place: tuple[int, int] | None = None) -> Draws:
        """Return the random numbers that ``ascent`` will use."""
        images, tokens, width = u.shape
        config = self.config
        shapes: dict[str, tuple[int, ...]] = {}
        if config.noise_preferences:
            shapes |= dict.fromkeys(self._informed(), (tokens, width))
        if config.mode == "sampled":
            half = (config.group + 1) // 2
            if config.basis == "isotropic":
                shapes["steps"] = (half, tokens, width)
            else:
                # One direction serves all tokens of an image: in the tangent space of each it is another.
                shapes["directions"] = (config.random_directions, 1, width)
                shapes["coordinates"] = (tokens, half, self._directions())
            if config.shuffle_advantages:
                shapes["order"] = (tokens, config.group)
        return draw(images, shapes, u, source, place) if shapes else {}

    def ascent(
        self, u: Tensor, context: RewardContext, settings: Settings, draws: Draws
    ) -> tuple[Tensor | None, dict[str, Observation]]:
        """Return the direction (B, N, C) in which to move ``u``, and what was seen on the way.

        ``-<u, direction>`` is the analytic loss; in sampled mode the direction is minus the gradient of the
        clipped surrogate. None where no reward is active.
        """
        seen: dict[str, Observation] = {}
        if context.improvement is not None:
            seen["agreement"] = agreement(u, context.target, context.improvement)
        if not settings.weights:
            return None, seen
        if self.config.mode == "analytic":
            direction = self._analytic(u, context, settings, draws, seen)
        else:
            direction = self._sampled(u, context, settings, draws, seen)
        seen["direction"] = torch.linalg.vector_norm(direction, dim=-1)
        return direction, seen

    def update(self, projector: nn.Module) -> None:
        """Advance statistics, radius and old policy by one step."""
        sums, counts = self.statistics.update()
        for name in self.rewards:
            self.reward(name).update()
        if self.config.mode == "sampled" and self.config.adapt_radius:
            row = self.statistics.names.index("ratio_variance")
            spread = pooled(sums[row], counts[row]).sqrt()
            low, high = (factor * self.config.radius for factor in RADIUS_RANGE)
            self.radius.copy_(adapted_radius(self.radius, spread).clamp(low, high))
        if self.old is not None:
            for old, new in zip(self.old.buffers(), projector.parameters(), strict=True):
                old.lerp_(whole(new.detach()), 1 - self.config.old_decay)

    def logs(self) -> dict[str, Tensor]:
        """Return what was seen since the last call: vectors by time bin, or scalars; not a number where
        empty.
        """
        taken = self.statistics.take()
        if not taken:
            return {}
        logs: dict[str, Tensor] = {}
        for name in self.rewards:
            logs[f"reward_{name}"] = binned(*taken[f"{name}/reward"])
            logs[f"spread_{name}"] = binned(*taken[f"{name}/size"])
            logs[f"dropped_{name}"] = taken[f"{name}/dropped"][0].sum()
        logs["agreement"] = binned(*taken["agreement"])
        if self.config.gate:
            logs["gate"] = self.gate()
        logs["direction_norm"] = pooled(*taken["direction"])
        if self.config.mode == "sampled":
            logs["clip_fraction"] = pooled(*taken["clipped"])
            logs["ratio_std"] = pooled(*taken["ratio_variance"]).sqrt()
            logs["radius"] = self.radius.clone()
        return logs

    def _informed(self) -> list[str]:
        return [name for name in self.rewards if self.reward(name).differentiable]

    def _directions(self) -> int:
        """Return k, the dimension of the explored subspace."""
        return len(self._informed()) + self.config.random_directions

    def _preference(self, name: str, mean: Tensor, context: RewardContext, draws: Draws) -> Tensor:
        preference = tangent(self.reward(name).preference(context), mean)
        if self.config.noise_preferences:
            noise = tangent(draws[name], mean)
            preference = noise * (advantage.norm(preference) / advantage.norm(noise).clamp_min(1e-12))
        return preference

    def _inverse_size(self, name: str, time_bin: Tensor) -> Tensor:
        """Return ``1/s_k`` for each image, (B, 1, 1); zero while the reward's size is unknown."""
        size = self.statistics.means(f"{name}/size")
        return torch.where(size > 0, 1 / size, 0.0)[time_bin].view(-1, 1, 1)

    def _analytic(
        self,
        u: Tensor,
        context: RewardContext,
        settings: Settings,
        draws: Draws,
        seen: dict[str, Observation],
    ) -> Tensor:
        components = []
        for name in settings.weights:
            preference = self._preference(name, u, context, draws)
            size = advantage.norm(preference)
            preference, usable = _drop(preference, size.isfinite())
            score = self.reward(name).score(Actions.at(u), context).squeeze(-1)
            self._note(name, score, size.squeeze(-1), usable.squeeze(-1), seen)
            components.append(preference * self._inverse_size(name, settings.time_bin).to(u.dtype))
        return self._combine(components, settings, advantage.norm)

    def _sampled(
        self,
        u: Tensor,
        context: RewardContext,
        settings: Settings,
        draws: Draws,
        seen: dict[str, Observation],
    ) -> Tensor:
        config, radius = self.config, self.radius
        actions = self._act(context, settings, draws)
        components = []
        for name in settings.weights:
            score = self.reward(name).score(actions, context)
            if score.shape != actions.weights.shape[:3]:
                raise ConfigError(
                    f"The reward '{name}' returned a tensor of shape {tuple(score.shape)}: "
                    f"return one score an action, {tuple(actions.weights.shape[:3])}."
                )
            score, usable = _drop(score, score.isfinite().all(-1, keepdim=True))
            mean = score.mean(-1, keepdim=True)
            # Divided by the radius the spread tends to the length of the preference, whatever the radius.
            centred = (score - mean) / radius
            size = advantage.group_spread(centred)
            # A spread within rounding is none: divided by its own running size it would be noise at full
            # size.
            flat = size * radius <= 8 * torch.finfo(score.dtype).eps * score.abs().amax(-1, keepdim=True)
            centred, size = torch.where(flat, 0.0, centred), torch.where(flat, 0.0, size)
            self._note(name, mean.squeeze(-1), size.squeeze(-1), usable.squeeze(-1), seen)
            components.append(centred * self._inverse_size(name, settings.time_bin).to(u.dtype))
        gain = self._combine(components, settings, advantage.group_spread)
        if config.shuffle_advantages:
            gain = gain.gather(-1, draws["order"].argsort(-1))
        log_rho = log_ratio(u, actions, radius)
        gradient, clipped = surrogate_gradient(log_rho, gain, actions, radius, config.clip_low, config.clip_high)
        seen["clipped"] = clipped.float().mean(-1)
        seen["ratio_variance"] = log_rho.var(-1, correction=0)
        return -gradient

    def _act(self, context: RewardContext, settings: Settings, draws: Draws) -> Actions:
        """Return the group of actions around the old policy's mean."""
        config, mean = self.config, context.mean
        if config.basis == "isotropic":
            steps = [tangent(step, mean) for step in draws["steps"].unbind(1)]
            frame = orthonormal_frame(mean, steps)
            # All C - 1 tangent directions are drawn from, and steps are as long as the informed basis' on
            # average.
            scale = (self._directions() / (self.width - 1)) ** 0.5
            coordinates = torch.stack(steps, dim=2) @ frame[:, :, 1:].transpose(2, 3) * scale
        else:
            directions: list[Tensor] = []
            for name in self._informed():
                if name in settings.weights:
                    preference = self._preference(name, mean, context, draws)
                    directions.append(_drop(preference, advantage.norm(preference).isfinite())[0])
                else:
                    directions.append(torch.zeros_like(mean))
            directions += draws["directions"].unbind(1)
            frame = orthonormal_frame(mean, directions)
            coordinates = draws["coordinates"]
        return sample_actions(frame, antithetic(coordinates, config.group), self.radius)

    def _combine(self, components: Sequence[Tensor], settings: Settings, length: advantage.Length) -> Tensor:
        return advantage.combine(
            components,
            list(settings.weights.values()),
            rule=self.config.advantage,
            sigma0=self.config.sigma0,
            length=length,
        )

    @staticmethod
    def _note(name: str, score: Tensor, size: Tensor, usable: Tensor, seen: dict[str, Observation]) -> None:
        seen[f"{name}/reward"] = (score, usable)
        # A token without any preference, such as all of them under a zero output layer, says nothing of the
        # size.
        seen[f"{name}/size"] = (size, size > 0)
        seen[f"{name}/dropped"] = (~usable).float()


def agreement(u: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Return ``cos(T y, T q)`` (B, N) for ``q`` tangent at ``u``, not finite where either has no length."""
    across = 1 - (y * u).sum(-1).square()
    length = across.clamp_min(0).sqrt() * torch.linalg.vector_norm(q, dim=-1)
    return (y * q).sum(-1) / length


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy whose weights are buffers: saved with the run, never trained."""
    copy = deepcopy(module)
    for part in copy.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if parameter is None else whole(parameter.detach()).clone())
    return copy


def _drop(values: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(usable, values, 0.0), usable
