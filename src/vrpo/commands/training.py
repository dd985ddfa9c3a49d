"""The commands that train: ``train``, ``presets``, ``demo``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.outputs import tell
from vrpo.commands.parse import option_names, parse
from vrpo.config import Count, Positive, RunConfig, Seed
from vrpo.errors import ConfigError, VrpoError


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
    """Go on with the run in --out; --resume auto is the same."""
    rewind: Count | None = None
    """With --resume: go back to the newest checkpoint of at most this many images, past the data read since."""
    plugin: tuple[Path, ...] = ()
    """Python files to run first, for example one that registers a reward. Only name files that you trust."""


def train(words: list[str]) -> int:
    """Train, from a preset, a file or the defaults, with overrides."""
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

    from vrpo.processes import connect

    with connect() as world:
        with world.agreed():
            options, config, out = _read(words)

        from vrpo.display import TrainingDisplay
        from vrpo.training.trainer import train as run_training

        with TrainingDisplay(shown=world.first) as display:
            result = run_training(
                config,
                out,
                resume=options.resume,
                rewind=options.rewind,
                say=display.say,
                display=display.report,
                progress=display.progress,
                world=world,
            )
        if world.first:
            counts = f"{result.images:,} images, {result.seconds:.0f} s of training"
            go_on = "; go on with --resume" if result.status == "stopped" else ""
            tell(f"{result.status.capitalize()} at {counts}: {result.run}{go_on}")
    return 0 if result.signal is None else 128 + result.signal


def _read(words: list[str]) -> tuple[Train, RunConfig, Path]:
    """Return the options, the configuration and the run's folder that the words ask for."""
    from vrpo.config_load import build_config, load_file, load_preset, merge

    options, rest = parse(Train, list(_without_auto(words)), "train", rest=True)
    if options.preset is not None and options.config is not None:
        raise ConfigError("give --preset or --config, not both: they are two starting points.")
    if options.rewind is not None and not options.resume:
        raise ConfigError("--rewind goes back within a run: give --resume and --out too.")
    for file in options.plugin:
        _run_plugin(file)
    where, values = "the defaults", {}
    if options.preset is not None:
        where, values = f"preset {options.preset}", load_preset(options.preset)
    elif options.config is not None:
        where, values = str(options.config), load_file(options.config)
    elif options.resume and options.out is not None:
        if not (options.out / "config.yaml").is_file():
            raise ConfigError(
                f"there is no run at {options.out}: begin one with --preset or --config, or correct --out."
            )
        where = str(options.out / "config.yaml")
        values = load_file(options.out / "config.yaml", sealed=True)
    if options.data is not None:
        values = merge(values, {"data": {"path": str(options.data)}})
    config = build_config(values, rest, where, option_names(Train)).with_absolute_paths()
    out = options.out or Path("runs") / f"{config.name}-seed-{config.seed}"
    return options, config, out


def _without_auto(words: list[str]) -> Iterator[str]:
    """Yield the words with ``--resume auto``, as other trainers have it, for ``--resume``."""
    for before, word in zip(["", *words], words, strict=False):
        if word == "--resume=auto":
            yield "--resume"
        elif (before, word) != ("--resume", "auto"):
            yield word


def _run_plugin(file: Path) -> None:
    """Run a user's Python file, as they asked on the command line; a configuration cannot ask for it."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location(f"vrpo_plugin_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"--plugin {file} is not a Python file: give the path of one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except VrpoError:
        raise
    except Exception as error:  # the file may do anything
        said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise ConfigError(f"--plugin {file} failed ({said}): correct that file.") from error


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
class Demo:
    """Train without and with alignment on handwritten digits (or your images), evaluate, compare."""

    out: Path = Path("vrpo-demo")
    """Folder for data, runs and report."""
    data: Path | None = None
    """Folder or zip of your images, one sub-folder a class; default: handwritten digits."""
    size: Positive | None = None
    """Side in pixels for --data; default 32."""
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.5
    """Time for all of it."""
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("none", "repa", "vrpo")
    """What is compared."""
    seed: Seed = 0
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
    tell(headline)
    tell(f"Report: {report.resolve()}")
    return 0
