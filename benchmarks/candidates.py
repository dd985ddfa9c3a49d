"""Is compute better spent on choosing between trajectories, on more steps, or on guidance?

    python benchmarks/candidates.py RUN --reference data/test --features mobilenetv2_100 \
        --features-weights mobilenetv2.safetensors --samples 10000 --out results/candidates.json

Every selection (candidates x time x rule) is scored beside the same run sampled at the same number of network
evaluations an image: with more steps, and under guidance at each scale. All see the same seeds and labels. The file is
written after every row; rows it holds already, of the same checkpoint and samples, are not drawn again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from machine import describe
from vrpo.devices import resolve_device
from vrpo.errors import VrpoError
from vrpo.evaluation.evaluate import evaluate_images
from vrpo.evaluation.reference import Reference, load_reference
from vrpo.files import write_text
from vrpo.sampling import RunSampler
from vrpo.sampling.candidates import Selection
from vrpo.vision.encoders import FeatureNetwork, load_feature_network


@dataclass(frozen=True)
class Contender:
    """One way of sampling a run."""

    name: str
    steps: int
    guidance_scale: float = 1.0
    selection: Selection | None = None


def contenders(steps: int, selections: list[Selection], scales: list[float]) -> list[Contender]:
    """Return plain sampling, every selection, and what else its evaluations could buy."""
    found = [Contender("plain", steps)]
    costs = set()
    for selection in selections:
        cost = (1 - selection.time) * selection.count + selection.time
        costs.add(round(steps * cost))
        name = f"{selection.rule} of {selection.count} at {selection.time:g}"
        found.append(Contender(name, steps, selection=selection))
    for evaluations in sorted(costs):
        found.append(Contender(f"{evaluations} steps", evaluations))
    for scale in scales:
        for evaluations in sorted({2 * steps, *costs}):
            taken = max(1, round(evaluations / 2))
            found.append(Contender(f"guidance {scale:g}, {taken} steps", taken, scale))
    return found


class Evaluations:
    """Counts the rows that a network is run on."""

    def __init__(self, network: nn.Module) -> None:
        self.rows = 0
        self._hook = network.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any) -> None:
        self.rows += len(inputs[0])

    def close(self) -> None:
        """Stop counting."""
        self._hook.remove()


def measure(
    contender: Contender, options: argparse.Namespace, reference: Reference, network: FeatureNetwork
) -> dict[str, Any]:
    """Draw and score one contender's samples."""
    settings = {"sampler": "ode-euler", "steps": contender.steps, "guidance_scale": contender.guidance_scale}
    device = resolve_device(options.device)
    source = RunSampler(options.run, settings, "ema", device, selection=contender.selection)
    count = Evaluations(source.loaded.network)
    start = time.perf_counter()
    images, _ = source.draw(options.samples, "balanced", options.seed)
    seconds = time.perf_counter() - start
    count.close()
    # the last group is filled up
    drawn = -(-options.samples // source.sampler.compute_batch) * source.sampler.compute_batch
    result = evaluate_images(
        images,
        reference,
        network,
        metrics=("fd", "kid", "precision", "recall"),
        protocol_fields=source.protocol("balanced", options.seed),
    )
    return {
        "name": contender.name,
        "evaluations": count.rows / drawn,
        "seconds": round(seconds, 2),
        "metrics": result.metrics,
        "protocol": result.protocol,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, by the evaluations they took."""
    lines = [f"{'sampling':>28} {'evals':>7} {'FD':>9} {'precision':>9} {'recall':>7}"]
    for row in sorted(rows, key=lambda row: (row["evaluations"], row["name"])):
        metrics = row["metrics"]
        lines.append(
            f"{row['name']:>28} {row['evaluations']:7.1f} {metrics['fd']:9.3f} {metrics['precision']:9.3f} "
            f"{metrics['recall']:7.3f}"
        )
    return "\n".join(lines)


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run with classes, a projector and class prototypes")
    parser.add_argument("--reference", type=Path, required=True, help="images to score against")
    parser.add_argument("--features", required=True, help="feature network; better not the run's own encoder")
    parser.add_argument("--features-weights", type=Path)
    parser.add_argument("--features-size", type=int)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--select-at", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--rules", nargs="+", choices=["best", "resample"], default=["best", "resample"])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.25, 1.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """Score every contender that the file does not hold yet."""
    options = parse(words)
    network = load_feature_network(
        options.features,
        weights=options.features_weights,
        input_size=options.features_size,
        device=resolve_device(options.device),
        dtype=torch.float32,
    )
    reference = load_reference(options.reference, network)
    source = RunSampler(options.run, {}, "ema", torch.device("cpu"))
    about = {
        "run": source.loaded.config.name,
        "objective": source.loaded.config.align.objective,
        "images": source.loaded.images,
        "weights_hash": source.loaded.weights_hash,
        "samples": options.samples,
        "seed": options.seed,
        "features": network.fingerprint,
        "reference": reference.record.fingerprint,
    }
    rows: list[dict[str, Any]] = []
    if options.out.is_file():
        stored = json.loads(options.out.read_text("utf-8"))
        if {key: stored.get(key) for key in about} == about:
            rows = stored["rows"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    every = itertools.product(options.candidates, options.select_at, options.rules)
    selections = [Selection(count, at, rule) for count, at, rule in every]
    device = resolve_device(options.device)
    for contender in contenders(options.steps, selections, options.guidance):
        if any(row["name"] == contender.name and row["protocol"]["steps"] == contender.steps for row in rows):
            continue
        rows.append(measure(contender, options, reference, network))
        write_text(options.out, json.dumps({**about, "machine": describe(device), "rows": rows}, indent=1))
        print(table(rows[-1:]).splitlines()[1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except VrpoError as error:
        sys.exit(f"candidates: {error}")
