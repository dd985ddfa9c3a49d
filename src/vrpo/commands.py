"""What each command takes, and the one call it makes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from vrpo.config import Count
from vrpo.errors import ConfigError, DataError, nearest

T = TypeVar("T")


def parse(command: type[T], words: Sequence[str], name: str, *, rest: bool = False) -> tuple[T, list[str]]:
    """Read ``words`` into a command's options; with ``rest``, also return the words it does not know.

    Raises:
        ConfigError: words that do not fit.
    """
    prog = f"vrpo {name}"
    if not rest and ("--help" in words or "-h" in words):
        tyro.cli(command, prog=prog, args=["--help"])
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options, unknown = tyro.cli(command, prog=prog, args=list(words), return_unknown_args=True)
    except SystemExit as stop:
        lines = [line.strip("╭╮╰╯│─ ") for line in output.getvalue().splitlines()[1:]]
        said = " ".join(line for line in lines if line and not line.startswith("For full")).rstrip(".")
        said = said.partition(" Argument helptext:")[0]
        raise ConfigError(f"{prog}: {said}: see `{prog} --help`.") from stop
    if unknown and not rest:
        choices = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command)]  # type: ignore[arg-type]
        raise ConfigError(f"{prog} has no option '{unknown[0]}': {nearest(unknown[0], choices)}")
    return options, list(unknown)


@dataclass
class Train:
    """Train a diffusion transformer. Every key of the configuration is an option, for example --train.images 2M."""

    preset: str | None = None
    """Starting point: a name that `vrpo presets` lists."""
    config: Path | None = None
    """Starting point: a YAML file, for example a run's config.yaml."""
    data: Path | None = None
    """Prepared data set; the same as --data.path."""
    out: Path | None = None
    """Folder of the run; default runs/NAME-seed-SEED."""
    resume: bool = False
    """Go on with the run in --out."""


def train(words: list[str]) -> int:
    """Train, from a preset, a file or the defaults, with overrides."""
    from vrpo.config import RunConfig
    from vrpo.config_load import build_config, load_file, load_preset, merge

    if "--help" in words or "-h" in words:
        with contextlib.suppress(SystemExit):
            tyro.cli(Train, prog="vrpo train", args=["--help"])
        print("\nOverrides, every key of the configuration:\n")
        tyro.cli(
            RunConfig,
            prog="vrpo train",
            default=RunConfig(),
            args=["--help"],
            config=(tyro.conf.FlagConversionOff,),
        )
    options, rest = parse(Train, words, "train", rest=True)
    if options.preset is not None and options.config is not None:
        raise ConfigError("give --preset or --config, not both: they are two starting points.")
    where, values = "the defaults", {}
    if options.preset is not None:
        where, values = f"preset {options.preset}", load_preset(options.preset)
    elif options.config is not None:
        where, values = str(options.config), load_file(options.config)
    elif options.resume and options.out is not None:
        where = str(options.out / "config.yaml")
        values = load_file(options.out / "config.yaml")
    if options.data is not None:
        values = merge(values, {"data": {"path": str(options.data)}})
    config = build_config(values, rest, where).with_absolute_paths()
    out = options.out or Path("runs") / f"{config.name}-seed-{config.seed}"

    from vrpo.display import TrainingDisplay
    from vrpo.training.trainer import train as run_training

    with TrainingDisplay() as display:
        result = run_training(
            config, out, resume=options.resume, say=display.say, display=display.report, progress=display.progress
        )
    print(f"{result.status.capitalize()} at {result.images:,} images, {result.seconds:.0f} s of training: {result.run}")
    return 0 if result.signal is None else 128 + result.signal


@dataclass
class Presets:
    """List the presets, or show the values of one."""

    name: Positional[str | None] = None
    """The preset to show."""
    full: bool = False
    """Show the whole configuration, defaults included."""


def presets(words: list[str]) -> int:
    """List or show presets."""
    import yaml

    from vrpo.config_load import load_preset, preset_names, to_yaml, validate

    options, _ = parse(Presets, words, "presets")
    if options.name is None:
        print("\n".join(preset_names()))
        return 0
    values = load_preset(options.name)
    config = validate(values, f"preset {options.name}")
    print(to_yaml(config) if options.full else yaml.safe_dump(values, sort_keys=False), end="")
    return 0


@dataclass
class Prepare:
    """Turn images (a folder, one sub-folder a class or flat, or a zip of the same) into a data set."""

    source: Positional[Path]
    """Folder or zip of images."""
    out: Positional[Path]
    """Folder to write."""
    size: int
    """Side in pixels after the centre crop."""
    flip: bool = False
    """Mirror at random in training."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """What to do with a file that cannot be read."""
    workers: int | None = None
    """Decoding processes; default one a core."""
    shard_mb: int = 256
    """Largest size of one shard, in MiB of pixels."""
    max_pixels: Count = 178_000_000
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
    print(result.summary())
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
    print(f"{counts.images:,} images of {done.size} x {done.size}, {classes}, from {manifest.source.name}")
    print(f"crop {done.crop}, resample {done.resample}, flip {done.flip}; fingerprint {manifest.fingerprint}")
    print(f"unreadable {counts.bad:,}, scaled up {counts.upscaled:,}, passed over {counts.ignored:,}")
    for name, count in zip(manifest.class_names, manifest.class_counts, strict=True):
        print(f"  {name}: {count:,}")
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
    minutes: float = 1.0
    """Training time."""
    width: int = 64
    """Channels of its tokens."""
    grid: int | None = None
    """Tokens along a side in the trunk it is for; default from the image size."""
    flips: bool = False
    """Mirror at random (wrong for digits and letters)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    device: str = "auto"
    """auto, cpu or cuda."""


def encoder_fit(words: list[str]) -> int:
    """Fit an encoder."""
    options, _ = parse(EncoderFit, words, "encoder fit")

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


@dataclass
class Drawing:
    """How images are drawn from a run; what is not given is as in the run's configuration."""

    sampler: Literal["ode-euler", "ode-heun", "sde", "ddpm", "ddim"] | None = None
    """Integrator."""
    steps: int | None = None
    """Integration steps."""
    guidance_scale: float | None = None
    """1: no guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Times, from 0 = data to 1 = noise, in which guidance acts."""
    labels: Literal["balanced", "random"] = "balanced"
    """Class labels: evenly over the classes, or uniform at random."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or trained weights."""
    batch_size: int | None = None
    """Images at once."""
    seed: int = 0
    """Sample i of a seed is one image, however many are drawn."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def settings(self) -> dict[str, Any]:
        """Return what was given, by the names of `SampleConfig`."""
        names = ("sampler", "steps", "guidance_scale", "guidance_interval", "batch_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class Sample:
    """Draw images from a run."""

    run: Positional[Path]
    """Folder of the run."""
    out: Path
    """A folder for PNG files, or a file: .npz (ADM layout) or .png (one grid)."""
    count: Count = 64
    """Images to draw."""
    columns: int = 8
    """Columns of a grid."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = dataclasses.field(default_factory=Drawing)


def sample(words: list[str]) -> int:
    """Draw images."""
    options, _ = parse(Sample, words, "sample")

    from vrpo.display import TrainingDisplay
    from vrpo.sampling import RunSampler, write_images
    from vrpo.training.setup import resolve_device

    drawing = options.drawing
    source = RunSampler(options.run, drawing.settings(), drawing.weights, resolve_device(drawing.device))
    with TrainingDisplay() as display:
        images, labels = source.draw(
            options.count, drawing.labels, drawing.seed, lambda done, total: display.progress("sampling", done, total)
        )
    write_images(images, labels, options.out, options.columns)
    print(f"{options.count:,} images of {options.run} at {source.loaded.images:,} training images: {options.out}")
    return 0


@dataclass
class Evaluate:
    """Score images against reference images in a feature network, and print the protocol beside the numbers."""

    source: Positional[Path]
    """A run, a folder or zip of images, an npz (ADM layout), or a prepared data set."""
    reference: Path
    """Prepared data set, folder, zip or npz to score against."""
    features: str
    """Feature network: a timm name, dinov2-vit-{s,b,l,g}, transformers:NAME, or a file of `vrpo encoder fit`."""
    features_weights: Path | None = None
    """Local weights file of the feature network."""
    features_size: int | None = None
    """Side its input is resized to; default its own."""
    metrics: tuple[Literal["fd", "kid", "precision", "recall"], ...] = ("fd", "kid", "precision", "recall")
    """What is computed."""
    samples: Count = 10_000
    """Images to draw, where the source is a run."""
    out: Path | None = None
    """JSON file to write; default in the run's folder, where the source is a run."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = dataclasses.field(default_factory=Drawing)


def evaluate(words: list[str]) -> int:
    """Score images."""
    options, _ = parse(Evaluate, words, "evaluate")

    import torch
    from rich.console import Console

    from vrpo.display import TrainingDisplay
    from vrpo.evaluation.evaluate import evaluate_images
    from vrpo.sampling import RunSampler
    from vrpo.training.setup import resolve_device
    from vrpo.vision.encoders import load_feature_network

    if not options.source.exists():
        raise DataError(f"there is nothing at {options.source}: give a run, a folder or an npz file.")
    drawing = options.drawing
    name, weights = options.features, options.features_weights
    if Path(name).suffix == ".safetensors" and weights is None:
        name, weights = "vrpo-conv", Path(name)
    device = resolve_device(drawing.device)
    network = load_feature_network(
        name, weights=weights, input_size=options.features_size, device=device, dtype=torch.float32
    )
    images: Any = options.source
    fields: dict[str, Any] = {}
    out, about = options.out, {}
    if (options.source / "config.yaml").is_file():
        source = RunSampler(options.source, drawing.settings(), drawing.weights, device)
        with TrainingDisplay() as display:
            images, _ = source.draw(
                options.samples,
                drawing.labels,
                drawing.seed,
                lambda done, total: display.progress("sampling", done, total),
            )
        fields = source.protocol(drawing.labels, drawing.seed)
        about = {"step": source.loaded.step, "images": source.loaded.images}
        out = out or options.source / "evaluations" / f"step-{source.loaded.step:08d}-{name.replace('/', '-')}.json"
    result = evaluate_images(
        images,
        options.reference,
        network,
        metrics=options.metrics,
        protocol_fields=fields,
        progress=sys.stderr.isatty(),
    )
    Console().print(result.table())
    if out is not None:
        result.save(out, **about)
        print(f"Written: {out}")
    return 0


@dataclass
class Compare:
    """Compare runs: metrics against images and seconds, speed-up at equal quality, samples side by side."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("report.html")
    """HTML file to write."""
    title: str | None = None
    """Title of the report."""
    baseline: str | None = None
    """Objective or label that the others are compared to; default none, else repa, else the first."""
    json: bool = False
    """Also write the comparison as JSON beside the report."""


def compare(words: list[str]) -> int:
    """Write a comparison."""
    options, _ = parse(Compare, words, "compare")
    if not options.runs:
        raise ConfigError("vrpo compare needs at least one run: vrpo compare RUN RUN --out report.html.")

    from vrpo.report.compare import compare as run_compare

    comparison = run_compare(
        options.runs, options.out, title=options.title, baseline=options.baseline, json_file=options.json
    )
    print(comparison.result)
    print(f"Report: {options.out}")
    return 0


@dataclass
class Demo:
    """Train without and with alignment on handwritten digits (or your images), evaluate, compare."""

    out: Path = Path("vrpo-demo")
    """Folder for data, runs and report."""
    data: Path | None = None
    """Folder or zip of your images, one sub-folder a class; default: handwritten digits."""
    size: int | None = None
    """Side in pixels for --data; default 32."""
    minutes: float = 4.0
    """Time for all of it."""
    objectives: tuple[str, ...] = ("none", "repa", "vrpo")
    """What is compared."""
    seed: int = 0
    """Seed of every run."""


def demo(words: list[str]) -> int:
    """Run the demo."""
    options, _ = parse(Demo, words, "demo")

    from vrpo.demo import run_demo

    report, headline = run_demo(
        options.out,
        source=options.data,
        size=options.size,
        minutes=options.minutes,
        objectives=options.objectives,
        seed=options.seed,
    )
    print(headline)
    print(f"Report: {report.resolve()}")
    return 0
