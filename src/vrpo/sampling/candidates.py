"""Reward-guided sampling: of several trajectories of an image, the one goes on whose representation suits its class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrpo.alignment.build import default_depth
from vrpo.alignment.projector import projector_of, unit
from vrpo.alignment.prototypes import PREFIX
from vrpo.config import RunConfig
from vrpo.diffusion.samplers import TIME_TOLERANCE
from vrpo.errors import CheckpointError, ConfigError
from vrpo.files import load_tensors
from vrpo.models.taps import Taps
from vrpo.models.transformer import SIZES, parse_model_name
from vrpo.randomness import STREAM_SELECT, mix

Rule = Literal["best", "resample"]


@dataclass(frozen=True)
class Selection:
    """How many trajectories begin for each image, at which time one is chosen, and how.

    Attributes:
        count: G, trajectories an image.
        time: after the first step that ends at or below this time (1 = noise, 0 = data) one goes on.
        rule: the best, or one drawn with probability softmax of the group-relative advantage.
    """

    count: int
    time: float
    rule: Rule

    @property
    def protocol(self) -> dict[str, Any]:
        """Return what to state beside a number."""
        return {"candidates": self.count, "time": self.time, "rule": self.rule}


@dataclass(frozen=True)
class Head:
    """Where a representation is read (the block ``depth``), its projector, and the class prototypes (K, C_e)."""

    depth: int
    projector: nn.Module
    prototypes: Tensor


class Candidates:
    """Scores trajectories by what the network itself represents of them, which costs no further evaluation.

    A trajectory's score is the cosine between the mean over its tokens of the projected unit vectors and the prototype
    of its class, both less the mean prototype, averaged over the heads. It is taken from the conditional half of the
    last evaluation before the choice.
    """

    def __init__(self, selection: Selection, heads: Sequence[Head]) -> None:
        self.selection = selection
        self.heads = tuple(heads)
        self._tokens: dict[int, Tensor] = {}

    @property
    def taps(self) -> Taps:
        """Return taps that keep the newest tokens of every head's block."""

        def keeper(depth: int) -> Callable[[Tensor], Tensor]:
            def keep(tokens: Tensor) -> Tensor:
                self._tokens[depth] = tokens
                return tokens

            return keep

        return Taps(tokens={head.depth: keeper(head.depth) for head in self.heads})

    def chooser(
        self, seed: int, indices: Sequence[int], labels: Tensor
    ) -> Callable[[int, float, Tensor], Tensor | None]:
        """Return the function that a sampler calls after each step, for a batch of samples with ``labels`` (B,).

        It returns, once, the rows (B,) of the (B G) trajectories that go on.
        """
        chosen = False

        def choose_at(step: int, time: float, state: Tensor) -> Tensor | None:
            nonlocal chosen
            if chosen or time > self.selection.time + TIME_TOLERANCE:
                return None
            chosen = True
            scores = self.scores(labels)
            places = choose(scores, self.selection.rule, seed, indices).to(labels.device)
            return torch.arange(len(places), device=places.device) * self.selection.count + places

        return choose_at

    def scores(self, labels: Tensor) -> Tensor:
        """Return the scores (B, G) of the newest tokens, for samples with ``labels`` (B,)."""
        found = []
        for head in self.heads:
            rows = len(labels) * self.selection.count
            # under guidance the unconditional half comes second
            mean = unit(head.projector(self._tokens[head.depth][:rows])).mean(1)
            # a single class has nothing to differ from
            centre = head.prototypes.mean(0) if len(head.prototypes) > 1 else torch.zeros_like(head.prototypes[0])
            wanted = (head.prototypes[labels] - centre).repeat_interleave(self.selection.count, dim=0)
            found.append(F.cosine_similarity(mean - centre, wanted, dim=-1))
        return torch.stack(found).mean(0).view(len(labels), self.selection.count)


def choose(scores: Tensor, rule: Rule, seed: int, indices: Sequence[int]) -> Tensor:
    """Return which of each group's trajectories goes on, (B,) on the CPU, from scores (B, G).

    A draw is a function of (seed, sample index) and of the group's scores alone.
    """
    scores = scores.double().cpu()
    if rule == "best":
        return scores.argmax(1)
    weights = selection_weights(scores).cumsum(1)
    draws = torch.tensor([mix(seed, STREAM_SELECT, index) / 2**64 for index in indices], dtype=torch.float64)
    return (weights < draws[:, None]).sum(1).clamp_max(scores.shape[1] - 1)


def selection_weights(scores: Tensor) -> Tensor:
    """Return the probabilities (B, G) of a group's trajectories: softmax of (score - mean) / standard deviation."""
    spread = scores.std(1, keepdim=True, correction=0)
    return ((scores - scores.mean(1, keepdim=True)) / spread.clamp_min(1e-12)).softmax(1)


def load_candidates(
    run: Path, checkpoint: Path, config: RunConfig, num_classes: int, selection: Selection, device: torch.device
) -> Candidates:
    """Return what chooses between trajectories, from the projectors and prototypes in a run's ``checkpoint``.

    Raises:
        ConfigError: the run has no classes, or no projector.
        CheckpointError: its checkpoint holds no prototypes.
    """
    what = f"{selection.count} candidates are compared by"
    if not num_classes:
        raise ConfigError(f"{what} the prototype of their class, and {run} has no classes: use --candidates 1.")
    path = checkpoint / "objective.safetensors"
    tensors = load_tensors(path)
    projectors: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        _, found, rest = f".{name}".partition(".projectors.")
        if found:
            index, _, own = rest.partition(".")
            projectors.setdefault(int(index), {})[own] = value
    if not projectors:
        raise ConfigError(
            f"{what} their projected representation, and {run} was trained with align.objective "
            f"{config.align.objective}, which has no projector: use --candidates 1, or a run with repa or vrpo."
        )
    means = [tensors.get(f"{PREFIX}mean.{index}") for index in range(len(config.encoders))]
    if any(mean is None for mean in means):
        raise CheckpointError(
            f"{path} holds no class prototypes, by which candidates are compared: go on training {run} with a version "
            "that keeps them, or use --candidates 1."
        )
    _, size, _ = parse_model_name(config.model.name)
    depths = config.align.depth or (default_depth(size, SIZES[size].depth),)
    places = [(depth, mean) for depth in depths for mean in means if mean is not None]
    heads = [
        Head(depth, projector_of(projectors[index]).to(device).requires_grad_(False), mean.to(device))
        for index, (depth, mean) in enumerate(places)
    ]
    return Candidates(selection, heads)
