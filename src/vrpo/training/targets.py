"""Alignment targets of a batch: the frozen encoders' tokens, computed online or read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vrpo.config import EncoderConfig
from vrpo.data.loader import Batch
from vrpo.data.shards import ShardedDataset
from vrpo.files import load_tensors, save_tensors
from vrpo.vision.cache import TokenCache
from vrpo.vision.encoders import Encoder, load_encoder

MEAN_IMAGES = 512

Say = Callable[[str], None]


class Targets:
    """The encoders of a run and, for those that ask for it, their mean token over the data.

    Convolutional features are non-negative after their last activation, so any two of their tokens have a large
    cosine; subtracting the mean token over the data leaves what differs between tokens. Vision transformers are taken
    as they are, as REPA does.
    """

    def __init__(
        self,
        configs: Sequence[EncoderConfig],
        dataset: ShardedDataset,
        *,
        tokens: int,
        flip: bool,
        device: torch.device,
        say: Say,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.device = device
        self.encoders: list[Encoder] = []
        self._caches: list[TokenCache | None] = []
        self._centred: list[bool] = []
        for config in configs:
            encoder = load_encoder(
                config.name,
                weights=config.weights,
                grid=isqrt(tokens),
                feature=config.feature,
                input_size=config.input_size,
                device=device,
                dtype={"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[config.precision],
                allow_resample=config.resample,
            )
            if encoder.resampled:
                say(
                    f"Encoder {encoder.name}: its {encoder.native_grid}x{encoder.native_grid} tokens at "
                    f"{encoder.input_size} px are resampled (bicubic) to the trunk's {encoder.grid}x{encoder.grid}."
                )
            self.encoders.append(encoder)
            self._centred.append(encoder.family == "conv" if config.center is None else config.center)
            cache = self._cache(encoder, dataset, flip, config.cache_limit, say, progress) if config.cache else None
            self._caches.append(cache)
        self.means: list[Tensor | None] = [None] * len(self.encoders)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C_e of each encoder."""
        return tuple(encoder.width for encoder in self.encoders)

    def fit_means(self, dataset: ShardedDataset, file: Path, resumed: bool) -> None:
        """Compute the mean tokens from rows spread over the data, or read those that a resumed run began with."""
        wanted = [index for index, centred in enumerate(self._centred) if centred]
        if not wanted:
            return
        if resumed and file.is_file():
            stored = load_tensors(file)
        else:
            rows = np.unique(np.linspace(0, len(dataset) - 1, MEAN_IMAGES).astype(np.int64))
            stored = {f"mean.{index}": self._mean(index, dataset, rows) for index in wanted}
            unfinished = file.with_name(f".{file.name}.tmp")
            save_tensors(unfinished, stored)
            unfinished.replace(file)
        for index in wanted:
            self.means[index] = stored[f"mean.{index}"].to(self.device)

    def __call__(self, pixels: Tensor, indices: np.ndarray, flipped: np.ndarray) -> tuple[Tensor, ...]:
        """Return each encoder's tokens (B, N, C_e) float32 of uint8 images (B, 3, H, W), mean token subtracted.

        ``pixels`` are as the trunk sees them, mirrored where ``flipped``; ``indices`` are their rows.
        """
        found = []
        for encoder, cache, mean in zip(self.encoders, self._caches, self.means, strict=True):
            if cache is not None:
                tokens = cache.read(indices, flipped).to(self.device, non_blocking=True).float()
            else:
                tokens = encoder.tokens(pixels)
            found.append(tokens if mean is None else tokens - mean)
        return tuple(found)

    def of_batch(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the targets of a loader's batch whose ``pixels`` are on the device already."""
        return self(pixels, batch.indices, batch.flipped.numpy())

    def online(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the targets of images that are not rows of the training data."""
        found = [encoder.tokens(pixels) for encoder in self.encoders]
        return tuple(tokens if mean is None else tokens - mean for tokens, mean in zip(found, self.means, strict=True))

    def _mean(self, index: int, dataset: ShardedDataset, rows: np.ndarray) -> Tensor:
        total, count = torch.zeros((), device=self.device), 0
        for part in np.array_split(rows, max(1, len(rows) // 64)):
            cache = self._caches[index]
            if cache is not None:
                tokens = cache.read(part, np.zeros(len(part), dtype=bool)).to(self.device).float()
            else:
                tokens = self.encoders[index].tokens(dataset.read(part)[0].to(self.device))
            total = total + tokens.double().sum((0, 1))
            count += tokens.shape[0] * tokens.shape[1]
        return (total / count).float()

    @staticmethod
    def _cache(
        encoder: Encoder,
        dataset: ShardedDataset,
        flip: bool,
        limit: float,
        say: Say,
        progress: Callable[[str, int, int], None] | None,
    ) -> TokenCache:
        cache = TokenCache(dataset.path / "tokens", encoder, dataset, flips=flip)
        if not cache.complete:
            cache.check_room(limit)
            say(f"Caching the tokens of {encoder.name}: {cache.bytes / 2**30:.2f} GiB at {cache.folder}.")
            cache.build(progress=None if progress is None else lambda done, of: progress("tokens", done, of))
        return cache
