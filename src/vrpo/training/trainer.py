"""The loop: from a batch on disk to a step of the weights, and what happens every so many images."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vrpo.alignment.objective import TargetBatch
from vrpo.alignment.prototypes import Prototypes
from vrpo.config import RunConfig
from vrpo.config_load import to_yaml
from vrpo.data.loader import Batch, Loader
from vrpo.decoding import decoder_of_state, latent_state
from vrpo.errors import CheckpointError, ConfigError, DataError, EvaluationError
from vrpo.files import is_unfinished, load_into, write_text
from vrpo.sampling import DTYPES, ImageSampler
from vrpo.training.checkpoint import Checkpoint, find_checkpoints, find_newest, load_checkpoint, step_of
from vrpo.training.claim import claim_folder
from vrpo.training.distributed import ALONE, SharedSignal, World, describe_share, share
from vrpo.training.ema import Ema
from vrpo.training.latents import CleanLatents
from vrpo.training.observe import Validation, save_grid
from vrpo.training.optim import Optimizer
from vrpo.training.parallel import Parallel
from vrpo.training.rewind import passed_at, read_rewinds, rewind_run, set_aside_rewound
from vrpo.training.setup import Parts, build_parts, facts
from vrpo.training.step import DenoisingStep, draw_step
from vrpo.training.stop import StopRequest
from vrpo.training.telemetry import BinnedMean, Journal, Meter, Stopwatch, Window, memory_mb, plain
from vrpo.training.trouble import Watch, name_samples, name_terms
from vrpo.training.writer import CheckpointWriter
from vrpo.untrusted import seal, seal_text
from vrpo.vision.autoencoders import Decoder, Pixels

TIME_BINS = 10
DEFAULT_LOG_STEPS = 50


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
        rewind: int | None = None,
        say: Callable[[str], None] = print,
        display: Callable[[Report], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        world: World = ALONE,
    ) -> None:
        """Build the run in folder ``run``, or take up the one that is there, together with the processes of ``world``.

        ``rewind`` goes back to the newest checkpoint of at most that many images (see ``vrpo.training.rewind``).

        Raises:
            VrpoError: a configuration, data set, encoder or checkpoint that cannot be used.
        """
        self.run, self.config, self.world = run, config, world
        self.say = say if world.first else _say_nothing
        self._display = display if world.first else None
        self.step, self.images, self.seconds = 0, 0, 0.0
        self.passed = 0  # steps whose data a rewind passed over
        # The first process goes first: it may fill caches on disk, which the others then read.
        with world.in_turn():
            claim_folder(run, config, resume)
            if world.first:
                _say_what_is_idle(config, say)
            self.parts: Parts = build_parts(config, self.say, progress if world.first else None, world)
        parts, train = self.parts, config.train
        self.share = share(train.batch_size, train.micro_batch, train.noisings, world)
        if world.size > 1:
            self.say(describe_share(self.share, world))
        self.ema = Ema(parts.trunk, train.ema)
        self.prototypes = Prototypes(parts.num_classes, parts.targets.widths, parts.device)
        checkpoint = self._resume(rewind) if resume else None
        with world.agreed():
            self.parallel = Parallel(parts.trunk, self.ema.network, parts.objective, train, world, parts.device)
        self.optimizer = Optimizer([*parts.trunk.parameters(), *parts.objective.parameters()], train, parts.device)
        if checkpoint is not None:
            self.optimizer.load_state(checkpoint.tensors["optimizer"])
        if config.data.verify:
            with world.agreed():
                parts.verify_data(world, progress if world.first else None)
        world.ask_first(self._begin_folder)
        with world.in_turn():
            means = run / "target_means.safetensors"
            parts.targets.fit_means(parts.dataset, means, resumed=self.step > 0 or not world.first)
        self.module = DenoisingStep(parts.trunk, parts.objective, parts.denoising, DTYPES[train.precision])
        self.module.run_trunk = self.parallel.trunk
        if train.compile:
            parts.trunk.compile_blocks()
        self.loader = Loader(
            parts.dataset,
            train.batch_size // train.noisings,
            config.seed,
            parts.flip,
            rank=world.rank,
            world_size=world.size,
            prefetch=config.data.prefetch,
            pin_memory=parts.device.type == "cuda",
            latents=None if parts.dataset.latents is None else parts.dataset,
            pixels=parts.dataset.latents is None or bool(parts.targets.encoders),
        )
        self._clean = CleanLatents(parts.dataset.manifest, config.seed, parts.device)
        self._sampler = ImageSampler(self.ema.network, config, device=parts.device, decoder=self._decoder())
        self._validate: Validation | None = None
        if parts.held_out is not None:
            depths = getattr(parts.objective, "depths", ())
            self._validate = Validation(
                config, parts.held_out, parts.denoising, parts.targets, depths, parts.device, world
            )
        self._writer = CheckpointWriter(run, train.keep_checkpoints, train.keep_every, world, self.parallel.sharded)
        with world.agreed():
            self._scorer = self._build_scorer()
        self._meter, self._by_time = Meter(world), BinnedMean(TIME_BINS, parts.device, world)
        self._watch = Watch(train.stop_after_bad)
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
        journal = self._open_journal()
        shared = SharedSignal(self.world)
        batches = self.loader.batches(self.step + self.passed, steps + self.passed)
        self.parts.trunk.train()
        with StopRequest() as stop, closing(journal), closing(batches):
            try:
                # A run stopped at a step where something was due has not done it yet.
                self._observe(journal, first=self.step == 0)
                self._window.start(self.loader.wait_seconds)
                for batch in batches:
                    self._train_step(batch)
                    self.step += 1
                    self.images += train.batch_size
                    signal = shared.agree(stop.signal)
                    last = self.step == steps or signal is not None
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
            except (EvaluationError, ConfigError, DataError, OSError) as error:
                if self.world.size == 1 or getattr(error, "shared", False):
                    self.save()  # what went wrong beside training must not cost what was trained
                    self._writer.wait()
                raise
            self.save()
            self._writer.wait()
        status = "finished" if finished else "stopped"
        stopped_by = max(self.world.gather(stop.signal or 0)) or None
        self._write_facts(status)
        return TrainResult(self.run, status, self.step, self.images, self.seconds, stopped_by)

    def _train_step(self, batch: Batch) -> None:
        config, parts = self.config, self.parts
        train, device = config.train, parts.device
        pixels, stored = (
            None if part is None else part.to(device, non_blocking=True) for part in (batch.pixels, batch.latents)
        )
        labels = None
        if batch.labels is not None and parts.num_classes:
            labels = batch.labels.to(device, non_blocking=True)
        with self._target_time.section():
            targets = TargetBatch() if pixels is None else parts.targets.of_batch(batch, pixels)
            if labels is not None and targets.tokens:
                self.prototypes.add(targets.tokens, labels, parts.objective.prepare_target)
        part, images = self.share, train.batch_size // train.noisings
        clean = self._clean(pixels, stored, self.step + self.passed, count=images, start=part.start // train.noisings)
        draws = draw_step(
            config.seed,
            self.step + self.passed,
            count=train.batch_size,
            shape=(clean.shape[1], clean.shape[2], clean.shape[3]),
            noisings=train.noisings,
            label_dropout=config.model.label_dropout,
            device=device,
            token_width=parts.trunk.token_width,
            pairing=config.align.token.pairing if parts.trunk.token_width else "none",
        )
        self._watch.begin(self.step)
        for start in range(0, part.size, part.micro):
            # Rows of this process's batch whose noisings this pass holds.
            rows = slice(start // train.noisings, (start + part.micro) // train.noisings)
            first = part.start + start
            with self.parallel.backward(last=start + part.micro == part.size):
                output = self.module(
                    _repeat(clean[rows], train.noisings),
                    None if labels is None else _repeat(labels[rows], train.noisings),
                    draws.part(first, first + part.micro),
                    targets.map(partial(_rows, rows, train.noisings)),
                    None if pixels is None or not targets.tokens else _repeat(pixels[rows], train.noisings),
                    images_seen=self.images,
                    budget=train.images,
                    sample_weight=self.optimizer.scale / part.size,
                )
                output.loss.backward()
            self._watch.add(output)
            self._meter.add("denoising", output.denoising.mean())
            if output.alignment_loss is not None:
                self._meter.add("alignment_loss", output.alignment_loss)
            if output.token_loss is not None:
                self._meter.add("token_loss", output.token_loss)
            self._by_time.add(output.denoising, output.unit_time)
        self.parallel.finish()
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
                lambda: save_grid(self._sampler, self.run / "samples", self.images, self.parts.num_classes, self.world)
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
        logs = {name: plain(value) for name, value in self.world.mean(self.parts.objective.logs()).items()}
        denoising, beside = means["denoising"], [means.get(name) for name in ("alignment_loss", "token_loss")]
        record: dict[str, Any] = {
            "loss": None if denoising is None else denoising + sum(extra or 0.0 for extra in beside),
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
        self._writer.check()
        if self._display is not None:
            self._display(Report(self.step, self.images, self.config.train.images, record))
        in_a_row = int(optimizer.skipped_in_a_row.item())
        if in_a_row >= self.config.train.stop_after_bad:
            with self.world.agreed():
                raise NonFiniteError(self._diagnosis(in_a_row))
        window.reset(self.images)
        window.start(self.loader.wait_seconds)

    def _diagnosis(self, in_a_row: int) -> str:
        found = self._watch.diagnose(in_a_row)
        batch, noisings = self.config.train.batch_size, self.config.train.noisings
        own = self.loader.indices(found.first + self.passed)
        alone = np.unique(own[found.rows // noisings])
        told = self.world.gather(
            (found.terms, [self.parts.dataset.key(row) for row in alone], [self.parts.dataset.key(row) for row in own])
        )
        terms = {term for names, _, _ in told for term in names}
        bad = [key for _, keys, _ in told for key in keys]
        samples = name_samples(bad or [key for _, _, keys in told for key in keys], bool(bad))
        good = next((path for path in find_checkpoints(self.run) if step_of(path) <= found.first), None)
        remedy = "start again with a lower train.lr or --train.precision fp32."
        if good is not None:
            remedy = (
                f"the last good checkpoint is {good.name}; go back to it, past these data, with --resume --rewind "
                f"{found.first * batch}, or {remedy}"
            )
        return (
            f"training stopped at step {self.step}: the {name_terms(terms)} was not finite in the last {in_a_row} "
            f"steps, first in step {found.first + 1} {samples}; {remedy}"
        )

    def _write(self, journal: Journal, kind: str, **values: Any) -> None:
        journal.write(kind, step=self.step, images=self.images, seconds=round(self.seconds, 3), **values)

    # -- beginning, end, and beginning again --------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to write a checkpoint."""
        tensors = {
            "model": self.parts.trunk.state_dict(),
            "ema": self.ema.network.state_dict(),
            "objective": {**self.parts.objective.state_dict(), **self.prototypes.state()},
            "optimizer": self.optimizer.state(),
        }
        state = {
            "step": self.step,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "network": self.parts.trunk.config,
            "class_names": list(self.parts.dataset.class_names) if self.parts.num_classes else [],
            "data": self.parts.dataset.fingerprint,
            **latent_state(self.parts.dataset.manifest),
            "encoders": [encoder.fingerprint for encoder in self.parts.targets.encoders],
            "seed": self.config.seed,
            "passed": self.passed,
        }
        self._writer.save(tensors, state)

    def _resume(self, rewind: int | None) -> Checkpoint | None:
        """Take weights and counters from the newest checkpoint that verifies, and return it; None if there is none."""
        if rewind is not None:
            self.say(self.world.ask_first(lambda: rewind_run(self.run, rewind, self.config.train.batch_size)))
        self.world.ask_first(lambda: set_aside_rewound(self.run))
        found = self.world.ask_first(lambda: find_newest(self.run))
        if found is None:
            self.say(f"{self.run} has no checkpoint: starting from the beginning.")
            return None
        path, complaints = found
        for complaint in complaints:
            self.say(f"Passed over a checkpoint: {complaint}")
        with self.world.agreed():
            checkpoint = load_checkpoint(path)
            self._take(checkpoint)
        return checkpoint

    def _take(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
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
        load_into(self.parts.objective, self.prototypes.load(checkpoint.tensors["objective"]), where)
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self.passed = passed_at(read_rewinds(self.run), self.step)
        if self.images > self.config.train.images + self.config.train.batch_size:
            raise ConfigError(
                f"{self.run} has trained on {self.images:,} images already, more than train.images "
                f"{self.config.train.images:,}: give a larger budget."
            )
        self.say(f"Resumed {self.run} at {self.images:,} images (step {self.step}).")

    def _begin_folder(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        for leftover in filter(is_unfinished, self.run.iterdir()):
            leftover.unlink(missing_ok=True)
        write_text(self.run / "config.yaml", seal_text(to_yaml(self.config)))
        self._write_facts("running")

    def _write_facts(self, status: str) -> None:
        if self.world.first:
            write_text(self.run / "run.json", json.dumps(seal(facts(self.parts, status, self.world)), indent=1))

    def _open_journal(self) -> Journal:
        """Open the run's telemetry; processes other than the first keep none, but know what is in it."""
        opened: list[Journal] = []

        def last() -> dict[str, int]:
            opened.append(Journal(self.run / "metrics.jsonl", self.images))
            return opened[0].last

        known = self.world.ask_first(last)
        if opened and opened[0].damaged:
            self.say(f"Left out {opened[0].damaged} damaged lines of {self.run / 'metrics.jsonl'}.")
        return opened[0] if opened else Journal(None, self.images, known)

    def _decoder(self) -> Decoder:
        """Load the autoencoder where the run draws samples."""
        train, sample = self.config.train, self.config.sample
        if not (train.sample_every or (train.evaluate_every and self.config.evaluate.features is not None)):
            return Pixels()
        state, device = latent_state(self.parts.dataset.manifest), self.parts.device
        return decoder_of_state(state, named=sample.decoder, any_decoder=sample.any_decoder, device=device)

    def _build_scorer(self) -> Callable[[], dict[str, Any]] | None:
        if self.config.evaluate.features is None or not self.config.train.evaluate_every:
            return None
        from vrpo.training.score import Scorer

        reference = self.parts.dataset
        if self.config.evaluate.reference == "validation":
            if self.parts.held_out is None:
                raise ConfigError("evaluate.reference is validation, but data.validation is not set: give that folder.")
            reference = self.parts.held_out
        return Scorer(self.config, self._sampler, reference, self.parts.num_classes, self.parts.device, self.world)


def _say_nothing(sentence: str) -> None:
    """Leave speaking to the first process."""


def _rows(rows: slice, times: int, tensor: Tensor) -> Tensor:
    return _repeat(tensor[rows], times)


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)


def _say_what_is_idle(config: RunConfig, say: Callable[[str], None]) -> None:
    """Say which periodic work will not happen for want of something to do it with."""
    if config.train.validate_every and config.data.validation is None:
        say("No held-out loss will be measured: data.validation is not set.")
    if config.train.evaluate_every and config.evaluate.features is None:
        say("Samples will not be scored during training: evaluate.features is not set.")
    if config.align.uses_token and config.align.token.tau is not None and config.train.noisings == 1:
        say("The token's weights are all one: align.token.tau compares an image's noisings, and train.noisings is 1.")


def train(config: RunConfig, run: Path, **options: Any) -> TrainResult:
    """Train ``config`` in folder ``run``; see ``Trainer`` for the options."""
    return Trainer(config, run, **options).train()
