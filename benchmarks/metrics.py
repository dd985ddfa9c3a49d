"""Time and peak memory of the evaluation's metrics on synthetic features of a given shape.

    python benchmarks/metrics.py --threads 2

Features resemble pooled activations of a network: non-negative, with correlated channels and a decaying spectrum.
Every step is timed in a process of its own, so that its peak memory is its own. The result file holds the machine, the
thread count and the load average before and after each step: on a busy machine wall-clock time says little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

from machine import describe


def draw_features(count: int, width: int, seed: int) -> torch.Tensor:
    """Return features (count, width); equal seeds modulo 100 share their channels' correlations."""
    mix = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
    mix *= torch.linspace(0, -3, 256).exp()[:, None]
    draws = torch.Generator().manual_seed(seed)
    features = torch.empty(count, width)
    for part in features.split(4096):
        torch.mm(torch.randn(len(part), 256, generator=draws), mix, out=part)
        part.add_(torch.randn(part.shape, generator=draws), alpha=0.3).relu_()
    return features


def frechet(samples: int, reference: int, width: int) -> dict[str, float]:
    """Moments of ``samples`` vectors and the distance to moments that are already there."""
    from vrpo.evaluation.frechet import FeatureStatistics, frechet_distance

    first, second = draw_features(samples, width, 1), draw_features(max(reference, 3 * width), width, 2)
    against = FeatureStatistics()
    against.update(second)
    start = time.perf_counter()
    statistics = FeatureStatistics()
    for batch in first.split(1000):
        statistics.update(batch)
    moments = time.perf_counter()
    value = frechet_distance(statistics, against)
    end = time.perf_counter()
    return {"seconds": end - start, "moments_seconds": moments - start, "value": value}


def kid(samples: int, reference: int, width: int) -> dict[str, float]:
    """KID over 100 subsets of 1,000."""
    from vrpo.evaluation.kernel import kernel_distance

    first, second = draw_features(samples, width, 1), draw_features(reference, width, 2)
    start = time.perf_counter()
    distance = kernel_distance(first, second, subset_size=min(1000, samples, reference))
    return {"seconds": time.perf_counter() - start, "value": distance.mean}


def precision_and_recall(samples: int, reference: int, width: int) -> dict[str, float]:
    """Both manifolds and both coverages."""
    from vrpo.evaluation.precision_recall import precision_recall

    first, second = draw_features(samples, width, 1), draw_features(reference, width, 2)
    start = time.perf_counter()
    cover = precision_recall(first, second)
    return {"seconds": time.perf_counter() - start, "value": cover.precision, "recall": cover.recall}


STEPS = {"frechet": frechet, "kid": kid, "precision_recall": precision_and_recall}


def _measured(name: str, arguments: tuple[int, int, int], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    before = os.getloadavg()[0]
    busy = time.process_time()
    result: dict[str, Any] = STEPS[name](*arguments)
    result["processor_seconds_with_setup"] = time.process_time() - busy
    unit = 1 if platform.system() == "Darwin" else 1024
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    result["load_average"] = [before, os.getloadavg()[0]]
    return result


def main() -> None:
    """Run the chosen steps and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", nargs="+", choices=sorted(STEPS), default=sorted(STEPS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    # BLAS libraries read these once, when a process loads them: the measuring processes start afresh.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    machine = describe(torch.device("cpu"))
    shape = (options.samples, options.reference, options.width)
    results = {}
    for name in options.steps:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(_measured, (name, shape, options.threads))
        print(name, json.dumps(results[name]), flush=True)
    record = {
        "samples": options.samples,
        "reference": options.reference,
        "width": options.width,
        "machine": machine,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"metrics-{options.samples}x{options.reference}x{options.width}.json"
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
