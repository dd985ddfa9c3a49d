"""Alignment targets of a batch: the frozen encoders' tokens, computed online or read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vrpo.alignment.objective import TargetBatch
from vrpo.config import EncoderConfig
from vrpo.data.loader import Batch
from vrpo.data.shards import ShardedDataset
from vrpo.devices import DTYPES
from vrpo.files import load_tensors, replacing, save_tensors
from vrpo.vision.backbone import EncoderOutput
from vrpo.vision.cache import TokenCache
from vrpo.vision.encoders import Encoder, load_encoder
from vrpo.wording import sized

MEAN_IMAGES = 512

SMALLEST_SCALE = 1e-6

Say = Callable[[str], None]


class Standard(NamedTuple):
    """How a part of an encoder's answer is brought to mean 0 and mean square 1: ``mean`` (C,) and ``scale`` ()."""

    mean: Tensor
    scale: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Return standardised ``values`` (..., C)."""
        return (values - self.mean) / self.scale


class Targets:
    """The encoders of a run, the mean tokens of those that ask for it, and the scales of what else is read of them.

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
        class_token: bool = False,
        keys_values: bool = False,
        device: torch.device,
        say: Say,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Load the encoders; ``class_token`` and ``keys_values``: the objective reads these of them too."""
        self.device = device
        self._standardised = (("keys", "values") if keys_values else ()) + (("class_token",) if class_token else ())
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
                dtype=None if config.precision == "auto" else DTYPES[config.precision],
                allow_resample=config.resample,
                keys_values=keys_values,
                class_token=class_token,
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
        self._standards: list[dict[str, Standard]] = [{} for _ in self.encoders]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C_e of each encoder."""
        return tuple(encoder.width for encoder in self.encoders)

    @property
    def fingerprints(self) -> list[str]:
        """What tells each encoder from any other."""
        return [encoder.fingerprint for encoder in self.encoders]

    @property
    def caches(self) -> list[TokenCache]:
        """The token caches of the encoders that have one, whose rows a batch must hold."""
        return [cache for cache in self._caches if cache is not None]

    @property
    def reads_pixels(self) -> bool:
        """Whether an encoder is online, so that a batch must hold its images."""
        return None in self._caches

    @property
    def class_width(self) -> int:
        """Channels of the first encoder's class token."""
        return self.encoders[0].width

    @property
    def key_value_widths(self) -> tuple[int, int]:
        """Channels of the first encoder's keys and of its values, 0 where they are not read."""
        return (self.encoders[0].key_width, self.encoders[0].value_width) if self.encoders else (0, 0)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare every ``world_size``-th part of the token caches with its hash, beginning at part ``rank``.

        Raises:
            DataError: a part differs; it is named.
        """
        for cache in self.caches:
            cache.verify(rank, world_size)

    def fit_means(self, dataset: ShardedDataset, file: Path, resumed: bool) -> None:
        """Measure means and scales on rows spread over the data, or read those that a resumed run began with."""
        if not any(self._centred) and not self._standardised:
            return
        if resumed and file.is_file():
            stored = load_tensors(file, sealed=True)
        else:
            rows = np.unique(np.linspace(0, len(dataset) - 1, MEAN_IMAGES).astype(np.int64))
            stored = {}
            for index in range(len(self.encoders)):
                stored |= {f"{name}.{index}": value for name, value in self._fit(index, dataset, rows).items()}
            with replacing(file) as unfinished:
                save_tensors(unfinished, stored, seal=True)
        for index, centred in enumerate(self._centred):
            if centred:
                self.means[index] = stored[f"mean.{index}"].to(self.device)
        for index, standards in enumerate(self._standards):
            for name in self._standardised:
                parts = (stored[f"{name}.{part}.{index}"].to(self.device) for part in ("mean", "scale"))
                standards[name] = Standard(*parts)

    def of_batch(self, batch: Batch, pixels: Tensor | None) -> TargetBatch:
        """Return the targets of a batch of a loader that reads ``caches``, nothing where there are no encoders.

        ``pixels`` are the batch's, on the device; None where ``reads_pixels`` is false.
        """
        rows = iter(batch.cached)
        return self._prepared(
            [
                self._online(encoder, pixels) if cache is None else self._stored(cache, next(rows))
                for encoder, cache in zip(self.encoders, self._caches, strict=True)
            ]
        )

    def online(self, pixels: Tensor) -> TargetBatch:
        """Return the targets of images that are not rows of the training data."""
        return self._prepared([self._online(encoder, pixels) for encoder in self.encoders])

    @staticmethod
    def _online(encoder: Encoder, pixels: Tensor | None) -> EncoderOutput:
        """Return what an encoder says of images on the device, as it says it, float32."""
        assert pixels is not None  # the loader was asked for them
        return encoder.outputs(pixels)

    def _stored(self, cache: TokenCache, rows: Tensor) -> EncoderOutput:
        """Return what the encoder said of rows of its cache, float32, on the device."""
        stored = cache.split(rows.to(self.device, non_blocking=True))
        # A tensor that serves as several parts stays one.
        single = {id(part): part.float() for part in stored if part is not None}
        return EncoderOutput(single[id(stored.tokens)], *(single.get(id(part)) for part in stored[1:]))

    def _prepared(self, found: Sequence[EncoderOutput]) -> TargetBatch:
        """Return the targets that the encoders' own outputs make."""
        tokens, keys, values, classes = [], [], [], []
        for output, mean, standards in zip(found, self.means, self._standards, strict=True):
            tokens.append(output.tokens if mean is None else output.tokens - mean)
            if output.keys is not None and output.values is not None:
                keys.append(standards["keys"](output.keys))
                # One tensor where an encoder's tokens serve as both.
                same = output.values is output.keys
                values.append(keys[-1] if same else standards["values"](output.values))
            if output.class_token is not None:
                classes.append(standards["class_token"](output.class_token))
        return TargetBatch(tuple(tokens), tuple(keys), tuple(values), tuple(classes))

    def _fit(self, index: int, dataset: ShardedDataset, rows: np.ndarray) -> dict[str, Tensor]:
        """Return over ``rows`` the mean token (C_e,), and mean and scale of what is standardised."""
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        encoder, cache = self.encoders[index], self._caches[index]
        for part in np.array_split(rows, max(1, len(rows) // 64)):
            if cache is None:
                found = self._online(encoder, dataset.read(part)[0].to(self.device))
            else:
                found = self._stored(cache, cache.read(part))
            for name in ("tokens", *self._standardised):
                values = getattr(found, name).double().flatten(0, -2)
                sums[name] = sums.get(name, 0) + values.sum(0)
                squares[name] = squares.get(name, 0) + values.square().sum(0)
                counts[name] = counts.get(name, 0) + len(values)
        means = {name: total / counts[name] for name, total in sums.items()}
        fitted = {"mean": means["tokens"].float()}
        for name in self._standardised:
            variance = (squares[name] / counts[name] - means[name].square()).mean()
            fitted[f"{name}.mean"] = means[name].float()
            fitted[f"{name}.scale"] = variance.clamp_min(SMALLEST_SCALE**2).sqrt().float()
        return fitted

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
            say(f"Caching the tokens of {encoder.name}: {sized(cache.bytes)} at {cache.folder}.")
            cache.build(progress=None if progress is None else lambda done, of: progress("tokens", done, of))
        return cache
