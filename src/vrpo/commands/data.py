"""The commands about data: ``prepare``, ``data info``, ``data verify``, ``encoder fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.outputs import check_output
from vrpo.commands.parse import parse
from vrpo.config import Count, Positive, Seed
from vrpo.untrusted import printable


@dataclass
class Prepare:
    """Turn images (a folder, one sub-folder a class or flat, or a zip of the same) into a data set."""

    source: Positional[Path]
    """Folder or zip of images."""
    out: Positional[Path]
    """Folder to write."""
    size: Positive
    """Side in pixels after the centre crop."""
    flip: bool = False
    """Mirror at random in training."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """What to do with a file that cannot be read."""
    workers: Positive | None = None
    """Decoding processes; default one a core."""
    shard_mb: Positive = 256
    """Largest size of one shard, in MiB of pixels."""
    max_pixels: Annotated[Count, Field(gt=0)] = 178_000_000
    """Largest image that is decoded, in pixels."""


def prepare(words: list[str]) -> int:
    """Prepare a data set."""
    options, _ = parse(Prepare, words, "prepare")

    from vrpo.data.prepare import prepare as run_prepare

    result = run_prepare(
        options.source,
        options.out,
        size=options.size,
        flip=options.flip,
        on_bad_image=options.on_bad_image,
        workers=options.workers,
        shard_bytes=options.shard_mb * 2**20,
        max_pixels=options.max_pixels,
    )
    print(printable(result.summary()))
    return 0


@dataclass
class DataFolder:
    """A prepared data set."""

    path: Positional[Path]
    """Folder made by `vrpo prepare`."""


def data_info(words: list[str]) -> int:
    """Say what a data set holds."""
    options, _ = parse(DataFolder, words, "data info")

    from vrpo.data.shards import ShardedDataset

    manifest = ShardedDataset(options.path).manifest
    counts, done = manifest.counts, manifest.preprocessing
    classes = f"{len(manifest.class_names)} classes" if manifest.class_names else "no labels"
    print(f"{counts.images:,} images of {done.size} x {done.size}, {classes}, from {printable(manifest.source.name)}")
    print(f"crop {done.crop}, resample {done.resample}, flip {done.flip}; fingerprint {manifest.fingerprint}")
    print(f"unreadable {counts.bad:,}, scaled up {counts.upscaled:,}, passed over {counts.ignored:,}")
    for name, count in zip(manifest.class_names, manifest.class_counts, strict=True):
        print(f"  {printable(name)}: {count:,}")
    return 0


def data_verify(words: list[str]) -> int:
    """Check a data set's hashes."""
    options, _ = parse(DataFolder, words, "data verify")

    from vrpo.data.shards import verify_dataset
    from vrpo.display import TrainingDisplay

    with TrainingDisplay() as display:
        manifest = verify_dataset(options.path, lambda done, total: display.progress("verifying bytes", done, total))
    print(f"{options.path}: {manifest.counts.images:,} images in {len(manifest.shards)} shards, all as prepared.")
    return 0


@dataclass
class EncoderFit:
    """Train the small convolutional encoder `vrpo-conv` on a labelled data set."""

    data: Positional[Path]
    """Prepared data set with labels."""
    out: Path
    """Weights file to write (safetensors); use it with --encoder.name vrpo-conv --encoder.weights FILE."""
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Training time."""
    width: Annotated[int, Field(ge=2)] = 64
    """Channels of its tokens."""
    grid: Positive | None = None
    """Tokens along a side in the trunk it is for; default from the image size."""
    flips: bool = False
    """Mirror at random (wrong for digits and letters)."""
    seed: Seed = 0
    """Seed of weights, order and augmentation."""
    device: str = "auto"
    """auto, cpu or cuda."""


def encoder_fit(words: list[str]) -> int:
    """Fit an encoder."""
    options, _ = parse(EncoderFit, words, "encoder fit")
    check_output(options.out)

    from vrpo.data.shards import ShardedDataset
    from vrpo.training.setup import resolve_device
    from vrpo.vision.convnet import fit_encoder

    result = fit_encoder(
        ShardedDataset(options.data),
        options.out,
        minutes=options.minutes,
        width=options.width,
        grid=options.grid,
        flips=options.flips,
        seed=options.seed,
        device=resolve_device(options.device),
    )
    print(
        f"Held-out accuracy {result.accuracy:.3f} after {result.steps:,} steps in {result.seconds:.0f} s: {result.path}"
    )
    return 0
