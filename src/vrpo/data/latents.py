"""Latents while a data set is prepared: made by an autoencoder or taken from the source, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from vrpo.data.journal import Finished, Moments
from vrpo.data.manifest import LatentRecord, Normaliser
from vrpo.data.shards import Rows
from vrpo.data.sources import Source, StoredLatents
from vrpo.data.transforms import image_size
from vrpo.data.workers import Decoded, Work, decode_entries
from vrpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from vrpo.vision.autoencoders import Autoencoder

Half = NDArray[np.float16]
Precision = Literal["fp32", "bf16", "fp16"]
Normalise = Literal["autoencoder", "channels"]


class LatentMaker:
    """Turns decoded images into rows of latents, of the mirror image too with ``flips``."""

    def __init__(self, autoencoder: Autoencoder, size: int, *, flips: bool, batch_size: int) -> None:
        """Raises ConfigError for a ``size`` in pixels that the autoencoder cannot divide into latents."""
        if size % autoencoder.downsampling:
            step = autoencoder.downsampling
            raise ConfigError(
                f"--size {size} is no multiple of {step}, as the autoencoder '{autoencoder.name}' needs: use "
                f"{max(1, round(size / step)) * step}."
            )
        self.autoencoder, self.flips, self.batch_size = autoencoder, flips, batch_size
        self.size = size // autoencoder.downsampling

    def record(self, precision: Precision, normalisation: Normalise, pixels: bool) -> LatentRecord:
        """Return what a manifest says of these latents."""
        return LatentRecord(
            autoencoder=self.autoencoder.name,
            weights=self.autoencoder.fingerprint,
            channels=self.autoencoder.channels,
            size=self.size,
            posterior=self.autoencoder.posterior,
            precision=precision,
            normalisation=normalisation,
            pixels=pixels,
        )

    def rows(self, pixels: NDArray[np.uint8], keep_pixels: bool) -> Rows:
        """Return the rows of uint8 images (n, 3, S, S)."""
        import torch

        plain: list[Half] = []
        mirrored: list[Half] = []
        for batch in torch.from_numpy(pixels).split(self.batch_size):
            plain.append(self.autoencoder.encode(batch).half().cpu().numpy())
            if self.flips:
                mirrored.append(self.autoencoder.encode(batch.flip(-1)).half().cpu().numpy())
        return Rows(
            pixels if keep_pixels else None,
            np.concatenate(plain),
            np.concatenate(mirrored) if self.flips else None,
        )


@dataclass(frozen=True)
class LatentOptions:
    """What is asked of latents: which autoencoder makes or made them, and how they are stored.

    ``normalise`` is where the diffusion's shift and scale come from: the autoencoder's configuration, or the data's
    statistics by channel; None is what is usual for the source. ``precision`` is that of the network.
    """

    autoencoder: str | None = None
    keep_pixels: bool = True
    normalise: Normalise | None = None
    precision: Precision = "fp32"
    device: str | torch.device = "cpu"
    batch_size: int = 16


@dataclass(frozen=True)
class LatentPlan:
    """How the rows of a data set are made: what workers do, who makes latents, and what the manifest says of them."""

    work: Work
    keep_pixels: bool
    record: LatentRecord | None = None
    maker: LatentMaker | None = None
    known: Normaliser | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        pixels = 3 * self.work.size**2 if self.keep_pixels else 0
        return pixels + self._latent_bytes

    @property
    def task_bytes(self) -> int:
        """Bytes that a worker returns for an entry."""
        pixels = 3 * self.work.size**2 if self.work.pixels else 0
        return max(pixels, 2 * math.prod(self.work.latents or (0,)))

    @property
    def _latent_bytes(self) -> int:
        if self.record is None:
            return 0
        return 2 * self._views * self.record.stored_channels * self.record.size**2

    @property
    def _views(self) -> int:
        if self.maker is not None:
            return 2 if self.maker.flips else 1
        return self.work.latents[0] if self.work.latents else 1

    def normaliser(self, finished: Sequence[Finished]) -> Normaliser | None:
        """Return the shift and scale of the finished data set's latents; None for pixels."""
        if self.record is None or self.known is not None:
            return self.known
        return channel_normaliser(finished, self.record, self._views)


def plan_latents(source: Source, options: LatentOptions, *, size: int, flip: bool, max_pixels: int) -> LatentPlan:
    """Decide how the rows of a data set are made.

    Raises:
        ConfigError: options that do not fit the source or each other.
        CheckpointError: an autoencoder that cannot be loaded.
        DataError: latents that another autoencoder made.
    """
    if source.latents is not None:
        return _plan_stored(source, source.latents, options, size=size, flip=flip, max_pixels=max_pixels)
    work = Work(size, max_pixels)
    if options.autoencoder is None:
        if options.normalise is not None or not options.keep_pixels:
            name = "--normalise" if options.normalise is not None else "--no-keep-pixels"
            raise ConfigError(f"{name} is about latents, and none are asked for: add --latents NAME, or leave it out.")
        return LatentPlan(work, True)
    from vrpo.vision.autoencoders import load_autoencoder

    autoencoder = load_autoencoder(options.autoencoder, options.device, options.precision)
    maker = LatentMaker(autoencoder, size, flips=flip, batch_size=options.batch_size)
    normalise = options.normalise or "autoencoder"
    record = maker.record(options.precision, normalise, options.keep_pixels)
    known = _by_autoencoder(autoencoder) if normalise == "autoencoder" else None
    return LatentPlan(work, options.keep_pixels, record, maker, known)


def _plan_stored(
    source: Source, stored: StoredLatents, options: LatentOptions, *, size: int, flip: bool, max_pixels: int
) -> LatentPlan:
    views, channels, grid, _ = stored.shape
    if flip and views < 2:
        raise ConfigError(
            f"'{source.path}' has no latents of mirror images: leave out --flip, or prepare its images with --latents."
        )
    if size % grid:
        raise ConfigError(
            f"the latents of '{source.path}' are {grid} x {grid}, and --size {size} is no multiple of that: give the "
            "side of the images they were made from."
        )
    if stored.pixels:
        _check_side(source, size)
    work = Work(size, max_pixels, pixels=stored.pixels, latents=(2 if flip else 1, *stored.shape[1:]), exact=True)
    channels //= 2 if stored.posterior else 1
    known = None
    if stored.shift is not None and stored.scale is not None:
        known = Normaliser(shift=stored.shift, scale=stored.scale)
    name, weights = options.autoencoder or stored.autoencoder, None
    if options.autoencoder is not None:
        from vrpo.vision.autoencoders import load_autoencoder

        autoencoder = load_autoencoder(options.autoencoder, options.device, options.precision)
        compared = _compare_stored(source, stored, autoencoder, work)
        name, weights = autoencoder.name, autoencoder.fingerprint if compared else None
        known = known if stored.autoencoder is None and known is not None else _by_autoencoder(autoencoder)
    if options.normalise == "autoencoder" and known is None:
        raise ConfigError(
            f"'{source.path}' does not say how its latents are scaled: use --normalise channels, or name their "
            "autoencoder with --latents."
        )
    if options.normalise == "channels":
        known = None
    keep = stored.pixels and options.keep_pixels
    record = LatentRecord(
        autoencoder=name,
        weights=weights,
        channels=channels,
        size=grid,
        posterior=stored.posterior,
        precision="source",
        normalisation="channels" if known is None else "autoencoder",
        pixels=keep,
    )
    return LatentPlan(work, keep, record, None, known)


def _check_side(source: Source, size: int) -> None:
    """Refuse a ``size`` other than that of the images, told by the first one that can be read."""
    first = source.entries[0]
    try:
        with source.open(first) as stream:
            width, height = image_size(stream.read())
    except (DataError, OSError):
        return  # a bad image, which preparing names
    if (width, height) != (size, size):
        raise ConfigError(
            f"the images of '{source.path}' are those that its latents were made from, {width} x {height} pixels, and "
            f"not {size} x {size}: give --size {min(width, height)}."
        )


def _by_autoencoder(autoencoder: Autoencoder) -> Normaliser:
    channels = autoencoder.channels
    return Normaliser(shift=(autoencoder.shift,) * channels, scale=(autoencoder.scale,) * channels)


def _compare_stored(source: Source, stored: StoredLatents, autoencoder: Autoencoder, work: Work) -> bool:
    """Refuse latents that the autoencoder did not make: told by their shape, and by the first image that is there.

    Returns whether there was an image to tell it by.
    """
    channels = autoencoder.channels * (2 if stored.posterior else 1)
    if channels != stored.shape[1] or work.size // autoencoder.downsampling != stored.shape[2]:
        raise DataError(
            f"the latents of '{source.path}' are of another autoencoder than '{autoencoder.name}': they are "
            f"{stored.shape[1:]} and its are {(channels, *[work.size // autoencoder.downsampling] * 2)}; name the one "
            "that made them."
        )
    if not (stored.pixels and stored.posterior):
        return False
    import torch

    first = decode_entries(source.opener, source.entries[:1], work)
    if first.pixels is None or first.latents is None or not first.kept:
        return False
    mean = autoencoder.encode(torch.from_numpy(first.pixels)).chunk(2, dim=1)[0].cpu()
    held = torch.from_numpy(first.latents[:, 0].astype(np.float32)).chunk(2, dim=1)[0]
    # Half precision and another library differ by a thousandth; another network by as much as the values.
    if (mean - held).norm() > 0.05 * held.norm():
        raise DataError(
            f"the latents of '{source.path}' are of another autoencoder than '{autoencoder.name}': those of "
            f"'{source.entries[0].key}' differ; name the one that made them."
        )
    return True


def rows_of(result: Decoded, maker: LatentMaker | None, keep_pixels: bool) -> Rows:
    """Return the rows of decoded images, with latents of their own or made by ``maker``."""
    if maker is not None:
        return maker.rows(cast("NDArray[np.uint8]", result.pixels), keep_pixels)
    if result.latents is None:
        return Rows(result.pixels)
    flips = result.latents.shape[1] > 1
    pixels = result.pixels if keep_pixels else None
    return Rows(pixels, result.latents[:, 0], result.latents[:, 1] if flips else None)


def moments(blocks: Sequence[Rows], posterior: bool) -> Moments:
    """Return the sums over a shard's latents, and those of mirror images, by channel."""
    first: NDArray[np.float64] | float = 0.0
    second: NDArray[np.float64] | float = 0.0
    for stored in (view for block in blocks for view in (block.latents, block.latents_flip) if view is not None):
        values = stored.astype(np.float64)
        mean, deviation = np.split(values, 2, axis=1) if posterior else (values, np.zeros(1))
        first = first + mean.sum((0, 2, 3))
        second = second + (mean**2 + deviation**2).sum((0, 2, 3))
    return Moments(first=tuple(np.atleast_1d(first).tolist()), second=tuple(np.atleast_1d(second).tolist()))


def channel_normaliser(finished: Sequence[Finished], record: LatentRecord, views: int) -> Normaliser:
    """Return the shift and scale that give every channel mean 0 and variance 1 over the data and its ``views``.

    The variance is that of samples: of the means, plus the mean variance of the posteriors. Raises DataError for a
    channel that does not vary.
    """
    told = [(entry.shard.rows, entry.moments) for entry in finished if entry.shard and entry.moments]
    count = sum(rows for rows, _ in told) * record.size**2 * views
    mean = np.sum([part.first for _, part in told], axis=0) / count
    variance = np.sum([part.second for _, part in told], axis=0) / count - mean**2
    if not (variance > 0).all():
        channel = int(np.argmin(variance))
        raise DataError(f"channel {channel} of the latents is the same everywhere: use --normalise autoencoder.")
    return Normaliser(shift=tuple(mean.tolist()), scale=tuple((1 / np.sqrt(variance)).tolist()))
