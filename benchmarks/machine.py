"""Which machine a number was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a time depends on beside the program: device, processor, threads, versions and how busy it was."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def slug(machine: dict[str, Any]) -> str:
    """Return a machine's name for a file: its device, and its threads where the processor does the work."""
    name = str(machine["device"])
    if machine["cuda"] is None:
        name += f"-{machine['threads']}-threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
