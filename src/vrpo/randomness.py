"""Random numbers as pure functions of a seed and a position, so that a resumed run repeats the uninterrupted one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1

# Streams keep draws for different purposes independent under one seed.
STREAM_ORDER = 1
STREAM_FLIP = 2
STREAM_NOISE = 3
STREAM_INIT = 4
STREAM_SAMPLE = 5
STREAM_VALIDATION = 6
STREAM_OBJECTIVE = 7
STREAM_LABELS = 8
STREAM_LATENTS = 9
STREAM_SELECT = 10


def mix(*values: int) -> int:
    """Hash integers to 64 bits, the same on every platform (SplitMix64 finaliser, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def step_generator(seed: int, step: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device`` whose draws depend on (seed, stream, step) alone."""
    import torch

    # Seeds are kept below 2**63: the CUDA generator takes a signed 64-bit seed.
    return torch.Generator(device=device).manual_seed(mix(seed, stream, step) >> 1)
