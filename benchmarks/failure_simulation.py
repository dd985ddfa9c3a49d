"""Two weeks of 64 nodes on paper: what failures cost against the time between checkpoints.

    python benchmarks/failure_simulation.py --out benchmarks/results

Failures come as a Poisson process at published rates. A checkpoint stops training for ``stall`` and counts once it has
been written for ``write``; a failure goes back to the last one that counts, after ``restart``. How long a checkpoint of
SiT-XL/2 takes is measured here on a smaller network, by the byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from machine import describe

HOUR, DAY = 3600.0, 86_400.0
NODES, GPUS_A_NODE = 64, 8
USEFUL = 14 * DAY
# Until the others notice that a process is gone (the timeout of a step's gradients), and to start again.
NOTICE, START = 600.0, 300.0
INTERVALS = (300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 4 * HOUR, 12 * HOUR, 24 * HOUR)
# Interruptions for each GPU and second: Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected ones in 54 days on
# 16,384 GPUs; OPT-175B (arXiv 2205.01068, section 2.5): 35 manual and some 70 automatic restarts in two months on 992.
RATES = {"Llama 3": 419 / (54 * DAY * 16_384), "OPT-175B": 105 / (60 * DAY * 992)}
XL_BYTES = 4 * 4 * 675e6  # model, average and two moments in float32


@dataclass(frozen=True)
class Outcome:
    """One simulated run: seconds in all, of repeated work, of stalls, of restarts, and the number of failures."""

    wall: float
    lost: float
    stalled: float
    down: float
    failures: int


def simulate(
    useful: float, interval: float, stall: float, write: float, mtbf: float, restart: float, dice: random.Random
) -> Outcome:
    """Run ``useful`` seconds of work with a checkpoint after every ``interval`` seconds of it; all times in seconds."""
    wall = position = durable = lost = stalled = down = 0.0
    failures = 0
    pending: list[tuple[float, float]] = []  # work that a checkpoint holds, and when it counts
    failure = dice.expovariate(1 / mtbf)
    while position < useful:
        work = min(interval, useful - position)
        end = wall + work + stall
        if failure >= end:
            wall, position, stalled = end, position + work, stalled + stall
            pending.append((position, end + write))
            while pending and pending[0][1] <= wall:
                durable = pending.pop(0)[0]
            continue
        failures += 1
        durable = max([durable, *(held for held, counts in pending if counts <= failure)])
        begun = failure - wall
        lost += position - durable + min(begun, work)
        stalled += max(0.0, begun - work)
        back = failure + restart
        failure += dice.expovariate(1 / mtbf)
        while failure < back:  # it can fail again while it starts
            failures += 1
            back = failure + restart
            failure += dice.expovariate(1 / mtbf)
        down += back - (wall + begun)
        wall, position, pending = back, durable, []
    return Outcome(wall, lost, stalled, down, failures)


def expected_wall(useful: float, interval: float, stall: float, mtbf: float, restart: float) -> float:
    """Return the expected wall-clock where a checkpoint counts as soon as it is taken (Daly 2006, eq. 13)."""
    return mtbf * math.exp(restart / mtbf) * math.expm1((interval + stall) / mtbf) * useful / interval


def best_interval(stall: float, mtbf: float) -> float:
    """Return the interval that loses least, to first order: sqrt(2 stall mtbf) (Young 1974)."""
    return math.sqrt(2 * stall * mtbf)


def measure_checkpoint(name: str) -> dict[str, float]:
    """Return the bytes of a checkpoint of ``name``, and the seconds to copy, write and read and verify it."""
    from vrpo.checkpoints import Checkpoint, load_checkpoint
    from vrpo.models.transformer import build_transformer
    from vrpo.training.checkpoint import find_newest, save_checkpoint

    network = build_transformer(name, input_size=32, in_channels=4, num_classes=1000)
    weights = {key: value.detach() for key, value in network.state_dict().items()}
    moments = {f"{key}.{moment}": value for key, value in weights.items() for moment in ("exp_avg", "exp_avg_sq")}
    tensors = {"model": weights, "ema": weights, "objective": {"w": torch.zeros(8)}, "optimizer": moments}
    size = sum(value.nbytes for part in tensors.values() for value in part.values())
    with tempfile.TemporaryDirectory(prefix="vrpo-checkpoint-") as folder:
        marks = [time.perf_counter()]
        copies = {part: {key: value.clone() for key, value in held.items()} for part, held in tensors.items()}
        marks.append(time.perf_counter())
        save_checkpoint(Path(folder), Checkpoint(copies, {"step": 1, "images": 1}), keep=1)
        marks.append(time.perf_counter())
        found = find_newest(Path(folder))
        assert found is not None
        load_checkpoint(found[0])
        marks.append(time.perf_counter())
    copy, write, read = (end - start for start, end in itertools.pairwise(marks))
    return {"bytes": size, "copy_seconds": copy, "write_seconds": write, "read_seconds": read}


def table(stall: float, write: float, mtbf: float, restart: float, runs: int) -> list[dict[str, float]]:
    """Return, for each interval, the mean outcome of ``runs`` simulated runs as hours and shares of useful time."""
    rows = []
    for interval in INTERVALS:
        outcomes = [
            simulate(USEFUL, interval, stall, write, mtbf, restart, random.Random(seed)) for seed in range(runs)
        ]
        mean = {key: statistics.fmean(asdict(outcome)[key] for outcome in outcomes) for key in asdict(outcomes[0])}
        worst = sorted(outcome.wall for outcome in outcomes)[int(0.95 * (runs - 1))]
        rows.append(
            {
                "interval_minutes": interval / 60,
                "failures": round(mean["failures"], 2),
                "lost_hours": round(mean["lost"] / HOUR, 2),
                "stalled_hours": round(mean["stalled"] / HOUR, 2),
                "down_hours": round(mean["down"] / HOUR, 2),
                "overhead_percent": round(100 * (mean["wall"] / USEFUL - 1), 2),
                "overhead_percent_95": round(100 * (worst / USEFUL - 1), 2),
            }
        )
    return rows


def main() -> None:
    """Measure, simulate, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2", help="network whose checkpoint is timed")
    parser.add_argument("--runs", type=int, default=400, help="simulated runs of each interval")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    options = parser.parse_args()
    measured = measure_checkpoint(options.model)
    scale = XL_BYTES / measured["bytes"]
    copy, write, read = (measured[f"{key}_seconds"] * scale for key in ("copy", "write", "read"))
    record: dict[str, object] = {
        "nodes": NODES,
        "gpus": NODES * GPUS_A_NODE,
        "useful_days": USEFUL / DAY,
        "measured": {"model": options.model, **measured},
        "xl": {"bytes": XL_BYTES, "copy_seconds": copy, "write_seconds": write, "read_seconds": read},
        "restart_seconds": NOTICE + START + read,
        "machine": describe(torch.device("cpu")),
        "rates": {},
    }
    rates: dict[str, object] = {}
    for name, rate in RATES.items():
        mtbf, restart = 1 / (rate * NODES * GPUS_A_NODE), NOTICE + START + read
        rates[name] = {
            "mtbf_hours": round(mtbf / HOUR, 1),
            "best_interval_minutes": {
                "asynchronous": round(best_interval(copy, mtbf) / 60, 1),
                "synchronous": round(best_interval(copy + write, mtbf) / 60, 1),
            },
            "asynchronous": table(copy, write, mtbf, restart, options.runs),
            "synchronous": table(copy + write, 0.0, mtbf, restart, options.runs),
        }
    record["rates"] = rates
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if options.out is not None:
        (options.out / "failure-simulation.json").write_text(text)


if __name__ == "__main__":
    main()
