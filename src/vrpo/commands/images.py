"""The commands about images and numbers: ``sample``, ``evaluate``, ``compare``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.outputs import check_output
from vrpo.commands.parse import parse
from vrpo.config import Count, Positive, Seed
from vrpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vrpo.evaluation.evaluate import EvaluationResult
    from vrpo.evaluation.features import Reference

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class Drawing:
    """How images are drawn from a run; what is not given is as in the run's configuration."""

    sampler: Literal["ode-euler", "ode-heun", "sde", "ddpm", "ddim"] | None = None
    """Integrator."""
    steps: Positive | None = None
    """Integration steps."""
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """1: no guidance."""
    guidance_interval: tuple[Finite, Finite] | None = None
    """Times, from 0 = data to 1 = noise, in which guidance acts."""
    labels: Literal["balanced", "random"] = "balanced"
    """Class labels: evenly over the classes, or uniform at random."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or trained weights."""
    batch_size: Positive | None = None
    """Images at once."""
    seed: Seed = 0
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
    count: Annotated[Count, Field(gt=0)] = 64
    """Images to draw."""
    columns: Positive = 8
    """Columns of a grid."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = dataclasses.field(default_factory=Drawing)


def sample(words: list[str]) -> int:
    """Draw images."""
    options, _ = parse(Sample, words, "sample")

    from vrpo.display import TrainingDisplay
    from vrpo.sampling import RunSampler, image_format, write_images
    from vrpo.training.setup import resolve_device

    drawing, kind = options.drawing, image_format(options.out)
    source = RunSampler(options.run, drawing.settings(), drawing.weights, resolve_device(drawing.device))
    check_output(options.out, folder=kind == "folder")
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
    features_size: Annotated[int, Field(ge=8)] | None = None
    """Side its input is resized to; default its own."""
    metrics: Annotated[tuple[Literal["fd", "kid", "precision", "recall"], ...], Field(min_length=1)] = (
        "fd",
        "kid",
        "precision",
        "recall",
    )
    """What is computed."""
    samples: Annotated[Count, Field(gt=1)] = 10_000
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
    from vrpo.evaluation.features import load_reference
    from vrpo.sampling import RunSampler
    from vrpo.training.setup import resolve_device
    from vrpo.vision.encoders import load_feature_network

    if not options.source.exists():
        raise DataError(f"there is nothing at {options.source}: give a run, a folder or an npz file.")
    if not options.reference.exists():
        raise DataError(f"there is nothing at --reference {options.reference}: give a data set, a folder or an npz.")
    is_run = (options.source / "config.yaml").is_file()
    if options.out is not None:
        check_output(options.out)
    elif is_run:
        check_output(options.source / "evaluations", folder=True)
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
    about: dict[str, int] = {}
    # Everything that can be refused is asked for before the images are drawn, which may take hours.
    run = None
    if is_run:
        run = RunSampler(options.source, drawing.settings(), drawing.weights, device)
        _check_count(options.samples, options.metrics)
    reference = load_reference(options.reference, network, progress=sys.stderr.isatty())
    if run is not None:
        _check_reference(reference, options.metrics)
        with TrainingDisplay() as display:
            images, _ = run.draw(
                options.samples,
                drawing.labels,
                drawing.seed,
                lambda done, total: display.progress("sampling", done, total),
            )
        fields = run.protocol(drawing.labels, drawing.seed)
        about = {"step": run.loaded.step, "images": run.loaded.images}
    result = evaluate_images(
        images,
        reference,
        network,
        metrics=options.metrics,
        protocol_fields=fields,
        progress=sys.stderr.isatty(),
    )
    Console().print(result.table())
    out = options.out
    if out is None and run is not None:
        out = options.source / "evaluations" / _file_name(run.loaded.step, name, result)
    if out is not None:
        result.save(out, **about)
        print(f"Written: {out}")
    return 0


def _file_name(step: int, network: str, result: EvaluationResult) -> str:
    """Return a name that is the same only for the same step, metrics and protocol."""
    content = json.dumps([sorted(result.metrics), result.protocol], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"step-{step:08d}-{re.sub('[^A-Za-z0-9._]+', '-', network).strip('-')}-{digest}.json"


def _least_images(metrics: Sequence[str]) -> int:
    from vrpo.evaluation.precision_recall import NEIGHBOURS

    return NEIGHBOURS + 1 if {"precision", "recall"} & set(metrics) else 2


def _check_count(samples: int, metrics: Sequence[str]) -> None:
    if samples < _least_images(metrics):
        raise ConfigError(
            f"--samples {samples} is too few for {', '.join(metrics)}: give at least {_least_images(metrics)}."
        )


def _check_reference(reference: Reference, metrics: Sequence[str]) -> None:
    needing = [metric for metric in metrics if metric != "fd"]
    if not needing:
        return
    if reference.vectors is None:
        raise DataError(
            f"--reference {reference.record.name} holds only the mean and covariance of features, and "
            f"{', '.join(needing)} need images: give the images, or --metrics fd."
        )
    if len(reference.vectors) < _least_images(metrics):
        raise DataError(
            f"--reference {reference.record.name} holds {len(reference.vectors)} images, too few for "
            f"{', '.join(metrics)}: give at least {_least_images(metrics)}."
        )


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
    check_output(options.out)

    from vrpo.report.compare import compare as run_compare

    comparison = run_compare(
        options.runs, options.out, title=options.title, baseline=options.baseline, json_file=options.json
    )
    print(comparison.result)
    print(f"Report: {options.out}")
    return 0
