"""The commands about data: ``prepare``, ``data info``, ``data verify``, ``data browse``, ``encoder fit``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.outputs import check_output, check_page, tell
from vrpo.commands.parse import parse
from vrpo.config import Count, Positive, Seed
from vrpo.processes import ALONE, World, connect
from vrpo.wording import counted

if TYPE_CHECKING:
    import torch

# Processes that share a preparation finish far apart where some have no shard left.
_PATIENCE = timedelta(days=7)


@dataclass
class Prepare:
    """Turn images, and on request their latents, into a data set. docs/data.md lists the layouts that are read."""

    source: Positional[Path]
    """Folder or zip of images, or another layout."""
    out: Positional[Path]
    """Folder to write."""
    size: Positive
    """Side in pixels after the centre crop."""
    flip: bool = False
    """Mirror at random in training; latents of mirror images are stored too."""
    latents: str | None = None
    """Autoencoder whose latents are stored: sd-vae-ft-ema, sd-vae-ft-mse, taesd, a hub id, or a local folder."""
    keep_pixels: bool = True
    """Keep the pixels beside the latents; an encoder that runs in training needs them."""
    normalise: Literal["autoencoder", "channels"] | None = None
    """Scale latents as the autoencoder says, or each channel to unit variance; default what is usual."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the autoencoder; latents are stored in fp16."""
    batch_size: Positive = 16
    """Images that the autoencoder takes at once."""
    device: str = "auto"
    """Where the autoencoder runs: auto, cpu or cuda."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """What to do with a file that cannot be read."""
    workers: Positive | None = None
    """Decoding processes, of each process under torchrun; default one a core, or its share of the cores."""
    shard_mb: Positive = 256
    """Largest size of one shard, in MiB of pixels and latents."""
    max_pixels: Annotated[Count, Field(gt=0)] = 178_000_000
    """Largest image that is decoded, in pixels."""


def prepare(words: list[str]) -> int:
    """Prepare a data set."""
    with connect(_PATIENCE, go_on="run the same command again") as world:
        with world.agreed():
            options, _ = parse(Prepare, words, "prepare")

            from vrpo.data.latents import LatentOptions
            from vrpo.data.prepare import prepare as run_prepare

            latents = LatentOptions(
                autoencoder=options.latents,
                keep_pixels=options.keep_pixels,
                normalise=options.normalise,
                precision=options.precision,
                device="cpu" if options.latents is None else _device(options.device, world),
                batch_size=options.batch_size,
            )
        result = run_prepare(
            options.source,
            options.out,
            size=options.size,
            flip=options.flip,
            latents=latents,
            on_bad_image=options.on_bad_image,
            workers=options.workers,
            shard_bytes=options.shard_mb * 2**20,
            max_pixels=options.max_pixels,
            world=world,
        )
        if world.first:
            tell(result.summary())
    return 0


def _device(name: str, world: World = ALONE) -> torch.device:
    """Return the device of this process; under torchrun each has a GPU of its own, as far as there are."""
    import torch

    from vrpo.devices import resolve_device

    if name == "auto" and world.connected and torch.cuda.is_available():
        name = f"cuda:{world.local_rank % torch.cuda.device_count()}"
    return resolve_device(name)


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
    classes = counted(len(manifest.class_names), "class", "classes") if manifest.class_names else "no labels"
    images = counted(counts.images, "image", "images")
    tell(f"{images} of {done.size} x {done.size}, {classes}, from {manifest.source.name}")
    tell(f"crop {done.crop}, resample {done.resample}, flip {done.flip}; fingerprint {manifest.fingerprint}")
    latents = manifest.latents
    if latents is not None:
        kind = "mean and standard deviation" if latents.posterior else "one value"
        made = "an unknown autoencoder" if latents.autoencoder is None else f"'{latents.autoencoder}'"
        weights = " (as was said; its weights are not known)" if latents.autoencoder is not None else ""
        if latents.weights is not None:
            weights = f" ({latents.weights[:12]})"
        tell(
            f"latents {latents.channels} x {latents.size} x {latents.size} ({kind}, fp16) of {made}{weights}, "
            f"scaled by {latents.normalisation}; pixels {'kept' if latents.pixels else 'not kept'}"
        )
    tell(f"unreadable {counts.bad:,}, scaled up {counts.upscaled:,}, passed over {counts.ignored:,}")
    for name, count in zip(manifest.class_names, manifest.class_counts, strict=True):
        tell(f"  {name}: {count:,}")
    return 0


def data_verify(words: list[str]) -> int:
    """Check a data set's hashes."""
    options, _ = parse(DataFolder, words, "data verify")

    from vrpo.data.shards import verify_dataset
    from vrpo.display import TrainingDisplay

    with TrainingDisplay() as display:
        manifest = verify_dataset(options.path, lambda done, total: display.progress("verifying bytes", done, total))
    shards, images = (
        counted(len(manifest.shards), "shard", "shards"),
        counted(manifest.counts.images, "image", "images"),
    )
    tell(f"{options.path}: {images} in {shards}, all as prepared.")
    return 0


@dataclass
class DataBrowse:
    """Write an HTML page of random samples with their classes; latents without pixels are decoded."""

    path: Positional[Path]
    """Folder made by `vrpo prepare`."""
    html: Path
    """File to write."""
    count: Positive = 64
    """Samples to show."""
    seed: Seed = 0
    """Which samples."""
    decode: bool = False
    """Decode the latents even where there are pixels, and show both."""
    decoder: str | None = None
    """Where the autoencoder of the latents lies; default as recorded."""
    any_decoder: bool = False
    """Decode with it even if it is not the one that made the latents."""
    device: str = "auto"
    """Where the autoencoder runs: auto, cpu or cuda."""


def data_browse(words: list[str]) -> int:
    """Show samples of a data set."""
    options, _ = parse(DataBrowse, words, "data browse")
    check_page(options.html, "--html")

    from vrpo.data.browse import browse
    from vrpo.data.shards import ShardedDataset

    dataset = ShardedDataset(options.path)
    decode = None
    if options.decode or options.decoder is not None or not dataset.holds_pixels:
        from vrpo.decoding import decode_stored

        decode = decode_stored(
            dataset, named=options.decoder, any_decoder=options.any_decoder, device=_device(options.device)
        )
    shown = browse(dataset, options.html, count=options.count, seed=options.seed, decode=decode)
    tell(f"{shown:,} of {len(dataset):,} samples: {options.html}")
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
    from vrpo.devices import resolve_device
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
    tell(
        f"Held-out accuracy {result.accuracy:.3f} after {result.steps:,} steps in {result.seconds:.0f} s: {result.path}"
    )
    return 0
