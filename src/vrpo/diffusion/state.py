"""The state of a generation: an image and, in some models, a representation token beside it."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What is noised and denoised together, each part in a shape of its own.

    Attributes:
        image: (B, C, H, W) latents.
        token: (B, C_c), or None where the model has no representation token.
    """

    image: Tensor
    token: Tensor | None = None


class Layout(NamedTuple):
    """The shapes of a state's parts for one sample, and how they lie side by side in one vector.

    Paths are linear and samplers act on every number alike, guidance included, so a state with several parts is
    integrated as one vector (B, n), in which the image comes first. A state of one part stays as it is.

    Attributes:
        image: (C, H, W).
        token_width: C_c, or 0 where there is no token.
    """

    image: tuple[int, int, int]
    token_width: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample as samplers see it."""
        return (prod(self.image) + self.token_width,) if self.token_width else self.image

    def join(self, state: State) -> Tensor:
        """Return the parts as one tensor (B, *shape)."""
        if state.token is None:
            return state.image
        return torch.cat([state.image.flatten(1), state.token], dim=1)

    def split(self, joined: Tensor) -> State:
        """Return the parts of a tensor (B, *shape)."""
        if not self.token_width:
            return State(joined)
        image, token = joined.split([prod(self.image), self.token_width], dim=1)
        return State(image.unflatten(1, self.image), token)
