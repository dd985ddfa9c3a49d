"""The commands about numbers: ``evaluate``, ``evaluate stats`` and ``evaluate parity``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional

from vrpo.commands.alone import refuse_processes
from vrpo.commands.images import Drawing
from vrpo.commands.outputs import check_output, check_result, tell
from vrpo.commands.parse import parse
from vrpo.config import Count
from vrpo.errors import ConfigError, DataError
from vrpo.files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vrpo.evaluation.evaluate import EvaluationResult
    from vrpo.evaluation.features import FeatureNetwork
    from vrpo.evaluation.images import ImageSet
    from vrpo.evaluation.protocol import SamplingFields
    from vrpo.evaluation.reference import Reference
    from vrpo.sampling import RunSampler

Metric = Literal["fd", "sfid", "is", "kid", "precision", "recall"]
SAMPLES = 10_000


@dataclass
class Judge:
    """The network whose features are compared."""

    features: str
    """Feature network: inception, dinov2-vit-{s,b,l,g}, a timm name, transformers:NAME, or a file of `vrpo encoder
    fit`."""
    features_weights: str | None = None
    """Local weights file of the feature network, or random."""
    features_size: Annotated[int, Field(ge=8)] | None = None
    """Side its input is resized to; default its own."""

    def load(self, device: torch.device) -> FeatureNetwork:
        """Return the network, in float32."""
        import torch

        from vrpo.vision.encoders import load_feature_network

        return load_feature_network(
            self.features,
            weights=self.features_weights,
            input_size=self.features_size,
            device=device,
            dtype=torch.float32,
        )


@dataclass
class Evaluate:
    """Score images against reference images in a feature network, and print the protocol beside the numbers."""

    sources: Positional[tuple[Path, ...]]
    """Runs or their checkpoints, folders or zips of images, npz files (ADM layout), or prepared data sets."""
    reference: Path
    """Prepared data set, folder, zip or npz (ADM reference, or of `vrpo evaluate stats`) to score against."""
    judge: tyro.conf.OmitArgPrefixes[Judge]
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    """What is computed; default fd, sfid, is, precision and recall by inception, fd, kid, precision and recall else."""
    samples: Annotated[Count, Field(gt=1)] | None = None
    """Images to score: drawn from a run (default 10,000), or the first of a folder or file (default all)."""
    out: Path | None = None
    """JSON file to write; default in the folder of each run."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = dataclasses.field(default_factory=Drawing)


def evaluate(words: list[str]) -> int:
    """Score images."""
    refuse_processes("evaluate")
    options, _ = parse(Evaluate, words, "evaluate")
    if not options.sources:
        raise ConfigError("vrpo evaluate needs something to score: vrpo evaluate RUN --reference R --features F.")

    from rich.console import Console

    from vrpo.devices import resolve_device
    from vrpo.evaluation.evaluate import check_reference, chosen_metrics, results_table, write_json
    from vrpo.evaluation.reference import load_reference

    for source in options.sources:
        if not source.exists():
            raise DataError(f"there is nothing at {source}: give a run, a folder or an npz file.")
    _check_reference_path(options.reference)
    if options.out is not None:
        check_result(options.out, ".json", (*options.sources, options.reference))
    device = resolve_device(options.drawing.device)
    network = options.judge.load(device)
    metrics = chosen_metrics(options.metrics, network)
    # Everything that can be refused is asked for before any image is drawn, which may take hours.
    _check_count(options.samples, metrics)
    subjects = [_Subject.find(source, options) for source in options.sources]
    sampler: RunSampler | None = None
    # Every run is loaded to see that it can be, and again in its turn: memory holds one network at a time.
    for subject in subjects:
        sampler = None
        sampler = subject.sampler(options, device)
    reference = load_reference(options.reference, network, progress=sys.stderr.isatty())
    check_reference(reference, metrics)
    results: dict[str, EvaluationResult] = {}
    records = []
    try:
        for subject in subjects:
            if len(subjects) > 1:
                sampler = None
                sampler = subject.sampler(options, device)
            result = subject.score(sampler, reference, network, metrics, options)
            about = {} if sampler is None else {"step": sampler.loaded.step, "images": sampler.loaded.images}
            results[str(subject.source)] = result
            records.append(result.record(source=str(subject.source), **about))
            if options.out is not None:
                write_json(options.out, records[0] if len(subjects) == 1 else {"evaluations": records})
                tell(f"Written: {options.out}")
            elif sampler is not None and subject.run is not None:
                out = subject.run / "evaluations" / _file_name(sampler.loaded.step, options.judge.features, result)
                result.save(out, **about)
                tell(f"Written: {out}")
    finally:  # what is scored is told, whatever stops the next
        if results:
            Console().print(results_table(results) if len(results) > 1 else next(iter(results.values())).table())
    return 0


@dataclass(frozen=True)
class _Subject:
    """Something to score: images with the record of how they were drawn, or the folder of a run that draws them."""

    source: Path
    run: Path | None = None
    images: ImageSet | None = None
    record: SamplingFields | None = None

    @classmethod
    def find(cls, source: Path, options: Evaluate) -> _Subject:
        """Tell what ``source`` is; raises where images cannot be listed, or a run's results not be written."""
        from vrpo.evaluation.images import first_images, open_images
        from vrpo.evaluation.protocol import sampling_record

        run = next((path for path in (source, source.parent.parent) if (path / "config.yaml").is_file()), None)
        if run is None or (run != source and not (source / "state.json").is_file()):
            images = open_images(source)
            if options.samples is not None:
                images = first_images(images, options.samples)
            return cls(source, images=images, record=sampling_record(source))
        if options.out is None:
            check_output(run / "evaluations", folder=True)
        return cls(source, run)

    def sampler(self, options: Evaluate, device: torch.device) -> RunSampler | None:
        """Load the run; None for images."""
        from vrpo.sampling import RunSampler

        if self.run is None:
            return None
        drawing = options.drawing
        return RunSampler(
            self.source, drawing.settings(), drawing.weights, device, drawing.compile, drawing.selection()
        )

    def score(
        self,
        sampler: RunSampler | None,
        reference: Reference,
        network: FeatureNetwork,
        metrics: tuple[str, ...],
        options: Evaluate,
    ) -> EvaluationResult:
        from vrpo.display import TrainingDisplay
        from vrpo.evaluation.evaluate import evaluate_images

        if sampler is None:
            assert self.images is not None
            return evaluate_images(
                self.images,
                reference,
                network,
                metrics=metrics,
                protocol_fields=dict(self.record or {}),
                progress=sys.stderr.isatty(),
            )
        drawing = options.drawing
        with TrainingDisplay() as display:
            drawn = _drawn(sampler, self.source.name, options.samples or SAMPLES, drawing, display.progress)
            fields = sampler.protocol(drawing.labels, drawing.seed)
            return evaluate_images(drawn, reference, network, metrics=metrics, protocol_fields=fields)


def _drawn(
    run: RunSampler, name: str, count: int, drawing: Drawing, progress: Callable[[str, int, int], None]
) -> ImageSet:
    """Return images that are drawn while they are scored: memory holds one batch of them.

    They come in the batches of a file that held them, which the last digits of features depend on.
    """
    from vrpo.evaluation.images import ImageSet, regroup

    labels = run.labels(count, drawing.labels, drawing.seed)

    def batches(size: int) -> Iterator[Tensor]:
        told = partial(progress, "sampling and scoring")
        yield from regroup(
            run.sampler.batches(range(count), labels, drawing.seed, lambda done: told(done, count)), size
        )

    return ImageSet(name, count, batches)


def _check_reference_path(reference: Path) -> None:
    if not reference.exists():
        raise DataError(f"there is nothing at --reference {reference}: give a data set, a folder or an npz.")


def _check_count(samples: int | None, metrics: tuple[str, ...]) -> None:
    from vrpo.evaluation.evaluate import least_images

    if samples is not None and samples < least_images(metrics):
        raise ConfigError(
            f"--samples {samples} is too few for {', '.join(metrics)}: give at least {least_images(metrics)}."
        )


def _file_name(step: int, network: str, result: EvaluationResult) -> str:
    """Return a name that is the same only for the same step, metrics and protocol."""
    content = json.dumps([sorted(result.metrics), result.protocol], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    name = "vrpo-conv" if Path(network).suffix == ".safetensors" else network
    return f"step-{step:08d}-{re.sub('[^A-Za-z0-9._]+', '-', name).strip('-')}-{digest}.json"


@dataclass
class Stats:
    """Save the statistics of reference images: a file that `vrpo evaluate --reference` takes in their place."""

    source: Positional[Path]
    """Prepared data set, folder or zip of images, or npz (ADM layout)."""
    out: Path
    """File to write (.npz): mu and sigma, mu_s and sigma_s by inception, and the vectors of at most 10,000 images."""
    judge: tyro.conf.OmitArgPrefixes[Judge]
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Images at once."""
    device: str = "auto"
    """auto, cpu or cuda."""


def stats(words: list[str]) -> int:
    """Save reference statistics."""
    refuse_processes("evaluate stats")
    options, _ = parse(Stats, words, "evaluate stats")
    if not options.source.exists():
        raise DataError(f"there is nothing at {options.source}: give a data set, a folder, a zip or an npz file.")
    check_result(options.out, ".npz", [options.source])

    from vrpo.devices import resolve_device
    from vrpo.evaluation.reference import load_reference

    network = options.judge.load(resolve_device(options.device))
    reference = load_reference(options.source, network, batch_size=options.batch_size, progress=sys.stderr.isatty())
    with replacing(options.out) as unfinished:
        reference.save(unfinished)
    count = "" if reference.record.count is None else f" of {reference.record.count:,} images"
    tell(f"Statistics in {reference.features.name} features{count}, {reference.statistics.width:,} wide: {options.out}")
    return 0


@dataclass
class Parity:
    """Score a pair of sample and reference files, and compare with the values published for them."""

    samples: Positional[Path]
    """Sample file: npz in ADM layout, folder or zip."""
    reference: Positional[Path]
    """Reference file: npz in ADM layout, or any reference."""
    judge: tyro.conf.OmitArgPrefixes[Judge] = dataclasses.field(default_factory=lambda: Judge("inception"))
    expect: tuple[str, ...] = ()
    """Published values, such as fd=2.27 sfid=4.6 is=278.2 precision=0.83 recall=0.57."""
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    """Largest relative difference that counts as the same number."""
    out: Path | None = None
    """JSON file to write."""
    device: str = "auto"
    """auto, cpu or cuda."""


def parity(words: list[str]) -> int:
    """Compare with published values; the exit code is 1 where one differs."""
    refuse_processes("evaluate parity")
    options, _ = parse(Parity, words, "evaluate parity")

    from rich.console import Console

    from vrpo.devices import resolve_device
    from vrpo.evaluation.evaluate import evaluate_images
    from vrpo.evaluation.parity import compare_published, parse_expected
    from vrpo.evaluation.protocol import sampling_record

    expected = parse_expected(options.expect)
    for path in (options.samples, options.reference):
        if not path.exists():
            raise DataError(f"there is nothing at {path}: give an npz file, a folder or a zip of images.")
    if options.out is not None:
        check_result(options.out, ".json", (options.samples, options.reference))
    record = sampling_record(options.samples)
    network = options.judge.load(resolve_device(options.device))
    result = evaluate_images(
        options.samples,
        options.reference,
        network,
        metrics=tuple(expected) or None,
        protocol_fields=dict(record),
        progress=sys.stderr.isatty(),
    )
    comparison = compare_published(result, expected, options.tolerance)
    Console().print(comparison.table())
    if options.out is not None:
        result.save(options.out, published=comparison.record())
        tell(f"Written: {options.out}")
    return 0 if comparison.agrees else 1
