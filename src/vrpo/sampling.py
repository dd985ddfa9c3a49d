"""Images from a network: labels, noise and pixels of sample i are functions of (seed, i) alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vrpo.config import DiffusionConfig, RunConfig, SampleConfig
from vrpo.config_load import explain, validate
from vrpo.data.transforms import to_uint8
from vrpo.diffusion.losses import Denoising, FlowMatching, NoisePrediction
from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import get_path
from vrpo.diffusion.samplers import DIT_SAMPLERS, FLOW_SAMPLERS, sample, sample_dit
from vrpo.errors import ConfigError, nearest
from vrpo.files import load_into, load_tensors
from vrpo.models.transformer import DiffusionTransformer
from vrpo.randomness import STREAM_LABELS, mix
from vrpo.runs import Run

LabelPolicy = Literal["balanced", "random"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_denoising(kind: str, config: DiffusionConfig) -> Denoising:
    """Return what a transformer of ``kind`` ("SiT" or "DiT") learns to denoise."""
    if kind == "DiT":
        return NoisePrediction()
    return FlowMatching(get_path(config.path), config.time, config.logit_mean, config.logit_std)


def check_sampler(kind: str, name: str) -> None:
    """Raise ConfigError if the sampler ``name`` does not fit a transformer of ``kind``."""
    choices = DIT_SAMPLERS if kind == "DiT" else FLOW_SAMPLERS
    if name not in choices:
        raise ConfigError(f"sample.sampler '{name}' does not fit {kind}: {nearest(name, choices)}")


def sample_labels(indices: Sequence[int], num_classes: int, policy: LabelPolicy, seed: int) -> Tensor | None:
    """Return the class labels (B,) of samples ``indices``; None where there are no classes."""
    if not num_classes:
        return None
    if policy == "balanced":
        return torch.tensor([index % num_classes for index in indices])
    return torch.tensor([mix(seed, STREAM_LABELS, index) % num_classes for index in indices])


class ImageSampler:
    """Draws images from a transformer by one protocol.

    Batches are always run at full size, the last one padded, so that an image does not depend on how many are asked
    for.
    """

    def __init__(
        self,
        network: DiffusionTransformer,
        config: RunConfig,
        *,
        device: torch.device | str,
        settings: SampleConfig | None = None,
    ) -> None:
        """Take a network, the run's configuration and, if they differ from its own, sampling settings."""
        self.settings = settings or config.sample
        check_sampler(network.kind, self.settings.sampler)
        self.network = network
        self.config = config
        self.device = torch.device(device)
        self._dtype = DTYPES[config.train.precision]
        self._path = get_path(config.diffusion.path)

    @property
    def protocol(self) -> dict[str, Any]:
        """The part of a number's protocol that sampling decides."""
        settings = self.settings
        return {
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_interval": list(settings.guidance_interval),
            "decoder": "none (pixels)",
        }

    def images(self, indices: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        """Return samples ``indices`` with ``labels`` (B,) as uint8 (B, 3, H, W) on the CPU."""
        parts = list(self.batches(indices, labels, seed))
        return torch.cat(parts)

    def batches(
        self,
        indices: Sequence[int],
        labels: Tensor | None,
        seed: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the images of ``images`` batch by batch; ``on_batch`` is told how many are done."""
        size = min(self.settings.batch_size, len(indices))
        for start in range(0, len(indices), size):
            part = list(indices[start : start + size])
            count = len(part)
            part += [part[-1]] * (size - count)
            part_labels = None
            if labels is not None:
                part_labels = labels[start : start + count]
                part_labels = torch.cat([part_labels, part_labels[-1:].expand(size - count)]).to(self.device)
            yield to_uint8(self._latents(part, part_labels, seed))[:count].cpu()
            if on_batch is not None:
                on_batch(start + count)

    def _latents(self, indices: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        network = self.network
        shape = (network.in_channels, network.input_size, network.input_size)
        noise = SampleNoise(seed, indices, shape, self.device)
        settings = self.settings
        options: dict[str, Any] = {
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_interval": settings.guidance_interval,
            "null_label": network.num_classes if network.num_classes else None,
            "noise_source": noise,
            "state_dtype": torch.float32 if self.device.type == "mps" else torch.float64,
        }
        if network.kind == "DiT":
            return sample_dit(self._call, noise.initial(), labels, **options)
        return sample(self._call, noise.initial(), labels, path=self._path, **options)

    def _call(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.network(x, t, labels).float()


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


def image_format(out: Path) -> Literal["png", "npz", "folder"]:
    """Return what ``write_images`` makes of a path.

    Raises:
        ConfigError: a file of another kind.
    """
    if out.suffix in ("", ".png", ".npz") or out.is_dir():
        return {".png": "png", ".npz": "npz"}.get(out.suffix, "folder")  # type: ignore[return-value]
    raise ConfigError(f"--out {out} is neither a folder nor .png nor .npz: choose one of the three.")


def write_images(images: Tensor, labels: Tensor | None, out: Path, columns: int) -> None:
    """Write uint8 images (B, 3, H, W) as a PNG grid, an ADM npz (``arr_0`` NHWC, ``arr_1`` labels) or a PNG folder."""
    from PIL import Image

    kind = image_format(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pixels = images.permute(0, 2, 3, 1).numpy()
    if kind == "png":
        Image.fromarray(grid_image(images, columns)).save(out)
    elif kind == "npz":
        arrays = {"arr_0": pixels} if labels is None else {"arr_0": pixels, "arr_1": labels.numpy()}
        np.savez(out, **arrays)  # type: ignore[arg-type]
    else:
        out.mkdir(exist_ok=True)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(out / f"{index:06d}.png")


def grid_image(images: Tensor, columns: int) -> np.ndarray:
    """Arrange uint8 images (B, 3, H, W) row by row into one array (rows*H, columns*W, 3), with a 1 px gap."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((rows, columns, channels, height + 1, width + 1), 255, dtype=torch.uint8)
    sheet.view(-1, channels, height + 1, width + 1)[:count, :, :-1, :-1] = images
    return sheet.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1].numpy()
