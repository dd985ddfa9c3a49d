"""The commands about what a trunk has learned: ``evaluate cknna`` and ``evaluate probe``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.alone import refuse_processes
from vrpo.commands.outputs import check_output, check_result, tell
from vrpo.commands.parse import parse
from vrpo.config import Count, Positive, Seed
from vrpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from vrpo.data.shards import ShardedDataset
    from vrpo.evaluation.trunk import DepthTimeTable, Trunk
    from vrpo.sampling import LoadedRun

UnitTime = Annotated[float, Field(ge=0, le=1)]


@dataclass
class Looking:
    """Where one looks into the trunk."""

    depths: tuple[Positive, ...] | None = None
    """Blocks after which tokens are read, from 1; default all."""
    times: Annotated[tuple[UnitTime, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75)
    """Times of the noised images, from 0 = data to 1 = noise."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or trained weights."""
    batch_size: Positive = 64
    """Images at once."""
    seed: Seed = 0
    """Seed of the noise."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path | None = None
    """JSON file to write; default in the run's folder `evaluations`."""

    def open(self, run: Path) -> tuple[LoadedRun, Trunk, tuple[int, ...]]:
        """Load the run's newest checkpoint, and return the depths that are looked at."""
        from vrpo.alignment.build import check_depths
        from vrpo.devices import resolve_device
        from vrpo.evaluation.trunk import Trunk
        from vrpo.sampling import build_denoising, load_run

        device = resolve_device(self.device)
        loaded = load_run(run, self.weights, device)
        if loaded.network.token_width:
            raise ConfigError(
                f"{run} denoises the encoder's class token beside the image, which would tell its tokens the answer: "
                "give a run without it."
            )
        deepest = loaded.network.depth
        check_depths("--depths", self.depths or (), deepest)
        if self.out is not None:
            check_result(self.out, ".json", [run])
        else:
            check_output(run / "evaluations", folder=True)
        denoising = build_denoising(loaded.network.kind, loaded.config.diffusion)
        trunk = Trunk(loaded.network, denoising, device, partial(_clean, loaded, device, self.seed))
        return loaded, trunk, self.depths or tuple(range(1, deepest + 1))

    def finish(self, run: Path, loaded: LoadedRun, name: str, result: DepthTimeTable, **about: Any) -> None:
        """Print the table and write the JSON file."""
        from rich.console import Console

        from vrpo.evaluation.evaluate import write_json

        result.protocol.update(about, weights=self.weights)
        Console().print(result.table())
        out = self.out or run / "evaluations" / f"{name}-step-{loaded.step:08d}.json"
        write_json(out, result.record(run=str(run), step=loaded.step, images=loaded.images))
        tell(f"Written: {out}")


@dataclass
class Cknna:
    """Alignment of a run's tokens with an encoder's, by depth and time (CKNNA)."""

    run: Positional[Path]
    """Folder of the run."""
    encoder: str | None = None
    """Encoder to compare with, as in a run's configuration; default the run's own."""
    encoder_weights: str | None = None
    """Local weights file of that encoder, or random."""
    data: Path | None = None
    """Prepared data set; default the run's held-out data, or else its training data."""
    images: Annotated[Count, Field(ge=12)] = 2_000
    """Images, spread over the data."""
    looking: tyro.conf.OmitArgPrefixes[Looking] = dataclasses.field(default_factory=Looking)


def cknna(words: list[str]) -> int:
    """Measure CKNNA."""
    refuse_processes("evaluate cknna")
    options, _ = parse(Cknna, words, "evaluate cknna")

    from math import isqrt

    from vrpo.evaluation.trunk import cknna_by_depth
    from vrpo.vision.encoders import load_encoder

    looking = options.looking
    loaded, trunk, depths = looking.open(options.run)
    config = loaded.config
    own = options.encoder is None
    named = options.data or config.data.validation or config.data.path
    data = _open_data(named, loaded)
    count = min(options.images, len(data))
    encoder = load_encoder(
        config.encoder.name if options.encoder is None else options.encoder,
        weights=options.encoder_weights or (config.encoder.weights if own else None),
        grid=isqrt(loaded.network.num_tokens),
        feature=config.encoder.feature if own else None,
        input_size=config.encoder.input_size if own else None,
        device=trunk.device,
    )
    with _display() as display:
        result = cknna_by_depth(
            trunk,
            encoder,
            data,
            depths=depths,
            times=looking.times,
            count=count,
            seed=looking.seed,
            batch_size=looking.batch_size,
            progress=lambda done, total: display.progress("times", done, total),
        )
    looking.finish(
        options.run,
        loaded,
        "cknna",
        result,
        data=data.path.name,
        data_hash=data.fingerprint,
        encoder=encoder.fingerprint,
    )
    return 0


@dataclass
class Probe:
    """Accuracy of a linear classifier on a run's tokens, by depth and time."""

    run: Positional[Path]
    """Folder of the run."""
    data: Path | None = None
    """Prepared data set that the classifier is fitted to; default the run's training data."""
    test: Path | None = None
    """Prepared data set that it is scored on; default the run's held-out data, or else other rows of --data."""
    images: Annotated[Count, Field(ge=2)] = 5_000
    """Images it is fitted to, spread over the data."""
    test_images: Annotated[Count, Field(ge=1)] = 2_000
    """Images it is scored on."""
    looking: tyro.conf.OmitArgPrefixes[Looking] = dataclasses.field(default_factory=Looking)


def probe(words: list[str]) -> int:
    """Fit linear probes."""
    refuse_processes("evaluate probe")
    options, _ = parse(Probe, words, "evaluate probe")

    import numpy as np

    from vrpo.evaluation.trunk import probe_by_depth, spread_rows

    looking = options.looking
    loaded, trunk, depths = looking.open(options.run)
    config = loaded.config
    data = _open_data(options.data or config.data.path, loaded)
    named = options.test or (config.data.validation if options.data is None else None)
    test = data if named is None else _open_data(named, loaded)
    for side in (data, test):
        if not side.labelled:
            raise DataError(f"{side.path} has no labels, and a probe needs them: prepare it from one folder a class.")
    if data.class_names != test.class_names:
        raise DataError(f"{test.path} has other classes than {data.path}: give data sets of the same classes.")
    if named is None:
        count = min(options.images + options.test_images, len(data))
        rows = spread_rows(len(data), count)
        # Every n-th row is for testing, so that both sides hold every class of data in the order of classes.
        held = spread_rows(count, max(1, count * options.test_images // (options.images + options.test_images)))
        sides = (np.delete(rows, held), rows[held])
    else:
        sides = (
            spread_rows(len(data), min(options.images, len(data))),
            spread_rows(len(test), min(options.test_images, len(test))),
        )
    with _display() as display:
        result = probe_by_depth(
            trunk,
            data,
            test,
            depths=depths,
            times=looking.times,
            rows=sides,
            num_classes=data.num_classes,
            seed=looking.seed,
            batch_size=looking.batch_size,
            progress=lambda done, total: display.progress("features", done, total),
        )
    looking.finish(
        options.run,
        loaded,
        "probe",
        result,
        data=data.path.name,
        data_hash=data.fingerprint,
        test=test.path.name,
        test_hash=test.fingerprint,
    )
    return 0


def _open_data(path: Path | None, loaded: LoadedRun) -> ShardedDataset:
    from vrpo.data.shards import ShardedDataset
    from vrpo.decoding import latents_of_state

    if path is None:
        raise ConfigError("the run names no data: give a prepared data set with --data.")
    data = ShardedDataset(path)
    network = loaded.network
    if (data.input_size, data.in_channels) != (network.input_size, network.in_channels):
        raise DataError(
            f"{path} holds {data.in_channels} channels of {data.input_size} x {data.input_size} and the model takes "
            f"{network.in_channels} of {network.input_size} x {network.input_size}: prepare it as the run's data was."
        )
    mine, theirs = latents_of_state(loaded.latents)[0], data.latents
    if (mine is None) != (theirs is None):
        raise DataError(
            f"{path} holds {'no latents' if theirs is None else 'latents'} and the run was trained on "
            f"{'pixels' if mine is None else 'latents'}: prepare it as the run's data was."
        )
    if mine is not None and theirs is not None and not mine.is_like(theirs):
        raise DataError(
            f"the latents of {path} are of another autoencoder ('{theirs.autoencoder}') than those the run was trained "
            f"on ('{mine.autoencoder}'): prepare it with the same --latents."
        )
    return data


def _clean(
    loaded: LoadedRun, device: torch.device, seed: int, data: ShardedDataset, rows: np.ndarray, start: int
) -> Tensor:
    """Return what the diffusion is trained on: pixels, or latents scaled as the run's training data was."""
    from vrpo.decoding import latents_of_state
    from vrpo.training.latents import CleanLatents

    pixels = None if data.latents is not None else data.read(rows)[0].to(device)
    stored = None if data.latents is None else data.read_latents(rows).to(device)
    clean = CleanLatents(data.latents, latents_of_state(loaded.latents)[1], seed, device)
    return clean(pixels, stored, start, count=len(rows))


def _display() -> Any:
    from vrpo.display import TrainingDisplay

    return TrainingDisplay()
