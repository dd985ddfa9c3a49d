"""The commands between runs and published checkpoints: ``export`` and ``import``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vrpo.commands.outputs import check_output, check_result, tell
from vrpo.commands.parse import parse
from vrpo.errors import ConfigError

Layout = Literal["dit", "sit", "repa", "reg"]
SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass
class Export:
    """Write a run's weights as the code of DiT, SiT, REPA or REG reads them."""

    run: Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    out: Path
    """File to write: .safetensors, which says what it is, or .pt, as the original code saves."""
    layout: Layout | None = None
    """Whose code reads it; default as the model is."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or trained weights."""


def export(words: list[str]) -> int:
    """Export a run."""
    options, _ = parse(Export, words, "export")
    if options.out.suffix not in SUFFIXES and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is no weights file: end its name in .safetensors or .pt.")
    check_result(options.out, options.out.suffix, (options.run,))

    from vrpo.publish.export import export_run

    done = export_run(options.run, options.out, options.layout, options.weights)
    loaded = done.loaded
    tell(
        f"{loaded.config.model.name} of {options.run} at {loaded.images:,} training images, weights {options.weights}, "
        f"layout {done.layout}: {options.out}"
    )
    if done.without is not None:
        tell(f"It holds no projectors, without which the code of {done.layout} refuses it: {done.without}.")
    elif done.projectors:
        average = "; they are as trained, for a run averages the network alone" if options.weights == "ema" else ""
        tell(f"Projectors in it: {done.projectors}{average}.")
    return 0


@dataclass
class Import:
    """Make a run of a published checkpoint of DiT, SiT, REPA or REG, to sample and evaluate."""

    file: Positional[Path]
    """The checkpoint: .safetensors or .pt, of which nothing is executed."""
    layout: Layout
    """Whose code wrote it."""
    out: Path
    """Folder of the run to make."""
    preset: str | None = None
    """Its configuration: a name that `vrpo presets` lists, such as imagenet256-sit-xl-2."""
    config: Path | None = None
    """Its configuration: a YAML file."""
    class_names: Path | None = None
    """Text file with the name of a class on each line."""


def import_(words: list[str]) -> int:
    """Import a checkpoint."""
    options, _ = parse(Import, words, "import")
    if (options.preset is None) == (options.config is None):
        raise ConfigError(
            "vrpo import needs one configuration: give --preset, such as imagenet256-sit-xl-2, or --config FILE."
        )

    from vrpo.config_load import load_file, load_preset
    from vrpo.publish.importing import import_run

    if options.preset is not None:
        where, values = f"preset {options.preset}", load_preset(options.preset)
    else:
        assert options.config is not None
        where, values = str(options.config), load_file(options.config)
    if not options.out.is_dir():
        check_output(options.out)
    done = import_run(options.file, options.layout, values, where, options.out, options.class_names)
    tell(f"{done.config.model.name} with {done.classes:,} classes of {options.file}: {options.out}")
    if options.layout == "repa" and not done.projectors:
        tell(
            "The file has no projectors, which REPA's have: if it is of the original SiT, whose time runs the other "
            "way, images will be noise, and --layout sit is right."
        )
    return 0
