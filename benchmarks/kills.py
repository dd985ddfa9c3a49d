"""Kill a small training run at random moments, resume it each time, and compare its end with an undisturbed run's.

    python benchmarks/kills.py --kills 100 --out benchmarks/results

Half of the kills come at a random time, from outside; the other half at a random write into the run's folder, counted
by an audit hook within the process, so that checkpoints, telemetry and configuration are cut in the middle of being
written. Every start is the same command with ``--resume``. A run that reaches its end is compared, tensor by tensor and
bit by bit, with the reference, and the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from machine import describe
from vrpo.cli import main as command
from vrpo.config_load import to_yaml, validate
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource

WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def make_config(folder: Path, objective: str) -> Path:
    """Prepare a small data set and write the configuration of the run."""
    generator = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = generator.integers(0, 80, (48, 16, 16, 3)) + 60 * labels[:, None, None, None]
    source = ArraySource(images.astype(np.uint8), labels, ("a", "b", "c"), "noise")
    prepare(source, folder / "data", size=16, workers=1, progress=False)
    values = {
        "data": {"path": str(folder / "data")},
        "model": {"name": "SiT-N/4"},
        "encoder": {"name": "resnet10t", "weights": "random", "feature": 1, "input_size": 16},
        "align": {"objective": objective, "projector_width": 32, "depth": 2},
        "train": {"images": 160, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 16, "log_every": 8, "device": "cpu"},
    }
    file = folder / "config.yaml"
    file.write_text(to_yaml(validate(values, "the benchmark")))
    return file


def train(config: Path, run: Path, die_at_write: int | None, log: Path) -> None:
    """Train to the end within a child, or die by SIGKILL at a write into the run's folder."""
    root, seen = str(run), 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in WRITES and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(root):
            writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            seen += bool(writes)
            if seen == die_at_write:
                with log.open("a") as file:
                    file.write(f"killed at {event} {str(arguments[0]).removeprefix(root)}\n")
                os.kill(os.getpid(), signal.SIGKILL)

    if die_at_write is not None:
        sys.addaudithook(hook)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        command(["train", "--config", str(config), "--out", root, "--resume"])


def digest(config: Path, run: Path) -> str:
    """Hash every tensor that the run would go on with."""
    from vrpo.config_load import load_file
    from vrpo.training.trainer import Trainer

    trainer = Trainer(validate(load_file(config), "it"), run, resume=True, say=lambda sentence: None)
    assert trainer.images >= 160, "the run is not at its end"
    whole = hashlib.sha256()
    for part, tensors in trainer.state.tensors(trainer.optimizer).items():
        for name, value in sorted(tensors.items()):
            whole.update(f"{part} {name} {value.dtype} {tuple(value.shape)}".encode())
            whole.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def in_child(work: object, kill_after: float | None = None) -> tuple[int, str]:
    """Run ``work`` in a forked child; return its exit status (negative for a signal) and what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            os.write(writing, str(work()).encode())  # type: ignore[operator]
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(code)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


def measure(kills: int, seed: int, objective: str) -> dict[str, object]:
    """Kill and resume until ``kills`` processes have died; return the record."""
    import timm  # noqa: F401  (children are forked from here, so that each need not import it anew)

    import vrpo.commands.training
    import vrpo.training.trainer  # noqa: F401

    dice = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="vrpo-kills-"))
    log = folder / "log.txt"
    config = make_config(folder, objective)
    started = time.perf_counter()
    code, said = in_child(lambda: train(config, folder / "reference", None, log))
    duration = time.perf_counter() - started
    assert code == 0, f"the reference run failed: {said} {log.read_text()}"
    _, reference = in_child(lambda: digest(config, folder / "reference"))
    found = {"at_a_time": 0, "at_a_write": 0, "starts": 0, "runs": 0, "failed_starts": 0, "differing_runs": 0}
    run, failures = folder / "run", []
    while found["at_a_time"] + found["at_a_write"] < kills or run.exists():
        enough = found["at_a_time"] + found["at_a_write"] >= kills
        at_write = None if enough or dice.random() < 0.5 else dice.randint(1, 60)
        after = None if enough or at_write is not None else dice.uniform(0.05, 0.9) * duration
        code, said = in_child(lambda at=at_write: train(config, run, at, log), after)
        found["starts"] += 1
        if code == -signal.SIGKILL:
            found["at_a_write" if at_write is not None else "at_a_time"] += 1
        elif code != 0:
            found["failed_starts"] += 1
            failures.append(f"{said} {log.read_text()[-500:]}")
            shutil.rmtree(run, ignore_errors=True)
        else:
            found["runs"] += 1
            _, end = in_child(lambda: digest(config, run))
            found["differing_runs"] += end != reference
            shutil.rmtree(run)
    killed = [line.rpartition(" ")[2] for line in log.read_text().splitlines() if line.startswith("killed at")]
    in_checkpoint = sum(path.startswith("/checkpoints") for path in killed)
    shutil.rmtree(folder)
    return {
        "kills": found["at_a_time"] + found["at_a_write"],
        **found,
        "while_a_checkpoint_was_written": in_checkpoint,
        "objective": objective,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "failures": failures[:5],
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", default="vrpo")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    options = parser.parse_args()
    with contextlib.redirect_stderr(io.StringIO()):
        record = {**measure(options.kills, options.seed, options.objective), "machine": describe(torch.device("cpu"))}
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if options.out is not None:
        (options.out / f"kills-{options.kills}-{options.objective}.json").write_text(text)


if __name__ == "__main__":
    main()
