"""Trains objectives and their ablations under one budget, several seeds each, and compares them.

    python benchmarks/objectives.py --preset cifar10-sit-ti-4 --data DATA --validation HELD_OUT --images 64k \
        --variants none repa vrpo vrpo-no-gate vrpo:align.vrpo.fidelity=2 --seeds 0 1 2 --jobs 2 --out OUT \
        --encoder.name NAME --encoder.weights FILE --encoder.cache True --evaluate.features NAME --evaluate.weights FILE

Every key of the configuration is an option, as for `vrpo train`, and holds for all runs; a variant's own changes go
before it. Each run is `vrpo train` in a process of its own. Repeated, the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from comparison import run_record, summarise, summary_table
from jobs import Job, Judge, Say, execute
from machine import describe
from variants import describe_variants, parse_variant
from vrpo.config import RunConfig
from vrpo.config_load import build_config, load_preset, merge
from vrpo.devices import resolve_device
from vrpo.errors import ConfigError, VrpoError
from vrpo.files import write_text
from vrpo.report.compare import compare
from vrpo.training.setup import build_parts

QUICK_IMAGES = 512
QUICK_NETWORK = {"name": "resnet10t", "weights": "random", "input_size": "16", "feature": "1"}
QUICK_EVALUATION = {
    "features": "resnet10t",
    "weights": "random",
    "input_size": "32",
    "samples": "32",
    "reference": "validation",
}


def plan(options: argparse.Namespace, words: Sequence[str]) -> list[Job]:
    """Return the jobs, all variants of the first seed before the second.

    Raises:
        ConfigError: a variant, a key or a value that is wrong, or two variants that are the same.
    """
    variants = [parse_variant(text) for text in options.variants]
    common: dict[str, Any] = {"train": {"keep_checkpoints": 1}, "data": {}}
    for section, key, value in (
        ("data", "path", options.data),
        ("data", "validation", options.validation),
        ("train", "images", options.images),
    ):
        if value is not None:
            common[section][key] = str(value)
    configs: dict[str, RunConfig] = {}
    for variant in variants:
        values = merge(load_preset(f"{options.preset}-{variant.objective}"), common)
        config = _absolute(build_config(values, [*words, *variant.words], f"preset {options.preset}"))
        config = config.model_copy(update={"name": variant.name, "seed": 0})
        for other, known in configs.items():
            if known == config.model_copy(update={"name": other}):
                raise ConfigError(f"the variants {other} and {variant.name} are the same: leave one out.")
        configs[variant.name] = config
    if len({variant.folder for variant in variants}) < len(variants):
        raise ConfigError("two variants have the same name: leave one out, or write LABEL@ before it.")
    runs = options.runs or options.out / "runs"
    return [
        Job(
            variant,
            seed,
            configs[variant.name].model_copy(update={"seed": seed}),
            runs / variant.folder / f"seed-{seed}",
            options.out / f"{variant.folder}-seed-{seed}.json",
            tuple(Judge.parse(text) for text in options.judge),
            options.judge_samples,
        )
        for seed in dict.fromkeys(options.seeds)
        for variant in variants
    ]


def _absolute(config: RunConfig) -> RunConfig:
    """Return the configuration with the paths of data and weights absolute, the same wherever it is asked for."""
    config = config.with_absolute_paths()
    sections = {}
    for name in ("encoder", "evaluate"):
        section = getattr(config, name)
        if section.weights is not None and Path(section.weights).is_file():
            sections[name] = section.model_copy(update={"weights": str(Path(section.weights).absolute())})
    return config.model_copy(update=sections)


def check_and_cache(jobs: Sequence[Job], say: Say) -> None:
    """Build the parts of every variant once: what does not fit is refused now, and token caches are filled.

    Raises:
        VrpoError: the first run that cannot be trained, with the variant's name.
    """
    checked = set()
    for job in jobs:
        job.check()
        if job.variant.name in checked or job.trained:
            continue
        checked.add(job.variant.name)
        try:
            build_parts(job.config, say)
        except VrpoError as error:
            raise type(error)(f"variant {job.variant.name}: {error}") from error


def quick_words(out: Path) -> tuple[Path, Path, list[str]]:
    """Prepare handwritten digits, and return the two data sets and a configuration that trains in seconds."""
    from vrpo.data.prepare import prepare
    from vrpo.demo import HELD_OUT, digits, split

    folders = []
    for part, name in zip(split(digits(), HELD_OUT), ("training", "held-out"), strict=True):
        folders.append(out / "data" / name)
        prepare(part, folders[-1], size=16, workers=1, progress=False)
    values = {
        **{f"encoder.{key}": value for key, value in QUICK_NETWORK.items()},
        **{f"evaluate.{key}": value for key, value in QUICK_EVALUATION.items()},
        **{f"train.{key}_every": "256" for key in ("validate", "evaluate", "sample", "checkpoint")},
        "train.log_every": "128",
        "train.validation_images": "64",
        "align.projector_width": "64",
        "sample.steps": "2",
    }
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    return folders[0], folders[1], words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Every key of the configuration is an option too, such as --encoder.name or --train.evaluate_every.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="cifar10-sit-ti-4", help="where all runs start from")
    parser.add_argument("--data", type=Path, help="prepared data set to train on")
    parser.add_argument("--validation", type=Path, help="prepared held-out data set")
    parser.add_argument("--images", help="budget of each run, such as 64k")
    parser.add_argument(
        "--variants", nargs="+", default=["none", "repa", "vrpo"], metavar="[LABEL@]NAME[:KEY=VALUE,..]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--baseline", help="variant that differences are to; default repa, else the first")
    parser.add_argument("--judge", action="append", default=[], metavar="NAME[=WEIGHTS]", help="also score in this")
    parser.add_argument("--judge-samples", type=int, help="samples for --judge; default as during training")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads in all")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default OUT/runs")
    parser.add_argument("--list", action="store_true", help="list the variants")
    parser.add_argument("--quick", action="store_true", help="seconds on handwritten digits, to try the benchmark")
    return parser


def read(words: Sequence[str]) -> tuple[argparse.Namespace, list[Job]]:
    """Return the options and the jobs that the words of the command line ask for.

    Raises:
        ConfigError: an option that is missing or wrong.
    """
    options, rest = _parser().parse_known_args(words)
    if options.out is None:
        raise ConfigError("--out is not set: give the folder of the results.")
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs} runs nothing: give at least 1.")
    if options.quick:
        options.preset, options.images = "demo", options.images or QUICK_IMAGES
        options.data, options.validation, quick = quick_words(options.out)
        rest = [*quick, *rest]
    jobs = plan(options, rest)
    names = list(dict.fromkeys(job.variant.name for job in jobs))
    options.baseline = options.baseline or ("repa" if "repa" in names else names[0])
    if options.baseline not in names:
        raise ConfigError(f"--baseline {options.baseline} is not among the variants: choose one of {', '.join(names)}.")
    return options, jobs


def main(words: Iterable[str] | None = None) -> int:
    """Train what is missing, write the results, and return 0, or 1 where a run failed."""
    given = sys.argv[1:] if words is None else list(words)
    if "--list" in given:
        print(describe_variants())
        return 0
    options, jobs = read(given)
    torch.set_num_threads(options.threads)
    check_and_cache(jobs, _say)
    failed = execute(jobs, options.jobs, options.threads, _say)
    _write_results(options, jobs, failed)
    return 1 if failed else 0


def _write_results(options: argparse.Namespace, jobs: Sequence[Job], failed: dict[str, str]) -> None:
    baseline = options.baseline
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    for job in jobs:
        if job.trained:
            record = run_record(job.run, job.variant, job.seed)
            records.append(record)
            write_text(job.record, json.dumps(record, indent=1) + "\n")
    if not records:
        return
    settings = {
        "preset": options.preset,
        "images": jobs[0].config.train.images,
        "seeds": list(dict.fromkeys(job.seed for job in jobs)),
        "jobs": options.jobs,
        "threads_each": max(1, options.threads // options.jobs),
        "machine": describe(resolve_device(jobs[0].config.train.device)),
    }
    summary = {"settings": settings, **summarise(records, baseline), "failed": failed}
    write_text(options.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    text = summary_table(summary)
    write_text(options.out / "summary.md", text + "\n")
    print(text)
    # The baseline's runs first: among groups of one objective the report takes the first as its baseline.
    trained = sorted((job for job in jobs if job.trained), key=lambda job: job.variant.name != baseline)
    report = options.out / "report.html"
    objective = trained[0].variant.objective
    compare([job.run for job in trained], report, title="Objectives compared", baseline=objective, json_file=True)
    print(f"\nReport: {report}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # A polite kill stops the runs as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except VrpoError as error:
        print(f"objectives: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("objectives: interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)
