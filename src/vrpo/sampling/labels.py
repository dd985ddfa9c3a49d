"""Class labels of samples: the label of sample i is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vrpo.errors import ConfigError, nearest
from vrpo.randomness import STREAM_LABELS, mix

LabelPolicy = Literal["balanced", "random"]


def sample_labels(
    indices: Sequence[int], num_classes: int, policy: LabelPolicy, seed: int, classes: Sequence[int] = ()
) -> Tensor | None:
    """Return the class labels (B,) of samples ``indices``, of ``classes`` alone if given; None without classes."""
    if not num_classes:
        return None
    chosen = classes or range(num_classes)
    if policy == "balanced":
        return torch.tensor([chosen[index % len(chosen)] for index in indices])
    return torch.tensor([chosen[mix(seed, STREAM_LABELS, index) % len(chosen)] for index in indices])


def find_class(wanted: str, names: Sequence[str], num_classes: int) -> int:
    """Return the class called ``wanted``: one of ``names``, a synonym between their commas, or its number.

    Case does not count, nor does an underscore for a space.

    Raises:
        ConfigError: the model has no classes, or none of that name; the nearest is named.
    """
    if not num_classes:
        raise ConfigError(f"--class '{wanted}' cannot be drawn, because the model has no classes: leave it out.")
    synonyms: dict[str, int] = {}
    for index, name in enumerate(names):
        for synonym in (name, *name.split(",")):
            synonyms.setdefault(_plain(synonym), index)
    found = synonyms.get(_plain(wanted))
    if found is not None:
        return found
    if wanted.isdecimal() and int(wanted) < num_classes:
        return int(wanted)
    if not names:
        raise ConfigError(
            f"--class '{wanted}' is no class of this model, which knows no names: give a number from 0 to "
            f"{num_classes - 1}."
        )
    choices = [synonym for synonym in synonyms if "," not in synonym]
    close = nearest(_plain(wanted), choices)
    if not close.startswith("did you mean"):
        close = f"{close.rstrip('.')}, or a number from 0 to {num_classes - 1}."
    raise ConfigError(f"there is no class '{wanted}': {close}")


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
