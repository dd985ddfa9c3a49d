"""From a configuration to the parts of a run, with every disagreement between them refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vrpo.alignment.build import TrunkShape, build_objective, check_depths, scaffold_depth
from vrpo.alignment.image_distance import load_distance
from vrpo.alignment.objective import Objective
from vrpo.alignment.scaffold import looks_before_latest
from vrpo.config import RunConfig, ScaffoldConfig, TokenConfig
from vrpo.data.shards import ShardedDataset
from vrpo.devices import resolve_device
from vrpo.diffusion.losses import Denoising
from vrpo.errors import ConfigError
from vrpo.models.transformer import SIZES, DiffusionTransformer, build_transformer, parse_model_name
from vrpo.processes import ALONE, World, local_device
from vrpo.randomness import STREAM_INIT, mix
from vrpo.sampling import build_denoising, check_sampling
from vrpo.training.data_checks import check_data, check_pair
from vrpo.training.share import share
from vrpo.training.targets import Say, Targets

# Below this, reading the data once takes no time worth showing.
_LONG_TO_READ = 1 << 30


@dataclass
class Parts:
    """What a run is made of."""

    config: RunConfig
    device: torch.device
    dataset: ShardedDataset
    held_out: ShardedDataset | None
    trunk: DiffusionTransformer
    objective: Objective
    denoising: Denoising
    targets: Targets
    flip: bool
    image_distance: nn.Module | None

    @property
    def num_classes(self) -> int:
        """Classes that the trunk is conditioned on."""
        return self.trunk.num_classes

    def verify_data(self, world: World, progress: Any = None) -> None:
        """Compare this process's share of the data and token caches with their hashes.

        Raises:
            DataError: bytes have changed; their file is named.
        """
        for dataset in (self.dataset, self.held_out):
            if dataset is not None:
                size = sum(record.bytes for record in dataset.manifest.shards)
                shown = progress is not None and size > _LONG_TO_READ
                told = (lambda done, of: progress("verifying data", done, of)) if shown else None
                dataset.verify(told, world.rank, world.size)
        self.targets.verify(world.rank, world.size)


def check_config(config: RunConfig, world: World = ALONE) -> None:
    """Refuse what is wrong whatever the data: the model's name, depths, batch split, sampler.

    Raises:
        ConfigError: the first disagreement.
    """
    kind, size, _ = parse_model_name(config.model.name)
    check_depths("align.depth", config.align.depth, SIZES[size].depth)
    if config.align.supply != "none":
        scaffold_depth(config.align, size, SIZES[size].depth)
    if kind == "DiT" and config.align.uses_token:
        raise ConfigError(
            f"align.token denoises a token by its velocity, and {config.model.name} has none: use a SiT, or "
            "align.token.use False."
        )
    check_sampling(
        kind, config.sample, config.data.conditional, config.model.label_dropout, token=config.align.uses_token
    )
    _check_evaluation(config)
    train = config.train
    share(train.batch_size, train.micro_batch, train.noisings, world)


def _check_evaluation(config: RunConfig) -> None:
    fewest = 4  # a third neighbour, for precision and recall
    if config.evaluate.features is not None and config.evaluate.samples < fewest:
        raise ConfigError(f"evaluate.samples {config.evaluate.samples} is too few to score: use at least {fewest}.")


def idle_settings(config: RunConfig, world: World = ALONE) -> Iterator[str]:
    """Give a sentence for each setting that will do nothing for want of something to do it with."""
    if config.train.validate_every and config.data.validation is None:
        yield "No held-out loss will be measured: data.validation is not set."
    if config.train.evaluate_every and config.evaluate.features is None:
        yield "Samples will not be scored during training: evaluate.features is not set."
    if config.train.parallel != "ddp" and world.size == 1:
        yield f"train.parallel {config.train.parallel} does nothing: one process has no other to share weights with."
    if config.train.shard_size and config.train.parallel != "hybrid":
        yield "train.shard_size does nothing: it is of --train.parallel hybrid."
    align = config.align
    if not align.uses_token and align.token.model_copy(update={"use": None}) != TokenConfig():
        yield "The settings of align.token do nothing: there is no token; --align.token.use True trains one."
    elif align.uses_token and align.token.tau is not None and config.train.noisings == 1:
        yield "The token's weights are all one: align.token.tau compares an image's noisings, and train.noisings is 1."
    scaffold = align.scaffold
    if align.supply == "none" and scaffold.model_copy(update={"supply": "auto"}) != ScaffoldConfig():
        yield "The settings of align.scaffold do nothing: the block supplies itself; see --align.scaffold.supply."
    looks = looks_before_latest(scaffold, config.train.images)
    if align.supply == "advantage" and looks <= scaffold.patience:
        yield (
            "The scaffold will be ended by align.scaffold.latest and not by its rule: until then a time bin is looked "
            f"at {looks} times, and align.scaffold.patience is {scaffold.patience}; fewer align.scaffold.time_bins or "
            "a larger align.scaffold.fraction give more looks."
        )


def open_data(path: Path | None, field: str) -> ShardedDataset:
    """Open a prepared data set.

    Raises:
        ConfigError: none is named.
        DataError: it cannot be used.
    """
    if path is None:
        raise ConfigError(f"{field} is not set: give a folder made by `vrpo prepare SOURCE OUT --size N`.")
    return ShardedDataset(path)


def build_parts(config: RunConfig, say: Say, progress: Any = None, world: World = ALONE) -> Parts:
    """Build every part of a run.

    Raises:
        ConfigError, DataError, CheckpointError: what does not fit, in one sentence.
    """
    check_config(config, world)
    device = resolve_device(local_device(config.train.device, world))
    dataset = open_data(config.data.path, "data.path")
    held_out = None if config.data.validation is None else open_data(config.data.validation, "data.validation")
    check_pair(config, dataset, held_out)
    if config.data.conditional and not dataset.labelled:
        raise ConfigError(
            f"{config.data.path} has no labels, and data.conditional is true: prepare it from one folder a class, "
            "or set --data.conditional False."
        )
    num_classes = dataset.num_classes if config.data.conditional else 0
    flip = dataset.manifest.preprocessing.flip == "random" if config.data.flip is None else config.data.flip
    check_data(config, dataset, flip)

    # The trunk's initial weights depend on the seed alone, so that objectives are compared from one start.
    torch.manual_seed(mix(config.seed, STREAM_INIT, 0) >> 1)
    trunk = build_transformer(
        config.model.name,
        input_size=dataset.input_size,
        in_channels=dataset.in_channels,
        num_classes=num_classes,
        qk_norm=config.model.qk_norm,
        checkpoint_blocks=config.model.checkpoint_blocks,
    )
    targets = Targets(
        config.encoders,
        dataset,
        tokens=trunk.num_tokens,
        flip=flip,
        class_token=config.align.uses_token,
        keys_values=config.align.supply != "none",
        device=device,
        say=say,
        progress=progress,
    )
    if config.align.uses_token:
        torch.manual_seed(mix(config.seed, STREAM_INIT, 2) >> 1)
        trunk.add_token(targets.class_width)
    distance = load_distance(
        config.align.perceptual_image,
        channels=dataset.in_channels,
        image_size=dataset.input_size,
        tokens=trunk.num_tokens,
        device=device,
    )
    torch.manual_seed(mix(config.seed, STREAM_INIT, 1) >> 1)
    objective = build_objective(
        config.align, TrunkShape.of(trunk, config.model.name), targets.widths, targets.key_value_widths, distance
    )
    return Parts(
        config=config,
        device=device,
        dataset=dataset,
        held_out=held_out,
        trunk=trunk.to(device),
        objective=objective.to(device),
        denoising=build_denoising(trunk.kind, config.diffusion),
        targets=targets,
        flip=flip,
        image_distance=distance,
    )
