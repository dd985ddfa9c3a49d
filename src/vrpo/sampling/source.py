"""A run as a source of images: its newest checkpoint's network, its settings, and what is drawn from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from vrpo.config import RunConfig, SampleConfig
from vrpo.config_load import explain, validate
from vrpo.errors import ConfigError
from vrpo.files import load_into, load_tensors
from vrpo.models.transformer import DiffusionTransformer
from vrpo.runs import Run
from vrpo.sampling.labels import LabelPolicy, sample_labels
from vrpo.sampling.sampler import ImageSampler


@dataclass(frozen=True)
class LoadedRun:
    """A run's network at its newest checkpoint, ready to sample."""

    network: DiffusionTransformer
    config: RunConfig
    step: int
    images: int
    class_names: tuple[str, ...]


def load_run(run: Path, weights: Literal["ema", "raw"], device: torch.device) -> LoadedRun:
    """Load the newest checkpoint's network of a run.

    Raises:
        DataError: there is no run at that path.
        CheckpointError: it has no checkpoint, or one of another architecture.
    """
    record = Run(run)
    folder = record.latest_checkpoint()
    config = validate(record.config, str(run / "config.yaml"))
    state = json.loads((folder / "state.json").read_text("utf-8"))
    network = DiffusionTransformer(**state["network"])
    part = folder / f"{'ema' if weights == 'ema' else 'model'}.safetensors"
    load_into(network, load_tensors(part), str(part))
    network.to(device).eval().requires_grad_(False)
    return LoadedRun(network, config, state["step"], state["images"], tuple(state["class_names"]))


class RunSampler:
    """Draws images from a run by its own settings, or by ``settings`` over them."""

    def __init__(
        self, run: Path, settings: dict[str, Any], weights: Literal["ema", "raw"], device: torch.device
    ) -> None:
        """Load the run.

        Raises:
            VrpoError: no run, no checkpoint, or a sampler that does not fit.
        """
        self.loaded = load_run(run, weights, device)
        self.weights = weights
        config = self.loaded.config
        try:
            merged = SampleConfig.model_validate({**config.sample.model_dump(), **settings})
        except ValidationError as error:
            raise ConfigError(f"sample.{explain(error)}") from error
        self.sampler = ImageSampler(self.loaded.network, config, device=device, settings=merged)

    def draw(
        self,
        count: int,
        policy: LabelPolicy,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``count`` images, uint8 (B, 3, H, W), and their labels (B,) or None."""
        labels = sample_labels(range(count), self.loaded.network.num_classes, policy, seed)
        told = None if progress is None else lambda done: progress(done, count)
        return torch.cat(list(self.sampler.batches(range(count), labels, seed, told))), labels

    def protocol(self, policy: LabelPolicy, seed: int) -> dict[str, Any]:
        """Return how ``draw`` makes its images."""
        unconditional = not self.loaded.network.num_classes
        return {
            **self.sampler.protocol,
            "label_policy": "unconditional" if unconditional else policy,
            "weights": self.weights,
            "seed": seed,
        }
