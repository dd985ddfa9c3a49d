"""The loop: from a batch on disk to a step of the weights, and what happens every so many images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo.alignment.prototypes import Prototypes
from vrpo.config import RunConfig
from vrpo.data.loader import Batch, Loader
from vrpo.devices import DTYPES
from vrpo.errors import ConfigError, DataError, EvaluationError
from vrpo.processes import ALONE, World
from vrpo.training.ema import Ema
from vrpo.training.folder import begin_folder, claim_folder, open_journal, write_facts
from vrpo.training.latents import CleanLatents
from vrpo.training.lock import FolderLock
from vrpo.training.observe import BrokenOffError, Observer
from vrpo.training.optim import Optimizer
from vrpo.training.parallel import Parallel
from vrpo.training.repeatable import repeatable
from vrpo.training.setup import Parts, build_parts, idle_settings
from vrpo.training.share import describe_share, share
from vrpo.training.state import Counters, RunState, take_up
from vrpo.training.step import DenoisingStep, draw_step
from vrpo.training.stop import SharedSignal, StopRequest
from vrpo.training.telemetry import BinnedMean, Journal, Meter, Stopwatch, Window, memory_mb, plain
from vrpo.training.trouble import NonFiniteError, Watch, diagnosis
from vrpo.training.writer import CheckpointWriter

TIME_BINS = 10
DEFAULT_LOG_STEPS = 50


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
        told = progress if world.first else None
        # The first process goes first: it may fill caches on disk, which the others then read.
        self._lock = FolderLock(run)
        with world.in_turn():
            claim_folder(run, config, resume)
            if world.first:
                self._lock.take()
            for sentence in idle_settings(config, world):
                self.say(sentence)
            self.parts: Parts = build_parts(config, self.say, told, world)
        parts, train = self.parts, config.train
        self.share = share(train.batch_size, train.micro_batch, train.noisings, world)
        if world.size > 1 or self.share.passes > 1:
            self.say(describe_share(self.share, world))
        self.ema = Ema(parts.trunk, train.ema)
        self.prototypes = Prototypes(parts.num_classes, parts.targets.widths, parts.device)
        self.counters = Counters()
        self.state = RunState(config, parts, self.ema, self.prototypes, self.counters)
        moments = take_up(run, self.state, rewind, world, self.say) if resume else None
        with world.agreed():
            self.parallel = Parallel(parts.trunk, self.ema.network, parts.objective, train, world, parts.device)
        self.optimizer = Optimizer([*parts.trunk.parameters(), *parts.objective.parameters()], train, parts.device)
        if moments is not None:
            self.optimizer.load_state(moments)
        if config.data.verify:
            with world.agreed():
                parts.verify_data(world, told)
        world.ask_first(lambda: self._begin_folder(resume))
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
            pixels=parts.dataset.latents is None or parts.targets.reads_pixels or parts.objective.reads_images,
            caches=parts.targets.caches,
        )
        data = parts.dataset
        self._clean = CleanLatents(data.latents, data.manifest.normaliser, config.seed, parts.device)
        self.observer = Observer(parts, self.ema.network, run, world)
        self._writer = CheckpointWriter(run, train.keep_checkpoints, train.keep_every, world, self.parallel.sharded)
        self._meter, self._by_time = Meter(world), BinnedMean(TIME_BINS, parts.device, world)
        self._owed = False  # a checkpoint that was due among steps that were not finite
        self._watch = Watch()
        self._window = Window(self.images)
        self._target_time, self._objective_time = Stopwatch(parts.device), Stopwatch(parts.device)
        self.module.stopwatch = self._objective_time

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.counters.step

    @property
    def images(self) -> int:
        """Images trained on so far."""
        return self.counters.images

    def _begin_folder(self, resume: bool) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        claim_folder(self.run, self.config, resume)  # another process may have been in it since
        begin_folder(self.run, self.parts, self.world)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Train until the budget is spent or a signal asks to stop; either way a checkpoint is written.

        Raises:
            NonFiniteError: too many non-finite steps in a row.
            CheckpointError: a checkpoint could not be written.
        """
        train = self.config.train
        steps = -(-train.images // train.batch_size)
        journal = open_journal(self.run, self.images, self.world, self.say)
        shared = SharedSignal(self.world)
        batches = self.loader.batches(self.counters.position, steps + self.counters.passed)
        finished = False
        self.parts.trunk.train()
        with closing(self._lock), StopRequest() as stop, closing(journal), closing(batches):

            def go_on() -> None:
                if shared.agree(stop.signal) is not None:
                    raise BrokenOffError

            self.observer.go_on = go_on
            try:
                # A run stopped at a step where something was due has not done it yet.
                self._observe(journal, first=self.step == 0)
                self._window.start(self.loader.wait_seconds)
                for batch in batches:
                    self._train_step(batch)
                    self.counters.step += 1
                    self.counters.images += train.batch_size
                    signal = shared.agree(stop.signal)
                    last = self.step == steps or signal is not None
                    if self._due(train.log_every or DEFAULT_LOG_STEPS * train.batch_size) or last:
                        self._log(journal)
                    if last:
                        break
                    # Before anything is measured, which may take long and must not cost what was trained.
                    self._owed |= self._due(train.checkpoint_every)
                    # Weights stand still while steps are skipped, and what is kept must be from before: see the writer.
                    if self._owed and not self._in_trouble():
                        self._pause(self.save)
                    self._observe(journal)
                if self.step >= steps:
                    self.save()
                    self._observe(journal, last=True)
                    finished = True
            except BrokenOffError:
                pass  # what was broken off is due when the run goes on
            except Exception as error:
                together = self.world.size == 1 or getattr(error, "shared", False)
                if together and isinstance(error, (EvaluationError, ConfigError, DataError, OSError)):
                    self.save()  # what went wrong beside training must not cost what was trained
                    self._writer.wait()
                # The thread's messages to the other processes must not be cut off by the end of this one.
                self._writer.leave(together)
                raise
            self.save()
            self._writer.wait()
        status = "finished" if finished else "stopped"
        stopped_by = max(self.world.gather(stop.signal or 0)) or None
        if self.world.first:
            write_facts(self.run, self.parts, status, self.world)
        return TrainResult(self.run, status, self.step, self.images, self.counters.seconds, stopped_by)

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
            targets = parts.targets.of_batch(batch, pixels)
            if labels is not None and targets.tokens:
                self.prototypes.add(targets.tokens, labels, parts.objective.prepare_target)
        part, images = self.share, train.batch_size // train.noisings
        clean = self._clean(pixels, stored, self.counters.position, count=images, start=part.start // train.noisings)
        draws = draw_step(
            config.seed,
            self.counters.position,
            count=train.batch_size,
            shape=(clean.shape[1], clean.shape[2], clean.shape[3]),
            noisings=train.noisings,
            label_dropout=config.model.label_dropout,
            device=device,
            token_width=parts.trunk.token_width,
            pairing=config.align.token.pairing if parts.trunk.token_width else "none",
        )
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
            del output  # its graph holds what the objective answers with, which must not outlive the pass
        self.parallel.finish()
        norm = self.optimizer.step(self.images + train.batch_size)
        self._watch.end(self.step, self.optimizer.skipped_in_a_row)
        with self._objective_time.section():
            parts.objective.update()
        self.ema.update(parts.trunk, self.step)
        self._meter.add("grad_norm", norm)

    # -- what happens every so many images ----------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        """Whether a multiple of ``every`` images was passed by the last step."""
        return every > 0 and self.images // every > (self.images - self.config.train.batch_size) // every

    def _observe(self, journal: Journal, first: bool = False, last: bool = False) -> None:
        """Measure and draw what is due at this step and not in the journal yet."""
        always = first or last
        for kind, work in self.observer.due(journal, self.images, lambda every: always or self._due(every), first):
            self._write(journal, kind, **self._pause(work))

    def _pause(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` off the training clock."""
        self._synchronise()
        self.counters.seconds += self._window.stop()
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
        self.counters.seconds += self._window.stop()
        window, optimizer = self._window, self.optimizer
        elapsed = max(window.seconds, 1e-9)
        logs = {name: plain(value) for name, value in self.world.mean(self.parts.objective.logs()).items()}
        denoising, beside = means["denoising"], [means.get(name, 0.0) for name in ("alignment_loss", "token_loss")]
        record: dict[str, Any] = {
            "loss": None if None in (denoising, *beside) else denoising + sum(beside),
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
        in_a_row = self._in_trouble()
        if in_a_row >= self.config.train.stop_after_bad:
            self._writer.wait()  # the sentence names the last good checkpoint, which may be under way
            found = self._watch.diagnose(self.step, in_a_row)
            sentence = diagnosis(found, in_a_row, self.run, self.state, self.loader, self.world)
            with self.world.agreed():
                raise NonFiniteError(sentence)
        window.reset(self.images)
        window.start(self.loader.wait_seconds)

    def _write(self, journal: Journal, kind: str, **values: Any) -> None:
        journal.write(kind, step=self.step, images=self.images, seconds=round(self.counters.seconds, 3), **values)

    def _in_trouble(self) -> int:
        """Return how many steps in a row, up to now, were not finite; this waits for the device."""
        return int(self.optimizer.skipped_in_a_row.item())

    def save(self) -> None:
        """Begin to write a checkpoint; one made among steps that are not finite takes the place of no other."""
        self._owed = False
        self._writer.save(self.state.tensors(self.optimizer), self.state.record(), prune=not self._in_trouble())


def _say_nothing(sentence: str) -> None:
    """Leave speaking to the first process."""


def _rows(rows: slice, times: int, tensor: Tensor) -> Tensor:
    return _repeat(tensor[rows], times)


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)


def train(config: RunConfig, run: Path | str, **options: Any) -> TrainResult:
    """Train ``config`` in folder ``run``; see ``Trainer`` for the options."""
    with repeatable(config.train.deterministic):
        return Trainer(config, Path(run), **options).train()
