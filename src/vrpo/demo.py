"""The demonstration: from images to a scored, compared report in minutes, on any machine."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vrpo.config import RunConfig
from vrpo.config_load import OBJECTIVES, load_preset, merge, validate
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import ArraySource, Source, open_source
from vrpo.display import TrainingDisplay
from vrpo.errors import ConfigError, DataError, nearest
from vrpo.randomness import mix
from vrpo.report.compare import compare
from vrpo.runs import Run, flatten
from vrpo.training.trainer import Trainer
from vrpo.untrusted import printable
from vrpo.vision.convnet import fit_encoder

DIGITS_SIZE = 16
IMAGES_SIZE = 32
HELD_OUT = 8  # one image in this many is held out
CALIBRATION_STEPS = 60
CALIBRATION_WINDOWS = 5
DIGITS_STEPS = 150
ENCODER_SHARE = 0.08  # of the demo's time, for each of the two encoders
TRAINING_SHARE = 0.5  # of the demo's time, at least
LEAST_BETWEEN_VISITS = 2_000  # images
VISIT_SECONDS = 1.5  # what a visit takes besides drawing samples
START_SECONDS = 3.0  # what a run takes before its first step

Say = Callable[[str], None]


def digits() -> Source:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes."""
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.clip(bunch.images * 255 / 16, 0, 255).round().astype(np.uint8)
    return ArraySource(images[..., None], bunch.target, [str(digit) for digit in range(10)], "digits")


def split(source: Source, held_out: int) -> tuple[Source, Source]:
    """Divide a source into training and held-out images: one in ``held_out``, chosen by its key."""
    away = [mix(*entry.key.encode()) % held_out == 0 for entry in source.entries]
    parts = [[entry for entry, is_away in zip(source.entries, away, strict=True) if is_away == want] for want in (0, 1)]
    return dataclasses.replace(source, entries=parts[0]), dataclasses.replace(source, entries=parts[1])


def run_demo(
    out: Path,
    *,
    source: Path | None = None,
    size: int | None = None,
    minutes: float = 4.5,
    objectives: Sequence[str] = ("none", "repa", "vrpo"),
    seed: int = 0,
) -> tuple[Path, str]:
    """Prepare images, fit two encoders, train each objective for the same number of images, and compare.

    One encoder is aligned to; the other, of another size and seed, only judges. ``minutes`` is the time for all.

    Returns:
        The report's file, and the result in one line.

    Raises:
        VrpoError: objectives that do not exist, images without labels, or a folder that holds something else.
    """
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise ConfigError(f"--objectives: there is no objective '{objective}': {nearest(objective, OBJECTIVES)}")
    if minutes <= 0:
        raise ConfigError(f"--minutes {minutes:g} is no time at all: give at least 0.5.")
    _check_folder(out, objectives)
    started = time.monotonic()
    training, held_out = _prepare(out, source, size)
    encoders = _fit_encoders(out, training, minutes, seed, source is None)
    base = _base_config(training, held_out, encoders, seed)

    speed = min(_measure(base, objective) for objective in objectives)
    left = time_to_train(minutes, time.monotonic() - started)
    budget, visits = plan_budget(base, speed, left / len(objectives))
    _say(f"Budget: {budget:,} images for each of {', '.join(objectives)}; about {left / 60:.1f} minutes to go.")
    runs = []
    for objective in objectives:
        run = out / "runs" / objective
        shutil.rmtree(run, ignore_errors=True)
        _train(_with_budget(base, objective, budget, visits), run)
        runs.append(run)
    report = out / "report.html"
    name = "handwritten digits" if source is None else source.name
    comparison = compare(runs, report, title=f"Alignment on {name}")
    return report, comparison.result


def _check_folder(out: Path, objectives: Sequence[str]) -> None:
    """Refuse a folder in which the demo would delete a run or replace a report that no demo made there."""
    for objective in objectives:
        run = out / "runs" / objective
        if run.is_dir() and any(run.iterdir()) and not _trained_on(run, out / "data"):
            raise ConfigError(f"{run} holds something that no demo in {out} made: choose another --out.")
    report = out / "report.html"
    if report.exists() and not any((out / "data").glob("training-*px")):
        raise ConfigError(f"{report} is no report of a demo in {out}: choose another --out.")


def _trained_on(run: Path, data: Path) -> bool:
    try:
        path = flatten(Run(run).config).get("data.path")
    except DataError:
        return False
    return isinstance(path, str) and Path(path).resolve().is_relative_to(data.resolve())


def _say(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)


def _prepare(out: Path, source: Path | None, size: int | None) -> tuple[Path, Path]:
    images = digits() if source is None else open_source(source)
    if not images.class_names:
        raise DataError(
            f"the images of {source} have no labels, and the demo fits its encoder to labels: put them into one folder "
            "a class, or use vrpo train with an encoder of your own."
        )
    side = size or (DIGITS_SIZE if source is None else IMAGES_SIZE)
    if side % 16:
        raise ConfigError(f"--size {side} is not a multiple of 16: use {max(16, round(side / 16) * 16)}.")
    folders = []
    for part, name in zip(split(images, HELD_OUT), ("training", "held-out"), strict=True):
        if not part.entries:
            raise DataError(f"{source} holds too few images ({len(images.entries)}) for the demo: give at least 100.")
        folder = out / "data" / f"{name}-{side}px"
        _say(prepare(part, folder, size=side, progress=sys.stderr.isatty()).summary().splitlines()[0])
        folders.append(folder)
    return folders[0], folders[1]


def _fit_encoders(out: Path, training: Path, minutes: float, seed: int, digits_only: bool) -> tuple[Path, Path]:
    """Fit the encoder that is aligned to, and a smaller one with another seed that only judges."""
    dataset = ShardedDataset(training)
    grid = dataset.image_size // 4
    # Digits need no more than this; how long other images need is not known, so they get a share of the time.
    length: dict[str, Any] = {"steps": DIGITS_STEPS} if digits_only else {"minutes": ENCODER_SHARE * minutes}
    files = []
    for name, width, own_seed in (("aligned", 64, seed), ("judge", 48, seed + 1)):
        file = out / f"encoder-{name}.safetensors"
        result = fit_encoder(dataset, file, width=width, grid=grid, seed=own_seed, progress=None, **length)
        _say(f"Encoder '{name}': {result.accuracy:.1%} of held-out images right after {result.seconds:.0f} s.")
        files.append(file)
    return files[0], files[1]


def _base_config(training: Path, held_out: Path, encoders: tuple[Path, Path], seed: int) -> RunConfig:
    values = merge(
        load_preset("demo"),
        {
            "seed": seed,
            "data": {"path": str(training), "validation": str(held_out)},
            "encoder": {"weights": str(encoders[0].absolute())},
            "evaluate": {"weights": str(encoders[1].absolute())},
        },
    )
    return validate(values, "preset demo").with_absolute_paths()


def time_to_train(minutes: float, spent: float) -> float:
    """Return the seconds for training, of which ``spent`` are gone.

    A machine that was slow so far takes longer than asked, rather than compare networks that have learned nothing.
    """
    return max(60 * minutes - spent, TRAINING_SHARE * 60 * minutes)


def plan_budget(base: RunConfig, speed: float, seconds: float) -> tuple[int, int]:
    """Return the images to train on, and how often to score them, so that one run takes about ``seconds``.

    ``speed`` is training's, in images a second. A visit draws and scores samples; a pass through the network without
    gradients costs a third of one with them. Short runs are visited less often.
    """
    batch = base.train.batch_size
    drawn = base.evaluate.samples + base.sample.rows * base.sample.columns
    passes = 1 if base.sample.guidance_scale == 1 else 2
    visit = drawn * base.sample.steps * passes / 3 / speed + VISIT_SECONDS
    for visits in (4, 2, 1):
        images = speed * (seconds - START_SECONDS - visits * visit)
        if images >= visits * LEAST_BETWEEN_VISITS:
            break
    step = visits * batch
    return max(int(images) // step, 1) * step, visits


def _with_budget(base: RunConfig, objective: str, images: int, visits: int) -> RunConfig:
    every = images // visits
    values = merge(
        merge(base.model_dump(), load_preset(f"demo-{objective}")),
        {
            "name": objective,
            "seed": base.seed,
            "train": {
                "images": images,
                "log_every": max(every // 4, base.train.batch_size),
                "validate_every": every,
                "evaluate_every": every,
                "sample_every": every,
            },
        },
    )
    return validate(values, "the demo")


def _measure(base: RunConfig, objective: str) -> float:
    """Return the training speed in images a second, that of the fastest of a few windows of steps.

    Other programs only ever slow a window down, so the fastest is what the machine can do; the first one warms up.
    """
    batch = base.train.batch_size
    values: dict[str, Any] = {
        "align": {"objective": objective},
        "train": {"images": CALIBRATION_STEPS * batch, "log_every": CALIBRATION_STEPS * batch // CALIBRATION_WINDOWS},
    }
    config = validate(merge(base.model_dump(), values), "the demo")
    speeds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="vrpo-") as folder:
        trainer = Trainer(
            config,
            Path(folder) / "run",
            say=lambda sentence: None,
            display=lambda report: speeds.append(report.record["images_per_second"]),
        )
        result = trainer.train()
    if result.signal is not None:
        raise KeyboardInterrupt
    return max(speeds)


def _train(config: RunConfig, run: Path) -> None:
    with TrainingDisplay(label=config.name) as display:
        result = Trainer(config, run, say=display.say, display=display.report, progress=display.progress).train()
    if result.signal is not None:
        raise KeyboardInterrupt
