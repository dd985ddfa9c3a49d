"""Class labels of samples: the label of sample i is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vrpo.randomness import STREAM_LABELS, mix

LabelPolicy = Literal["balanced", "random"]


def sample_labels(indices: Sequence[int], num_classes: int, policy: LabelPolicy, seed: int) -> Tensor | None:
    """Return the class labels (B,) of samples ``indices``; None where there are no classes."""
    if not num_classes:
        return None
    if policy == "balanced":
        return torch.tensor([index % num_classes for index in indices])
    return torch.tensor([mix(seed, STREAM_LABELS, index) % num_classes for index in indices])
