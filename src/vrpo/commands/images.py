"""The commands about images: ``sample`` and ``compare``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.outputs import check_output, check_page, tell
from vrpo.commands.parse import parse
from vrpo.config import Count, Positive, Seed
from vrpo.errors import ConfigError

if TYPE_CHECKING:
    from vrpo.sampling.candidates import Selection
    from vrpo.sampling.draw import Outputs

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
    guidance_channels: Positive | None = None
    """Channels, from the first, that guidance acts on; default all. The code of DiT and SiT guides 3 of their 4."""
    labels: Literal["balanced", "random"] = "balanced"
    """Class labels: evenly over the classes, or uniform at random."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or trained weights."""
    batch_size: Positive | None = None
    """Images that are kept at once, and lost at an interruption; they are the same whatever it is."""
    compute_batch: Positive | None = None
    """Images that the network sees at once, which their last digits depend on; default as suits the device."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast precision of the network; the state is float64."""
    compile: bool = False
    """Compile the network's blocks."""
    seed: Seed = 0
    """Sample i of a seed is one image, however many are drawn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    decoder: str | None = None
    """Where the autoencoder of the latents lies; default as recorded."""
    any_decoder: bool = False
    """Decode with it even if it is not the one that made the latents."""
    candidates: Positive = 1
    """Trajectories that begin for each image; the network's own representation chooses the one that goes on."""
    select_at: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Time, from 0 = data to 1 = noise, at which one of several candidates is chosen; default 0.5."""
    select: Literal["best", "resample"] | None = None
    """Go on with the candidate closest to its class (best, the default), or draw one by its group-relative weight."""

    def selection(self) -> Selection | None:
        """Return how one of several candidates is chosen, None for a single one.

        Raises:
            ConfigError: it is said how, but there is one candidate only.
        """
        from vrpo.sampling.candidates import Selection

        if self.candidates > 1:
            return Selection(self.candidates, self.select_at or 0.5, self.select or "best")
        given = "--select-at" if self.select_at is not None else "--select" if self.select is not None else None
        if given is not None:
            raise ConfigError(f"{given} is about several candidates, and there is one: give --candidates 4.")
        return None

    def settings(self) -> dict[str, Any]:
        """Return what was given, by the names of `SampleConfig`."""
        guidance = ("guidance_scale", "guidance_interval", "guidance_channels")
        names = ("sampler", "steps", *guidance, "batch_size", "compute_batch", "precision", "decoder")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | ({"any_decoder": True} if self.any_decoder else {})


@dataclass
class Sample:
    """Draw images from a run; by several processes: torchrun --nproc-per-node N -m vrpo sample ..."""

    run: Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    out: Path
    """A folder for PNG files, or a file: .npz (ADM layout) or .png (one grid)."""
    count: Annotated[Count, Field(gt=0)] = 64
    """Images to draw."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Names (or numbers) of the classes to draw; default all."""
    npz: Path | None = None
    """Also an npz (ADM layout), beside a folder."""
    grid: Path | None = None
    """Also a picture (.png) of the first images, as many rows as columns."""
    columns: Positive = 8
    """Columns of a grid."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = dataclasses.field(default_factory=Drawing)


def sample(words: list[str]) -> int:
    """Draw images."""
    from vrpo.processes import connect, local_device

    with connect(go_on="run the same command again") as world:
        with world.agreed():
            options, _ = parse(Sample, words, "sample")

            from vrpo.devices import resolve_device
            from vrpo.display import TrainingDisplay
            from vrpo.sampling import RunSampler, find_class
            from vrpo.sampling.draw import Order, Outputs, draw_images

            drawing, outputs = options.drawing, Outputs(options.out, options.npz, options.grid, options.columns)
            _check_outputs(outputs)
            device = resolve_device(local_device(drawing.device, world))
            source = RunSampler(
                options.run, drawing.settings(), drawing.weights, device, drawing.compile, drawing.selection()
            )
            loaded = source.loaded
            classes = tuple(
                find_class(name, loaded.class_names, loaded.network.num_classes) for name in options.classes
            )
        order = Order(options.count, drawing.seed, drawing.labels, classes)
        if world.first:
            with TrainingDisplay() as display:
                draw_images(
                    source, order, outputs, world, lambda done, total: display.progress("sampling", done, total)
                )
            where = ", ".join(str(path) for path in (outputs.out, outputs.npz, outputs.grid) if path is not None)
            tell(f"{options.count:,} images of {options.run} at {loaded.images:,} training images: {where}")
        else:
            draw_images(source, order, outputs, world)
    return 0


def _check_outputs(outputs: Outputs) -> None:
    """Refuse outputs of the wrong kind, or where nothing can be written."""
    from vrpo.sampling import image_format

    check_output(outputs.out, folder=image_format(outputs.out) == "folder")
    for name, path, suffix in (("npz", outputs.npz, ".npz"), ("grid", outputs.grid, ".png")):
        if path is None:
            continue
        if path.suffix != suffix:
            raise ConfigError(f"--{name} {path} is no {suffix} file: give the name of one.")
        if path == outputs.out:
            raise ConfigError(f"--{name} and --out are both {path}: give each a name of its own.")
        check_output(path)


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
    check_page(options.out)

    from vrpo.report.compare import compare as run_compare

    comparison = run_compare(
        options.runs, options.out, title=options.title, baseline=options.baseline, json_file=options.json
    )
    tell(comparison.result)
    tell(f"Report: {options.out}")
    return 0
