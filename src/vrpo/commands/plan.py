"""The command ``plan``: what a run takes, before it is started."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vrpo.commands.outputs import tell
from vrpo.commands.parse import option_names, parse
from vrpo.config import Count, Positive, RunConfig
from vrpo.errors import ConfigError
from vrpo.planning.machines import PER_MACHINE
from vrpo.untrusted import printable

if TYPE_CHECKING:
    from vrpo.planning.plan import DataFacts, Plan

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000


@dataclass
class PlanOptions:
    """Say what a run takes: parameters, operations, memory, disk, time and cost. Overrides are as in `vrpo train`."""

    preset: str | None = None
    """The run: a name that `vrpo presets` lists."""
    config: Path | None = None
    """The run: a YAML file, for example a run's config.yaml."""
    data: Path | None = None
    """Prepared data set that it is to train on; default what the preset says of it."""
    data_images: Annotated[Count, Field(gt=0)] | None = None
    """Images of a data set that is not prepared yet; default ImageNet's 1,281,167."""
    classes: Annotated[int, Field(ge=0)] | None = None
    """Classes of a data set that is not prepared yet; default ImageNet's 1,000."""
    gpu: str | None = None
    """Machine to plan for, such as h100; default h100."""
    count: Positive = 1
    """Number of those."""
    per_machine: Positive = PER_MACHINE
    """How many of them are in one machine, among which `train.parallel hybrid` divides the weights."""
    here: bool = False
    """Plan for this machine, and measure its speed for some seconds."""
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the peak rate that training reaches on --gpu; default 0.35."""
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Price of one machine an hour, in any currency."""
    json: bool = False
    """Print JSON."""


def plan(words: list[str]) -> int:
    """Plan a run."""
    options, rest = parse(PlanOptions, words, "plan", rest=not {"--help", "-h"} & set(words))
    config = _read_config(options, rest)
    if options.here and options.gpu is not None:
        raise ConfigError("give --gpu or --here, not both: the first is a machine that is not here.")
    if options.here and options.utilisation is not None:
        raise ConfigError("--utilisation is for machines that are not here: leave it out, --here measures the speed.")

    from vrpo.planning.machines import UTILISATION, find_machine
    from vrpo.planning.plan import make_plan

    data = _facts(options, config)
    if options.here:
        record = _plan_here(options, config, data)
    else:
        machine = find_machine(options.gpu or "h100")
        made = make_plan(config, data, count=options.count, reduced_encoders=True, per_machine=options.per_machine)
        utilisation = options.utilisation or UTILISATION
        rate, encoder_rate = machine.rate(made.precision), machine.rate("bf16")
        seconds = made.seconds(rate * utilisation, encoder_rate * utilisation)
        basis = f"assumed: {utilisation:.0%} of the peak of {options.count} x {machine.name}"
        record = _record(made, data, machine.name, machine.memory_gb * 1e9, seconds, basis, options)
    tell(json.dumps(record, indent=1) if options.json else _render(record))
    return 0


def _read_config(options: PlanOptions, rest: list[str]) -> RunConfig:
    from vrpo.config_load import build_config, load_file, load_preset
    from vrpo.training.setup import check_config

    if (options.preset is None) == (options.config is None):
        raise ConfigError("vrpo plan needs --preset NAME or --config FILE, one of the two: see `vrpo presets`.")
    if options.preset is not None:
        where, values = f"preset {options.preset}", load_preset(options.preset)
    else:
        where, values = str(options.config), load_file(Path(str(options.config)))
    config = build_config(values, rest, where, option_names(PlanOptions))
    check_config(config)
    return config


def _facts(options: PlanOptions, config: RunConfig) -> DataFacts:
    """Return what is known of the data: from the data set itself, or from the configuration and the options."""
    from vrpo.planning.plan import LATENT_CHANNELS, DataFacts
    from vrpo.planning.trace import DataShape

    path = options.data or config.data.path
    if path is not None:
        if options.data_images is not None or options.classes is not None:
            name = "--classes" if options.data_images is None else "--data-images"
            raise ConfigError(f"{name} describes data that is not prepared yet, and '{path}' is given: leave one out.")
        from vrpo.data.shards import ShardedDataset
        from vrpo.training.data_checks import check_data

        dataset = ShardedDataset(path)
        flip = dataset.manifest.preprocessing.flip == "random"
        check_data(config, dataset, flip if config.data.flip is None else config.data.flip)
        classes = dataset.num_classes if config.data.conditional else 0
        shape = DataShape(dataset.image_size, dataset.input_size, dataset.in_channels, classes)
        held = sum(shard.bytes for shard in dataset.manifest.shards)
        made = dataset.latents
        if made is None:
            return DataFacts(shape, len(dataset), flip, False, held)
        return DataFacts(shape, len(dataset), flip, True, held, made.posterior, made.autoencoder)
    size, latent = config.data.image_size, config.data.latent_size
    if size is None:
        raise ConfigError(
            "vrpo plan does not know the size of the images: give --data FOLDER, or --data.image-size N (and "
            "--data.latent-size N for latents)."
        )
    classes = IMAGENET_CLASSES if options.classes is None else options.classes
    shape = DataShape(size, latent or size, LATENT_CHANNELS if latent else 3, classes if config.data.conditional else 0)
    return DataFacts(shape, options.data_images or IMAGENET_IMAGES, config.data.flip is not False, latent is not None)


def _plan_here(options: PlanOptions, config: RunConfig, data: DataFacts) -> dict[str, Any]:
    import platform

    import torch

    from vrpo.devices import resolve_device
    from vrpo.planning.calibrate import measure
    from vrpo.planning.plan import make_plan

    device = resolve_device(config.train.device)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, available = found.name, float(found.total_memory)
    else:
        name = f"this CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
        available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    made = make_plan(
        config,
        data,
        count=options.count,
        reduced_encoders=device.type == "cuda",
        per_machine=options.per_machine,
    )
    speed = measure(config, data.shape, made, device=device, available=available)
    seconds = made.budget / (speed.images_per_second * options.count)
    basis = f"measured here with {speed.images} image{'s' * (speed.images > 1)} at once"
    return _record(made, data, name, available, seconds, basis, options)


def _record(
    made: Plan, data: DataFacts, machine: str, available: float, seconds: float, basis: str, options: PlanOptions
) -> dict[str, Any]:
    return {
        **made.to_dict(),
        "data": asdict(data),
        "machine": {
            "name": machine,
            "count": options.count,
            "memory_bytes": int(available),
            "fits": made.memory.fits(available),
        },
        "time": {
            "seconds": seconds,
            "images_per_second": made.budget / seconds,
            "basis": basis,
            "price_an_hour": options.price,
            "cost": options.price * options.count * seconds / 3600,
        },
    }


def _render(record: dict[str, Any]) -> str:
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{record['name']}: {record['model']}, {record['objective']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for section, rows in _sections(record):
        for name, value, note in rows:
            table.add_row(name, value, note)
        if section != "time":
            table.add_section()
    output = io.StringIO()
    Console(file=output, width=110, force_terminal=False).print(table)
    return output.getvalue().rstrip()


def _sections(record: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    flops, memory, disk, when = record["flops"], record["memory"], record["disk"], record["time"]
    machine, objective = record["machine"], record["objective"]
    several = f", {record['micro']} at a time" if record["micro"] < record["share"] else ""
    parameters = [(f"parameters, {name}", f"{count / 1e6:,.1f} M", "") for name, count in record["parameters"].items()]
    operations = [
        ("FLOPs an image, trunk", _gigaflops(flops["trunk_training"]), "forward and backward; a multiply-add is two"),
        ("FLOPs an image, objective", _gigaflops(flops["objective"]), objective),
        ("FLOPs an image, encoders", _gigaflops(flops["encoders"]), ", ".join(record["encoder_names"])),
        ("FLOPs an image, sampling", _gigaflops(flops["trunk_forward"]), "one step, without guidance"),
    ]
    if flops["autoencoder_encode"]:
        whose = _autoencoder(record["data"]["autoencoder"])
        operations += [
            (
                "FLOPs an image, encoding",
                _gigaflops(flops["autoencoder_encode"]),
                whose or "the autoencoder, in preparing",
            ),
            (
                "FLOPs an image, decoding",
                _gigaflops(flops["autoencoder_decode"]),
                whose or "the autoencoder, for a sample",
            ),
        ]
    held = [(f"memory, {part}", _gigabytes(memory[part]), note) for part, note in _PARTS.items()]
    fits = (
        "fits" if machine["fits"] else "does NOT fit: use train.micro_batch, model.checkpoint_blocks or more machines"
    )
    held.append(("memory, peak of one process", _gigabytes(memory["total"]), f"{machine['name']}: {fits}"))
    data = record["data"]
    mirrored = ", mirrored too" if data["flips"] else ""
    of_them = f"{mirrored}; latents {_gigabytes(disk['latents'])}" if data["latents"] else ""
    stored = [
        ("disk, prepared data", _gigabytes(disk["data"]), f"{data['images']:,} images{of_them}"),
        ("disk, checkpoints", _gigabytes(disk["checkpoints"]), "all that are kept at a time"),
    ]
    if disk["token_cache"]:
        kept = "kept (encoder.cache)" if record["caches_tokens"] else "not kept: computed online"
        stored.append(("disk, token cache", _gigabytes(disk["token_cache"]), f"{kept}{mirrored}"))
    steps = f"{-(-record['budget'] // record['batch']):,} steps of {record['batch']} images"
    rate = when["images_per_second"]
    times = [
        ("speed", f"{rate:,.1f} images/s" if rate >= 10 else f"{rate:.2g} images/s", when["basis"]),
        ("time", _duration(when["seconds"]), f"{steps}, {record['share']} a process{several}"),
    ]
    if machine["count"] > 1:
        hours = machine["count"] * when["seconds"] / 3600
        times.append(("machine hours", f"{hours:,.1f} h", f"{machine['count']} at once"))
    if when["price_an_hour"]:
        times.append(("cost", f"{when['cost']:,.2f}", f"at {when['price_an_hour']:g} an hour for each"))
    return [
        ("parameters", parameters),
        ("operations", operations),
        ("memory", held),
        ("disk", stored),
        ("time", times),
    ]


_PARTS = {
    "weights": "",
    "ema": "averaged weights",
    "moments": "of the optimiser",
    "objective": "projectors: weights, moments, copies",
    "encoders": "",
    "gradients": "at the peak",
    "activations": "and all else of a step at the peak",
}


def _autoencoder(made: str | None) -> str | None:
    """Return whose operations are counted where the data is not of Stable Diffusion's autoencoder."""
    name = Path(made or "").name
    if name.startswith("sd-vae"):
        return None
    recorded = f"'{printable(name)}'" if made else "not recorded"
    return f"Stable Diffusion's; the data's: {recorded}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _gigaflops(operations: float) -> str:
    return f"{operations / 1e9:,.1f} GFLOP"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours:,.1f} h ({hours / 24:,.1f} days)"
    return f"{hours:,.1f} h" if hours >= 1 else f"{seconds / 60:,.1f} min"
