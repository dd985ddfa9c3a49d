"""Runs of a benchmark: what each still needs, and several of them side by side in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from variants import Variant
from vrpo.config import RunConfig
from vrpo.config_load import load_file, to_yaml, validate
from vrpo.errors import ConfigError
from vrpo.files import write_text
from vrpo.runs import flatten

POLL_SECONDS = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Judge:
    """A further feature network, which scores the samples of finished runs."""

    name: str
    weights: str | None

    @classmethod
    def parse(cls, text: str) -> Judge:
        """Read NAME or NAME=WEIGHTS; raises ConfigError where there is no such file."""
        name, _, weights = text.partition("=")
        if weights and not Path(weights).is_file():
            raise ConfigError(f"--judge {text}: there is no weights file {weights}: write NAME=FILE.")
        return cls(name, str(Path(weights).absolute()) if weights else None)


@dataclass(frozen=True)
class Job:
    """One run: a variant and a seed."""

    variant: Variant
    seed: int
    config: RunConfig
    run: Path
    record: Path
    judges: tuple[Judge, ...] = ()
    judge_samples: int | None = None

    @property
    def title(self) -> str:
        """The job's name in messages."""
        return f"{self.variant.name} seed {self.seed}"

    @property
    def log(self) -> Path:
        """Where the processes' output goes."""
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def trained(self) -> bool:
        """Whether the run has spent its budget."""
        try:
            return json.loads((self.run / "run.json").read_text("utf-8"))["status"] == "finished"
        except (OSError, ValueError, KeyError):
            return False

    def next_command(self) -> list[str] | None:
        """Return the command that comes next, without the program's name; None where all is done."""
        if not self.trained:
            file = self.run.with_name(f"{self.run.name}.yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, to_yaml(self.config))
            return ["train", "--config", str(file), "--out", str(self.run), "--resume"]
        for judge in self.judges:
            file = self._score_file(judge)
            if not file.is_file():
                return self._evaluation(judge, file)
        return None

    def check(self) -> None:
        """Raise ConfigError if the folder holds a run of another configuration."""
        file = self.run / "config.yaml"
        if not file.is_file():
            return
        old = flatten(validate(load_file(file), str(file)).model_dump(mode="json"))
        new = flatten(self.config.model_dump(mode="json"))
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{self.run} was begun with {key} {old.get(key)} and is now asked for with {new.get(key)}: choose "
                    "another --out, or remove it."
                )

    def _score_file(self, judge: Judge) -> Path:
        return self.run / "evaluations" / f"judge-{judge.name.replace('/', '-')}.json"

    def _evaluation(self, judge: Judge, file: Path) -> list[str]:
        settings, data = self.config.evaluate, self.config.data
        reference = data.validation if settings.reference == "validation" else data.path
        words = ["evaluate", str(self.run), "--reference", str(reference), "--features", judge.name]
        if judge.weights is not None:
            words += ["--features-weights", judge.weights]
        words += ["--samples", str(self.judge_samples or settings.samples), "--labels", settings.labels]
        words += ["--metrics", *settings.metrics, "--device", self.config.train.device]
        return [*words, "--seed", str(self.seed), "--out", str(file)]


@dataclass
class _Active:
    job: Job
    started: float
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, words: list[str], threads: int) -> None:
        """Start a command with so many threads, its output appended to the job's log."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads))}
        with self.job.log.open("ab") as log:
            command = [sys.executable, "-m", "vrpo", *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def execute(jobs: Sequence[Job], slots: int, threads: int, say: Say) -> dict[str, str]:
    """Run what the jobs still need, ``slots`` at a time, and return what went wrong, by the job's title.

    Interrupted, it asks the processes to stop, which write a checkpoint, and waits for them.
    """
    waiting = [job for job in jobs if job.next_command() is not None]
    say(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done; {slots} at a time, {threads} threads in all.")
    running: list[_Active] = []
    failed: dict[str, str] = {}
    begun, done, total = time.monotonic(), 0, len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                active = _Active(waiting.pop(0), time.monotonic())
                say(f"{active.job.title}: {'resumed' if active.job.run.is_dir() else 'begun'}")
                words = active.job.next_command()
                assert words is not None
                active.start(words, max(1, threads // slots))
                running.append(active)
            for active in list(running):
                code = active.process.poll()
                if code is None:
                    continue
                words = active.job.next_command()
                if code == 0 and words is not None:
                    active.start(words, max(1, threads // slots))
                    continue
                running.remove(active)
                done += 1
                if code != 0:
                    failed[active.job.title] = _last_line(active.job.log) or f"exit code {code}"
                left = (time.monotonic() - begun) / done * (total - done)
                outcome = failed.get(active.job.title, f"done in {_clock(time.monotonic() - active.started)}")
                say(f"[{done}/{total}] {active.job.title}: {outcome}; about {_clock(left)} left")
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        say("Stopping: every run writes a checkpoint.")
        for active in running:
            active.process.terminate()
        for active in running:
            active.process.wait()
        raise
    return failed


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{seconds / 60:.1f} min"
