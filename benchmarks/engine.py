"""What the engine costs: DistributedDataParallel, checkpoints, determinism; and on a GPU what a training step reaches.

    python benchmarks/engine.py                     # everything that suits the device
    python benchmarks/engine.py --parts throughput --models SiT-XL/2 --batch 128
    python benchmarks/engine.py --quick --out /tmp  # a tiny model, to see that it works

A step is the trainer's own with REPA, its targets synthetic and on the device, so no encoder is in it. What is compared
takes turns, in an order shuffled every round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import objective_cost as cost
from machine import describe
from timing import paired_difference, paired_ratio, take_turns, timed, update_results, wait
from vrpo.checkpoints import Checkpoint
from vrpo.config import TrainConfig
from vrpo.devices import resolve_device
from vrpo.processes import ALONE, World
from vrpo.training.checkpoint import save_checkpoint
from vrpo.training.parallel import Parallel
from vrpo.training.writer import CheckpointWriter

PARTS = ("ddp", "checkpoint", "determinism", "throughput")
MODELS = {"SiT-B/2": 256, "SiT-L/2": 128, "SiT-XL/2": 128}
"""Models whose throughput is measured, and their batch."""
TARGETS = {"ddp": 1.02, "checkpoint": 0.10, "throughput": 0.45}


def build(case: cost.Case, device: torch.device) -> cost.Runner:
    """Return REPA on a trunk of its own, ready to take steps."""
    contender = cost.CONTENDERS["repa"]
    return cost.Runner(cost.Bench(case, device, False), contender, cost._config(case, contender))


def compared(seconds: dict[str, list[float]], name: str, reference: str) -> dict[str, Any]:
    """Return both medians and the ratio over rounds with its interval."""
    ratio, *interval = paired_ratio(seconds[name], seconds[reference])
    medians = {key: round(statistics.median(values), 6) for key, values in seconds.items()}
    return {"step_seconds": medians, "ratio": ratio, "ratio_95": interval, "seconds": seconds}


def measure_ddp(case: cost.Case, device: torch.device) -> dict[str, Any]:
    """Time a step under DistributedDataParallel of one process against one without it."""
    plain, wrapped = build(case, device), build(case, device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            world = World(group=dist.new_group(backend="gloo"))
            bench = wrapped.bench
            parallel = Parallel(bench.trunk, bench.ema.network, wrapped.objective, TrainConfig(), world, device)
            wrapped.module.run_trunk = parallel.trunk
            runs = {"none": plain, "ddp": wrapped}
            for runner in runs.values():
                for _ in range(cost.WARMUP):
                    runner.step()
            seconds = take_turns({name: runner.timing() for name, runner in runs.items()}, case.rounds)
            return compared(seconds, "ddp", "none")
        finally:
            dist.destroy_process_group()


def measure_checkpoint(case: cost.Case, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Measure by how much a checkpoint delays training when it is written beside it, and when training waits for it.

    A turn is as many steps as take three times a checkpoint's writing: alone, with a checkpoint written beside them
    from their beginning on, or after waiting for one. The delay is what a turn takes more than alone.
    """
    runner = build(case, device)
    for _ in range(cost.WARMUP):
        runner.step()
    step = statistics.median(runner.timing()() for _ in range(3))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        writer = CheckpointWriter(Path(folder) / "beside", 1, 0, ALONE, sharded=False)
        numbers, copies = itertools.count(1), []

        def begin() -> None:
            state = {"step": next(numbers), "images": 0}
            started = time.perf_counter()
            writer.save(_state(runner), state)
            copies.append(time.perf_counter() - started)

        def save() -> None:
            state = {"step": next(numbers), "images": 0}
            host = {part: {name: kept.cpu() for name, kept in found.items()} for part, found in _state(runner).items()}
            save_checkpoint(Path(folder) / "waiting", Checkpoint(host, state), 1)

        begin()  # the first copy has to find its memory
        writer.wait()
        steps = max(1, round(3 * min(timed(save, device) for _ in range(3)) / step))

        def turn(first: Callable[[], None], last: Callable[[], None]) -> Callable[[], float]:
            def run() -> None:
                first()
                for _ in range(steps):
                    runner.step()
                wait(device)
                last()

            return lambda: timed(run, device)

        seconds = take_turns(
            {"alone": turn(_nothing, _nothing), "beside": turn(begin, writer.wait), "waiting": turn(save, _nothing)},
            case.rounds,
        )
    beside, waiting = (paired_difference(seconds[name], seconds["alone"]) for name in ("beside", "waiting"))
    copy = statistics.median(copies[1:])
    return {
        "delay_beside": beside,
        "delay_waiting": waiting,
        "copy": round(copy, 4),
        "steps_a_turn": steps,
        "step_seconds": round(step, 6),
        "batch": case.batch,
        "bytes": sum(value.nbytes for part in _state(runner).values() for value in part.values()),
        "ratio": round(beside[0] / waiting[0], 4),
        "copy_ratio": round(copy / waiting[0], 4),
        "seconds": seconds,
    }


def _nothing() -> None:
    """Do nothing."""


def _state(runner: cost.Runner) -> dict[str, dict[str, torch.Tensor]]:
    bench = runner.bench
    return {
        "model": bench.trunk.state_dict(),
        "ema": bench.ema.network.state_dict(),
        "objective": runner.objective.state_dict(),
        "optimizer": runner.optimizer.state(),
    }


def measure_determinism(case: cost.Case, device: torch.device) -> dict[str, Any]:
    """Time a step with torch's deterministic algorithms against one with whatever is fastest."""
    runner = build(case, device)

    def run(strict: bool) -> float:
        torch.use_deterministic_algorithms(strict, warn_only=True)
        runner.step()  # choices of kernels are made anew
        seconds = runner.timing()()
        torch.use_deterministic_algorithms(False)
        return seconds

    for strict in (False, True):
        run(strict)
    seconds = take_turns({"free": lambda: run(False), "deterministic": lambda: run(True)}, case.rounds)
    return compared(seconds, "deterministic", "free")


def matrix_peak(device: torch.device, side: int) -> float:
    """Return the FLOP/s of a bf16 product of two square matrices, the median of 20."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(25):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds[5:])


def measure_throughput(case: cost.Case, device: torch.device, peak: float, compiled: bool) -> list[dict[str, Any]]:
    """Measure images a second, share of ``peak`` and peak memory, with and without activation checkpointing."""
    rows = []
    for recompute in (False, True):
        runner = build(case, device)
        with FlopCounterMode(display=False) as counter:
            runner.step()
        flops = counter.get_total_flops()  # of the model: what is recomputed is not counted
        runner.bench.trunk.checkpoint_blocks = recompute
        if compiled:
            runner.bench.trunk.compile_blocks()
        for _ in range(cost.WARMUP):
            runner.step()
        memory = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [runner.timing()() for _ in range(case.rounds)]
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        median = statistics.median(seconds)
        rows.append(
            {
                "model": case.model,
                "batch": case.batch,
                "checkpoint_blocks": recompute,
                "compiled": compiled,
                "step_seconds": round(median, 6),
                "images_per_second": round(case.batch / median, 1),
                "step_flops": flops,
                "share_of_peak": round(flops / median / peak, 4),
                "peak_bytes": memory,
            }
        )
        del runner
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(words: Iterable[str] | None = None) -> Path:
    """Measure the chosen parts, print what they gave, and return the file that holds the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; throughput on a GPU only")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="for throughput")
    parser.add_argument("--batch", type=int, help="images a step, for throughput")
    parser.add_argument("--rounds", type=int, help="turns that each contender takes")
    parser.add_argument("--scratch", type=Path, help="folder on the disk that checkpoints are written to")
    parser.add_argument("--no-compile", action="store_true", help="throughput without torch.compile")
    parser.add_argument("--quick", action="store_true", help="a tiny model and three rounds, to try the benchmark")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(None if words is None else list(words))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only
    device = resolve_device(options.device)
    cuda = device.type == "cuda"
    case = cost.QUICK if options.quick else cost.CASES["sit-b-2" if cuda else "sit-ti-4"]
    if options.rounds:
        case = replace(case, rounds=options.rounds)
    parts = options.parts or [part for part in PARTS if part != "throughput" or cuda or options.quick]
    machine = describe(device)
    results: dict[str, Any] = {"machine": machine, "case": asdict(case), "targets": TARGETS}
    for part in parts:
        print(f"{part} ...", file=sys.stderr)
        if part == "ddp":
            results[part] = measure_ddp(case, device)
        elif part == "checkpoint":
            # Short steps, so that a checkpoint's delay is not lost in their noise.
            short = case if cuda or options.quick else replace(case, batch=8)
            results[part] = measure_checkpoint(short, device, options.scratch or Path(tempfile.gettempdir()))
        elif part == "determinism":
            results[part] = measure_determinism(case, device)
        else:
            peak = matrix_peak(device, 512 if options.quick or not cuda else 8192)
            compiled = cuda and not options.no_compile
            cases = [_of_model(name, options.batch, case.rounds) for name in options.models]
            rows = []
            for each in [case] if options.quick else cases:
                rows += measure_throughput(each, device, peak, compiled)
            results[part] = {"matrix_peak": peak, "rows": rows}
        shown = {key: value for key, value in results[part].items() if key != "seconds"}
        print(f"{part}: {json.dumps(shown)}")
    results["load_average_after"] = describe(device)["load_average"]
    file = update_results(options.out, "engine", machine, results)
    print(f"Written: {file}")
    return file


def _of_model(name: str, batch: int | None, rounds: int) -> cost.Case:
    return replace(cost.CASES["sit-xl-2"], model=name, batch=batch or MODELS[name], rounds=rounds)


if __name__ == "__main__":
    main()
