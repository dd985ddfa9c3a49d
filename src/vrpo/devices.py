"""The devices and the types of numbers that names stand for."""

from __future__ import annotations

import torch

from vrpo.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device that ``name`` ("auto", "cpu", "cuda", "cuda:1") stands for.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"train.device '{name}' is not available here: use auto or cpu.") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are those of the current device
    return device
