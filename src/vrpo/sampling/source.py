"""A run as a source of images: its newest checkpoint's network, its settings, and what is drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vrpo.checkpoints import check_part, read_state
from vrpo.config import RunConfig, SampleConfig
from vrpo.config_load import explain, validate
from vrpo.decoding import decoder_of_state
from vrpo.devices import DTYPES
from vrpo.errors import ConfigError
from vrpo.files import load_into, load_tensors
from vrpo.models.transformer import DiffusionTransformer
from vrpo.runs import open_checkpoint
from vrpo.sampling.candidates import Selection, load_candidates
from vrpo.sampling.labels import LabelPolicy, sample_labels
from vrpo.sampling.sampler import ImageSampler


@dataclass(frozen=True)
class LoadedRun:
    """A run's network at its newest checkpoint, in the folder ``checkpoint``, ready to sample."""

    checkpoint: Path
    network: DiffusionTransformer
    config: RunConfig
    step: int
    images: int
    class_names: tuple[str, ...]
    weights_hash: str
    latents: dict[str, Any]


def load_run(run: Path, weights: Literal["ema", "raw"], device: torch.device) -> LoadedRun:
    """Load the network of a run's newest checkpoint, or of the checkpoint that ``run`` names itself.

    Raises:
        DataError: there is no run at that path.
        CheckpointError: it has no checkpoint, or one of another architecture.
    """
    record, folder = open_checkpoint(run)
    config = validate(record.config, str(record.path / "config.yaml"))
    state = read_state(folder)
    part = folder / f"{'ema' if weights == 'ema' else 'model'}.safetensors"
    check_part(part, state)
    network = DiffusionTransformer(**state["network"])
    load_into(network, load_tensors(part), str(part))
    network.to(device).eval().requires_grad_(False)
    return LoadedRun(
        checkpoint=folder,
        network=network,
        config=config,
        step=state["step"],
        images=state["images"],
        class_names=tuple(state["class_names"]),
        weights_hash=state.get("sha256", {}).get(part.name, ""),
        latents={name: state.get(name) for name in ("latents", "normaliser")},
    )


class RunSampler:
    """Draws images from a run by its own settings, or by ``settings`` over them."""

    def __init__(
        self,
        run: Path,
        settings: dict[str, Any],
        weights: Literal["ema", "raw"],
        device: torch.device,
        compile: bool = False,
        selection: Selection | None = None,
    ) -> None:
        """Load the run; with ``compile``, compile its network's blocks.

        With ``selection`` several trajectories begin for each image and one goes on.

        Raises:
            VrpoError: no run, no checkpoint, settings that do not fit, or a selection that the run cannot make.
        """
        self.loaded = load_run(run, weights, device)
        self.weights, self.compiled = weights, compile
        config = self.loaded.config
        try:
            merged = SampleConfig.model_validate({**config.sample.model_dump(), **settings})
        except ValidationError as error:
            raise ConfigError(f"sample.{explain(error)}") from error
        network = self.loaded.network
        decoder = decoder_of_state(
            self.loaded.latents, named=merged.decoder, any_decoder=merged.any_decoder, device=device
        )
        candidates = None
        if selection is not None:
            folder = self.loaded.checkpoint
            candidates = load_candidates(run, folder, config, network.num_classes, selection, device)
        self.sampler = ImageSampler(
            network, config, device=device, settings=merged, decoder=decoder, candidates=candidates
        )
        lower_weights(network, DTYPES[self.sampler.precision])
        if compile:
            network.compile_blocks(dynamic=False)

    def labels(self, count: int, policy: LabelPolicy, seed: int, classes: Sequence[int] = ()) -> Tensor | None:
        """Return the labels (B,) of the first ``count`` samples, of ``classes`` alone if given."""
        return sample_labels(range(count), self.loaded.network.num_classes, policy, seed, classes)

    def draw(
        self,
        count: int,
        policy: LabelPolicy,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``count`` images, uint8 (B, 3, H, W), and their labels (B,) or None."""
        labels = self.labels(count, policy, seed)
        told = None if progress is None else lambda done: progress(done, count)
        return torch.cat(list(self.sampler.batches(range(count), labels, seed, told))), labels

    def protocol(self, policy: LabelPolicy, seed: int) -> dict[str, Any]:
        """Return how images are made, as a number's protocol states it."""
        unconditional = not self.loaded.network.num_classes
        return {
            **self.sampler.protocol,
            "label_policy": "unconditional" if unconditional else policy,
            "weights": self.weights,
            "seed": seed,
        }

    def about(self, policy: LabelPolicy, seed: int, classes: Sequence[int] = ()) -> dict[str, Any]:
        """Return all that the pixels depend on, as JSON values; the label policy names the classes, if not all."""
        sampler, names = self.sampler, self.loaded.class_names
        protocol = self.protocol(policy, seed)
        if classes:
            named = (names[index] if index < len(names) else str(index) for index in classes)
            protocol["label_policy"] += f" over {' and '.join(named)}"
        return {
            **protocol,
            "classes": list(classes),
            "step": self.loaded.step,
            "weights_hash": self.loaded.weights_hash,
            "precision": sampler.precision,
            "compute_batch": sampler.compute_batch,
            "compiled": self.compiled,
            "device": sampler.device.type,
        }


@torch.no_grad()
def lower_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of products in the ``dtype`` that autocast would give them at every call."""
    if dtype == torch.float32:
        return
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
