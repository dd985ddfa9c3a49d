"""Rewards of the representation policy. Each depends on the action, for a constant one has no group
advantage.

A reward is a score of actions and, where it has a gradient, the direction a token prefers. To add one,
register a function, or a subclass of ``Reward`` where it also has a preference or parameters::

    @register_reward("sparse")
    def sparse(actions, context):
        return -actions.tensor().abs().mean(-1)

and give it a weight: ``align.vrpo.rewards: {sparse: 0.2}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch
from vrpo.alignment.policy import Actions
from vrpo.errors import ConfigError, nearest


@dataclass(frozen=True)
class RewardContext:
    """What a reward may see of one micro-batch, at one depth and for one encoder.

    Attributes:
        mean: (B, N, C) unit vectors, the policy's mean: preferences are taken here.
        target: (B, N, C) unit vectors y, the encoder's tokens of the clean image.
        improvement: (B, N, C), ``q = -J g``: the direction in which moving ``u`` lowers the denoising loss
            to first order; None unless a reward sets ``reads_gradient``.
        batch: the micro-batch: times, clean latents, images.
        memo: intermediate results that a reward's score and preference share.
    """

    mean: Tensor
    target: Tensor
    improvement: Tensor | None
    batch: AlignmentBatch
    memo: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``, computed at the first call with this key."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


class Reward(nn.Module):
    """A reward of actions; a subclass is built with the encoder's channels C.

    Class attributes:
        reads_gradient: whether it reads ``context.improvement``, which costs a product through the projector.
        reads_images: whether it may read ``context.batch.images``, which cost reading where latents are trained on and
            tokens are cached.
        differentiable: whether it has a preference; one without can only be used in sampled mode.
    """

    reads_gradient = False
    reads_images = True
    differentiable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        """Return every action's reward, (B, N, G)."""
        raise NotImplementedError

    def preference(self, context: RewardContext) -> Tensor:
        """Return the reward's gradient (B, N, C) at ``context.mean``; its tangent part counts."""
        raise NotImplementedError

    def loss(self, context: RewardContext) -> Tensor | None:
        """Return a scalar that trains the reward's own parameters with the trunk, or None.

        ``context.mean`` carries no gradient and ``context.improvement`` is None.
        """
        return None

    def update(self) -> None:
        """Advance running statistics, once after each optimiser step."""


Score = Callable[[Actions, RewardContext], Tensor]
Registered = TypeVar("Registered", bound="type[Reward] | Score")

_REGISTRY: dict[str, Callable[[int], Reward]] = {}


def register_reward(name: str) -> Callable[[Registered], Registered]:
    """Return a decorator that registers a ``Reward`` class, or a function ``(actions, context) -> (B, N,
    G)``.
    """

    def register(reward: Registered) -> Registered:
        if isinstance(reward, type):
            _REGISTRY[name] = reward
        else:
            _REGISTRY[name] = lambda width: _Scored(width, reward)
        return reward

    return register


def build_reward(name: str, width: int) -> Reward:
    """Return the reward registered as ``name`` for an encoder of ``width`` channels.

    Raises ConfigError for a name that is not registered.
    """
    if name not in _REGISTRY:
        raise ConfigError(
            f"align.vrpo.rewards names '{name}', which is not registered (import the module that calls "
            f"register_reward first): {nearest(name, sorted(_REGISTRY))}"
        )
    return _REGISTRY[name](width)


class _Scored(Reward):
    """A registered function: a score without a gradient."""

    differentiable = False

    def __init__(self, width: int, function: Score) -> None:
        super().__init__(width)
        self.function = function

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        return self.function(actions, context)


@register_reward("semantic")
class Semantic(Reward):
    """``<a, y>``: agreement with the encoder's token of the same patch."""

    reads_images = False

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        """Return the cosine of every action with its target."""
        return actions.dot(context.target)

    def preference(self, context: RewardContext) -> Tensor:
        """Return ``y``."""
        return context.target


@register_reward("relational")
class Relational(Reward):
    """``-(a - y)' C (a - y)``, ``C = y'y / N`` over the image's tokens.

    An action should agree with every encoder token of the image as much as its own target does. With no
    more tokens than channels, C is applied as two products with ``y``; only otherwise is the (C, C) matrix
    formed.
    """

    reads_images = False

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        """Return minus the mean squared difference of agreement over the image's tokens."""
        if actions.frame.shape[2] == 1:
            return ((context.mean - context.target) * self.preference(context)).sum(-1, keepdim=True) / 2
        frame = torch.cat([actions.frame, context.target.unsqueeze(2)], dim=2)
        offset = torch.cat([actions.weights, -torch.ones_like(actions.weights[..., :1])], dim=-1)
        gram = frame @ self._metric(frame.flatten(1, 2), context.target).view_as(frame).transpose(2, 3)
        return -((offset @ gram) * offset).sum(-1)

    def preference(self, context: RewardContext) -> Tensor:
        """Return ``-2 C (u - y)``."""
        return context.once("relational", lambda: -2 * self._metric(context.mean - context.target, context.target))

    @staticmethod
    def _metric(vectors: Tensor, y: Tensor) -> Tensor:
        """Return ``C v`` for vectors (B, M, C)."""
        tokens, width = y.shape[1:]
        if tokens <= width:
            return (vectors @ y.transpose(1, 2)) @ y / tokens
        return vectors @ (y.transpose(1, 2) @ y / tokens)


@register_reward("fidelity")
class Fidelity(Reward):
    """``<q, a>``, ``q = -J g``: the first-order fall of the denoising loss that the action brings
    (docs/method.md).
    """

    reads_gradient = True
    reads_images = False

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        """Return the fall of the token's denoising loss."""
        assert context.improvement is not None
        return actions.dot(context.improvement)

    def preference(self, context: RewardContext) -> Tensor:
        """Return ``q``."""
        assert context.improvement is not None
        return context.improvement
