"""The loop: from a batch on disk to a step of the weights, and what happens every so many images."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo.config import RunConfig
from vrpo.config_load import to_yaml
from vrpo.data.loader import Batch, Loader
from vrpo.data.transforms import to_float
from vrpo.errors import CheckpointError, ConfigError, DataError, EvaluationError
from vrpo.files import load_into, write_text
from vrpo.runs import flatten
from vrpo.sampling import DTYPES, ImageSampler
from vrpo.training.checkpoint import Checkpoint, load_newest, save_checkpoint
from vrpo.training.ema import Ema
from vrpo.training.observe import Validation, save_grid
from vrpo.training.optim import Optimizer
from vrpo.training.setup import Parts, build_parts, facts
from vrpo.training.step import DenoisingStep, draw_step
from vrpo.training.stop import StopRequest
from vrpo.training.telemetry import BinnedMean, Journal, Meter, Stopwatch, Window, memory_mb, plain

TIME_BINS = 10
DEFAULT_LOG_STEPS = 50

# What a resumed run may change: nothing that shapes the weights. Data and encoders are told by their fingerprints,
# wherever their files lie.
FREE_KEYS = (
    "name",
    "data.path",
    "data.validation",
    "data.prefetch",
    "train.device",
    "train.compile",
    "train.keep_checkpoints",
)
FREE_ENDINGS = ("_every", "encoder.weights")
FREE_SECTIONS = ("sample.", "evaluate.")
# Objectives in which nothing depends on how long the run will be.
TIMELESS = ("none", "repa", "irepa", "contrastive")


class NonFiniteError(CheckpointError):
    """Training met too many non-finite steps in a row."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its folder, status ("finished" or "stopped"), and counters."""

    run: Path
    status: str
    step: int
    images: int
    seconds: float
    signal: int | None = None


@dataclass(frozen=True)
class Report:
    """What a training display is told at every telemetry record."""

    step: int
    images: int
    budget: int
    record: dict[str, Any]


class Trainer:
    """One run in one folder."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        *,
        resume: bool = False,
        say: Callable[[str], None] = print,
        display: Callable[[Report], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Build the run in folder ``run``, or take up the one that is there.

        Raises:
            VrpoError: a configuration, data set, encoder or checkpoint that cannot be used.
        """
        self.run, self.say, self._display = run, say, display
        self._claim_folder(config, resume)
        _say_what_is_idle(config, say)
        self.parts: Parts = build_parts(config, say, progress)
        self.config = config
        self.step, self.images, self.seconds = 0, 0, 0.0
        parts, train = self.parts, config.train
        self.ema = Ema(parts.trunk, train.ema)
        self.optimizer = Optimizer([*parts.trunk.parameters(), *parts.objective.parameters()], train, parts.device)
        self.module = DenoisingStep(parts.trunk, parts.objective, parts.denoising, DTYPES[train.precision])
        if resume:
            self._resume()
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", to_yaml(config))
        self._write_facts("running")
        parts.targets.fit_means(parts.dataset, run / "target_means.safetensors", resumed=self.step > 0)
        if train.compile:
            parts.trunk.compile_blocks()
        self.loader = Loader(
            parts.dataset,
            train.batch_size // train.noisings,
            config.seed,
            parts.flip,
            prefetch=config.data.prefetch,
            pin_memory=parts.device.type == "cuda",
        )
        self._sampler = ImageSampler(self.ema.network, config, device=parts.device)
        self._validate: Validation | None = None
        if parts.held_out is not None:
            depths = getattr(parts.objective, "depths", ())
            self._validate = Validation(config, parts.held_out, parts.denoising, parts.targets, depths, parts.device)
        self._scorer = self._build_scorer()
        self._meter, self._by_time = Meter(), BinnedMean(TIME_BINS, parts.device)
        self._window = Window(self.images)
        self._target_time, self._objective_time = Stopwatch(parts.device), Stopwatch(parts.device)
        self.module.stopwatch = self._objective_time

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Train until the budget is spent or a signal asks to stop; either way a checkpoint is written.

        Raises:
            NonFiniteError: too many non-finite steps in a row.
            CheckpointError: a checkpoint could not be written.
        """
        train = self.config.train
        steps = -(-train.images // train.batch_size)
        journal = Journal(self.run / "metrics.jsonl", self.images)
        self.parts.trunk.train()
        with StopRequest() as stop, closing(journal), closing(self.loader.batches(self.step, steps)) as batches:
            try:
                # A run stopped at a step where something was due has not done it yet.
                self._observe(journal, first=self.step == 0)
                self._window.start(self.loader.wait_seconds)
                for batch in batches:
                    self._train_step(batch)
                    self.step += 1
                    self.images += train.batch_size
                    last = self.step == steps or stop.requested
                    if self._due(train.log_every or DEFAULT_LOG_STEPS * train.batch_size) or last:
                        self._log(journal)
                    if last:
                        break
                    self._observe(journal)
                    if self._due(train.checkpoint_every):
                        self._pause(self.save)
                finished = self.step >= steps
                if finished:
                    self._observe(journal, last=True)
            except (EvaluationError, ConfigError, DataError, OSError):
                self.save()  # what went wrong beside training must not cost what was trained
                raise
            self.save()
        status = "finished" if finished else "stopped"
        self._write_facts(status)
        return TrainResult(self.run, status, self.step, self.images, self.seconds, stop.signal)

    def _train_step(self, batch: Batch) -> None:
        config, parts = self.config, self.parts
        train, device = config.train, parts.device
        pixels = batch.pixels.to(device, non_blocking=True)
        labels = None
        if batch.labels is not None and parts.num_classes:
            labels = batch.labels.to(device, non_blocking=True)
        with self._target_time.section():
            targets = parts.targets.of_batch(batch, pixels)
        clean = to_float(pixels)
        draws = draw_step(
            config.seed,
            self.step,
            count=train.batch_size,
            shape=(clean.shape[1], clean.shape[2], clean.shape[3]),
            noisings=train.noisings,
            label_dropout=config.model.label_dropout,
            device=device,
        )
        micro = train.micro_batch or train.batch_size
        for start in range(0, train.batch_size, micro):
            # Rows of the batch whose noisings this micro-batch holds.
            rows = slice(start // train.noisings, (start + micro) // train.noisings)
            output = self.module(
                _repeat(clean[rows], train.noisings),
                None if labels is None else _repeat(labels[rows], train.noisings),
                draws.part(start, start + micro),
                tuple(_repeat(tokens[rows], train.noisings) for tokens in targets),
                _repeat(pixels[rows], train.noisings) if targets else None,
                images_seen=self.images,
                budget=train.images,
                sample_weight=self.optimizer.scale / train.batch_size,
            )
            output.loss.backward()
            self._meter.add("denoising", output.denoising.mean())
            if output.alignment_loss is not None:
                self._meter.add("alignment_loss", output.alignment_loss)
            self._by_time.add(output.denoising, output.unit_time)
        norm = self.optimizer.step(self.images + train.batch_size)
        parts.objective.update()
        self.ema.update(parts.trunk, self.step)
        self._meter.add("grad_norm", norm)

    # -- what happens every so many images ----------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        """Whether a multiple of ``every`` images was passed by the last step."""
        return every > 0 and self.images // every > (self.images - self.config.train.batch_size) // every

    def _observe(self, journal: Journal, first: bool = False, last: bool = False) -> None:
        """Measure and draw what is due at this step and not in the journal yet."""
        train = self.config.train

        def due(kind: str, every: int) -> bool:
            return bool(every) and (first or last or self._due(every)) and not journal.has(kind, self.images)

        if self._validate is not None and due("validation", train.validate_every):
            validate, parts = self._validate, self.parts
            record = self._pause(lambda: validate(self.ema.network, parts.trunk, parts.objective))
            self._write(journal, "validation", **record)
        if due("samples", train.sample_every):
            record = self._pause(
                lambda: save_grid(self._sampler, self.run / "samples", self.images, self.parts.num_classes)
            )
            self._write(journal, "samples", **record)
        # An untrained network's samples are not worth scoring.
        if self._scorer is not None and not first and due("evaluation", train.evaluate_every):
            self._write(journal, "evaluation", **self._pause(self._scorer))

    def _pause(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` off the training clock."""
        self._synchronise()
        self.seconds += self._window.stop()
        result = work()
        self._synchronise()
        if self.parts.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.parts.device)  # the next record is about training again
        self._window.start(self.loader.wait_seconds)
        return result

    def _synchronise(self) -> None:
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize(self.parts.device)

    def _log(self, journal: Journal) -> None:
        means = self._meter.take()  # waits for the device
        self.seconds += self._window.stop()
        window, optimizer = self._window, self.optimizer
        elapsed = max(window.seconds, 1e-9)
        logs = {name: plain(value) for name, value in self.parts.objective.logs().items()}
        denoising, extra = means["denoising"], means.get("alignment_loss")
        record: dict[str, Any] = {
            "loss": None if denoising is None else denoising + (extra or 0.0),
            **means,
            "denoising_by_time": self._by_time.take(),
            "lr": optimizer.learning_rate(self.images),
            "images_per_second": round((self.images - window.images) / elapsed, 3),
            "data_wait": round((self.loader.wait_seconds - window.waited) / elapsed, 5),
            "memory_mb": memory_mb(self.parts.device),
            "skipped": int(optimizer.skipped.item()),
        }
        if self.parts.targets.encoders:
            # What the encoders take, and the objective besides, autograd's pass through its projector excluded.
            record["target_share"] = round(self._target_time.take() / elapsed, 5)
            record["objective_share"] = round(self._objective_time.take() / elapsed, 5)
        if "alignment" in logs:
            record["alignment"] = logs.pop("alignment")
        record.update({f"objective/{name}": value for name, value in logs.items()})
        self._write(journal, "train", **record)
        if self._display is not None:
            self._display(Report(self.step, self.images, self.config.train.images, record))
        in_a_row = int(optimizer.skipped_in_a_row.item())
        if in_a_row >= self.config.train.stop_after_bad:
            raise NonFiniteError(
                f"training stopped at step {self.step}: the loss or its gradient was not finite in the last {in_a_row} "
                "steps; its checkpoints are good; start another run with a lower train.lr or --train.precision fp32."
            )
        window.reset(self.images)
        window.start(self.loader.wait_seconds)

    def _write(self, journal: Journal, kind: str, **values: Any) -> None:
        journal.write(kind, step=self.step, images=self.images, seconds=round(self.seconds, 3), **values)

    # -- beginning, end, and beginning again --------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint."""
        tensors = {
            "model": self.parts.trunk.state_dict(),
            "ema": self.ema.network.state_dict(),
            "objective": self.parts.objective.state_dict(),
            "optimizer": self.optimizer.state(),
        }
        state = {
            "step": self.step,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "network": self.parts.trunk.config,
            "class_names": list(self.parts.dataset.class_names) if self.parts.num_classes else [],
            "data": self.parts.dataset.fingerprint,
            "encoders": [encoder.fingerprint for encoder in self.parts.targets.encoders],
            "seed": self.config.seed,
        }
        return save_checkpoint(self.run, Checkpoint(tensors, state), self.config.train.keep_checkpoints)

    def _resume(self) -> None:
        found = load_newest(self.run)
        if found is None:
            self.say(f"{self.run} has no checkpoint: starting from the beginning.")
            return
        checkpoint, complaints = found
        for complaint in complaints:
            self.say(f"Passed over a checkpoint: {complaint}")
        state = checkpoint.state
        if state["data"] != self.parts.dataset.fingerprint:
            raise CheckpointError(
                f"{self.run} was trained on another data set than {self.parts.dataset.path}: give the one in its "
                "config.yaml."
            )
        if state["encoders"] != [encoder.fingerprint for encoder in self.parts.targets.encoders]:
            raise CheckpointError(f"{self.run} was aligned to another encoder: give the weights that it began with.")
        where = f"the checkpoint at step {state['step']} of {self.run}"
        load_into(self.parts.trunk, checkpoint.tensors["model"], where)
        load_into(self.ema.network, checkpoint.tensors["ema"], where)
        load_into(self.parts.objective, checkpoint.tensors["objective"], where)
        self.optimizer.load_state(checkpoint.tensors["optimizer"])
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        if self.images > self.config.train.images + self.config.train.batch_size:
            raise ConfigError(
                f"{self.run} has trained on {self.images:,} images already, more than train.images "
                f"{self.config.train.images:,}: give a larger budget."
            )
        self.say(f"Resumed {self.run} at {self.images:,} images (step {self.step}).")

    def _claim_folder(self, config: RunConfig, resume: bool) -> None:
        """Refuse to write over another run, or to go on with one under a configuration that would change it."""
        from vrpo.config_load import load_file, validate

        file = self.run / "config.yaml"
        if not file.is_file():
            if self.run.is_dir() and any(self.run.iterdir()):
                raise ConfigError(f"{self.run} is not empty and holds no run: choose another --out.")
            return
        if not resume:
            if not (self.run / "checkpoints").is_dir() and not (self.run / "metrics.jsonl").is_file():
                return  # it failed before its first step: nothing is lost by beginning again
            raise ConfigError(f"{self.run} holds a run already: go on with --resume, or choose another --out.")
        old = flatten(validate(load_file(file), str(file)).model_dump(mode="json"))
        timeless = config.align.objective in TIMELESS and config.align.perceptual_image.kind == "none"
        new = flatten(config.model_dump(mode="json"))
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and not (_is_free(key) or (timeless and key == "train.images")):
                raise ConfigError(
                    f"resuming {self.run} would change {key} from {old.get(key)} to {new.get(key)}: start a new run "
                    "with another --out, or leave it as it was."
                )

    def _write_facts(self, status: str) -> None:
        write_text(self.run / "run.json", json.dumps(facts(self.parts, status), indent=1))

    def _build_scorer(self) -> Callable[[], dict[str, Any]] | None:
        if self.config.evaluate.features is None or not self.config.train.evaluate_every:
            return None
        from vrpo.training.score import Scorer

        reference = self.parts.dataset
        if self.config.evaluate.reference == "validation":
            if self.parts.held_out is None:
                raise ConfigError("evaluate.reference is validation, but data.validation is not set: give that folder.")
            reference = self.parts.held_out
        return Scorer(self.config, self._sampler, reference, self.parts.num_classes, self.parts.device)


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.endswith(FREE_ENDINGS) or key.startswith(FREE_SECTIONS)


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)


def _say_what_is_idle(config: RunConfig, say: Callable[[str], None]) -> None:
    """Say which periodic work will not happen for want of something to do it with."""
    if config.train.validate_every and config.data.validation is None:
        say("No held-out loss will be measured: data.validation is not set.")
    if config.train.evaluate_every and config.evaluate.features is None:
        say("Samples will not be scored during training: evaluate.features is not set.")


def train(config: RunConfig, run: Path, **options: Any) -> TrainResult:
    """Train ``config`` in folder ``run``; see ``Trainer`` for the options."""
    return Trainer(config, run, **options).train()
