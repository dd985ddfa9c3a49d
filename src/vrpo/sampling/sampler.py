"""Images from a network: pixels of sample i are a function of (seed, i) and of its label alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vrpo.config import DiffusionConfig, RunConfig, SampleConfig
from vrpo.data.transforms import to_uint8
from vrpo.diffusion.losses import Denoising, FlowMatching, NoisePrediction
from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import get_path
from vrpo.diffusion.samplers import DIT_SAMPLERS, FLOW_SAMPLERS, sample, sample_dit
from vrpo.errors import ConfigError, nearest
from vrpo.models.transformer import DiffusionTransformer

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
