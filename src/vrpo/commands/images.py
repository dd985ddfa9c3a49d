"""The commands about images: ``sample`` and ``compare``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.outputs import check_output
from vrpo.commands.parse import parse
from vrpo.config import Count, Positive, Seed
from vrpo.errors import ConfigError

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
