"""Small networks whose output depends on time and class, as if trained, and runs that hold one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vrpo.checkpoints import Checkpoint
from vrpo.config_load import to_yaml, validate
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.training.checkpoint import save_checkpoint

NAMES = ("tabby, tabby cat", "golden_retriever", "Tench", "7")


def network(kind: str = "SiT", num_classes: int = 4) -> DiffusionTransformer:
    built = build_transformer(f"{kind}-N/4", input_size=8, in_channels=3, num_classes=num_classes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return built.eval()


def make_run(folder: Path, num_classes: int = 4, step: int = 8, **sample: Any) -> Path:
    """Write a run with a checkpoint, whose averaged weights differ from its raw ones."""
    folder.mkdir()
    settings = {"steps": 2, "batch_size": 8, "compute_batch": 4, **sample}
    config = {"name": "small", "model": {"name": "SiT-N/4"}, "data": {"conditional": num_classes > 0}}
    (folder / "config.yaml").write_text(to_yaml(validate({**config, "sample": settings}, "the test")))
    tensors: dict[str, dict[str, torch.Tensor]] = {"objective": {}, "optimizer": {}}
    for part in ("model", "ema"):
        torch.manual_seed(step + len(part))
        trunk = network(num_classes=num_classes)
        tensors[part] = trunk.state_dict()
    state = {"step": step, "images": 8 * step, "network": trunk.config, "class_names": list(NAMES[:num_classes])}
    save_checkpoint(folder, Checkpoint(tensors, state), keep=1)
    return folder
