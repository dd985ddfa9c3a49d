"""The commands about images and numbers: ``sample``, ``evaluate``, ``compare``."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from vrpo.commands.parse import parse
from vrpo.config import Count
from vrpo.errors import ConfigError, DataError


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
