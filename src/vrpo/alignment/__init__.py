"""Alignment objectives: what is added to denoising so that the trunk sees what an encoder sees."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vrpo.alignment.aligner import Aligner
    from vrpo.alignment.rewards import Reward, register_reward

__all__ = ["Aligner", "Reward", "register_reward"]

_HOMES = {"Aligner": "aligner", "Reward": "rewards", "register_reward": "rewards"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
