"""Whether data sets fit a configuration, and each other."""

from __future__ import annotations

from vrpo.config import RunConfig
from vrpo.data.shards import ShardedDataset
from vrpo.errors import ConfigError, DataError


def check_data(config: RunConfig, dataset: ShardedDataset, flip: bool) -> None:
    """Refuse data of another size than the configuration, such as a preset, is meant for, or without what it needs.

    Raises:
        ConfigError: the first disagreement.
    """
    wanted, side = config.data.image_size, dataset.image_size
    if wanted is not None and side != wanted:
        raise ConfigError(
            f"data.image_size is {wanted}, and the images of {dataset.path} are {side} px: prepare them with --size "
            f"{wanted}, or use a preset for {side} px."
        )
    grid, latents = config.data.latent_size, dataset.latents
    if grid is not None and (latents is None or latents.size != grid):
        held = "no latents" if latents is None else f"latents of {latents.size} x {latents.size}"
        raise ConfigError(
            f"data.latent_size is {grid}, and {dataset.path} holds {held}: prepare it with --latents and the --size "
            f"that gives {grid} x {grid}, or use a preset for such data."
        )
    if flip and latents is not None and dataset.manifest.preprocessing.flip == "none":
        raise ConfigError(
            f"data.flip is true, and {dataset.path} holds no latents of mirror images: prepare it with --flip, or set "
            "--data.flip False."
        )
    if config.encoders and not dataset.holds_pixels:
        raise ConfigError(
            f"align.objective {config.align.objective} encodes images, and {dataset.path} holds latents without "
            "pixels: prepare it with its pixels kept, or set --align.objective none."
        )


def check_pair(config: RunConfig, dataset: ShardedDataset, held_out: ShardedDataset | None) -> None:
    """Refuse held-out data that is not of the same kind as the training data, or cannot be measured on.

    Raises:
        DataError: the first difference.
        ConfigError: alignment is to be measured, and there are no images to encode.
    """
    if held_out is None:
        return
    if held_out.image_size != dataset.image_size:
        raise DataError(
            f"the held-out images of {held_out.path} are {held_out.image_size} px and the training images "
            f"{dataset.image_size} px: prepare both with one --size."
        )
    mine, theirs = dataset.latents, held_out.latents
    if (mine is None) != (theirs is None):
        raise DataError(
            f"of {dataset.path} and the held-out {held_out.path} only one holds latents: prepare both with the same "
            "--latents."
        )
    if mine is not None and theirs is not None and not mine.is_like(theirs):
        raise DataError(
            f"the held-out latents of {held_out.path} are of another autoencoder ('{theirs.autoencoder}') than "
            f"those of {dataset.path} ('{mine.autoencoder}'): prepare both with the same --latents."
        )
    if held_out.class_names != dataset.class_names:
        raise DataError(
            f"the held-out data of {held_out.path} has other classes than {dataset.path}: prepare both from the same "
            "class folders."
        )
    if config.train.validate_every and config.encoders and not held_out.holds_pixels:
        raise ConfigError(
            f"align.objective {config.align.objective} encodes held-out images, and {held_out.path} holds latents "
            "without pixels: prepare it with its pixels kept, or set --train.validate_every 0."
        )
