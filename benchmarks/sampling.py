"""Sampling's throughput, as a ratio to a plain eager float32 loop over the same network.

    python benchmarks/sampling.py                  # SiT-Ti/4 on a CPU; SiT-S/4 and SiT-XL/2 on a GPU
    python benchmarks/sampling.py --cases sit-xl-2 --rounds 20

The plain loop is what one writes in ten lines: Euler steps in float32, a batch at a time, the image to uint8 at last.
The contenders do the same steps by `vrpo.sampling`, with a float64 state, noise that is a function of the sample's
index, and an image that depends on nothing beside it. All take turns in one process, in an order shuffled every round.
Weights are random, which costs the same time as trained ones.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from machine import describe
from timing import paired_ratio, parser_of, take_turns, timed, update_results
from vrpo.config_load import validate
from vrpo.devices import DTYPES, resolve_device
from vrpo.diffusion.noise import SampleNoise
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.pixels import to_uint8
from vrpo.sampling import ImageSampler
from vrpo.sampling.source import lower_weights

PLAIN = "plain loop"


@dataclass(frozen=True)
class Case:
    """A network, and the images that a turn draws: ``batch`` is the plain loop's."""

    model: str
    size: int
    channels: int
    classes: int
    steps: int
    images: int
    batch: int
    rounds: int


CASES = {
    "sit-ti-4": Case("SiT-Ti/4", 32, 3, 10, steps=10, images=64, batch=64, rounds=9),
    "sit-s-4": Case("SiT-S/4", 32, 3, 10, steps=25, images=1024, batch=256, rounds=15),
    "sit-xl-2": Case("SiT-XL/2", 32, 4, 1000, steps=25, images=128, batch=64, rounds=10),
}
QUICK = Case("SiT-N/4", 16, 3, 10, steps=3, images=32, batch=16, rounds=2)


@dataclass(frozen=True)
class Contender:
    """A way to sample: autocast precision, and whether blocks are compiled."""

    precision: str
    compiled: bool = False


CONTENDERS = {
    "fp32": Contender("fp32"),
    "bf16": Contender("bf16"),
    "fp32 compiled": Contender("fp32", compiled=True),
    "bf16 compiled": Contender("bf16", compiled=True),
}


def build(case: Case, device: torch.device) -> DiffusionTransformer:
    """Return the case's network with weights of a trained one's size, so that no product is of zeros."""
    torch.manual_seed(0)
    network = build_transformer(
        case.model, input_size=case.size, in_channels=case.channels, num_classes=case.classes
    ).to(device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def labels_of(case: Case) -> Tensor:
    """Return the classes of the images drawn (B,)."""
    return torch.arange(case.images) % case.classes


@torch.no_grad()
def plain_loop(network: DiffusionTransformer, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Return images (B, C, H, W) by Euler steps, eager, in the network's own precision."""
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps, device=x.device)
        x = x - network(x, t, labels) / steps
    return to_uint8(x).cpu()


def plain(case: Case, network: DiffusionTransformer, device: torch.device) -> Callable[[], Tensor]:
    """Return the plain loop over all images of a turn."""
    shape = (case.channels, case.size, case.size)

    def draw() -> Tensor:
        batches = []
        for labels in labels_of(case).split(case.batch):
            noise = torch.randn(len(labels), *shape, device=device)
            batches.append(plain_loop(network, noise, labels.to(device), case.steps))
        return torch.cat(batches)

    return draw


def contender(
    case: Case, how: Contender, network: DiffusionTransformer, device: torch.device
) -> tuple[Callable[[], Tensor], int]:
    """Return the way ``how`` to draw all images of a turn, and how many the network sees at once."""
    config = validate(
        {"sample": {"sampler": "ode-euler", "steps": case.steps}, "train": {"precision": how.precision}},
        "the benchmark",
    )
    own = copy.deepcopy(network)
    lower_weights(own, DTYPES[how.precision])
    if how.compiled:
        own.compile_blocks(dynamic=False)
    sampler = ImageSampler(own, config, device=device)
    return lambda: sampler.images(range(case.images), labels_of(case), 0), sampler.compute_batch


def difference(case: Case, network: DiffusionTransformer, images: Tensor, device: torch.device) -> int:
    """Return the largest difference, in levels of 255, between ``images`` and the plain loop from the same noise."""
    noise = SampleNoise(0, range(case.images), (case.channels, case.size, case.size), device).initial()
    batches = zip(noise.split(case.batch), labels_of(case).split(case.batch), strict=True)
    same = torch.cat([plain_loop(network, x, labels.to(device), case.steps) for x, labels in batches])
    return int((same.int() - images.int()).abs().max())


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large square product, the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        best = min(best, timed(lambda: a @ b, device))
    return 2 * side**3 / best


def operations(case: Case, network: DiffusionTransformer, device: torch.device) -> int:
    """Return the floating-point operations of one evaluation of the network for one image."""
    x = torch.randn(1, case.channels, case.size, case.size, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.full((1,), 0.5, device=device), labels_of(case)[:1].to(device))
    return counter.get_total_flops()


def measure(case: Case, names: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Time the plain loop and the contenders ``names`` in turn, and return one row for each."""
    network = build(case, device)
    draws, batches, differences = {PLAIN: plain(case, network, device)}, {PLAIN: case.batch}, {PLAIN: 0}
    draws[PLAIN]()
    for name in names:
        draws[name], batches[name] = contender(case, CONTENDERS[name], network, device)
        differences[name] = difference(case, network, draws[name](), device)  # compiles, too
        print(f"{name} is ready", file=sys.stderr)
    seconds = take_turns({name: partial(timed, draw, device) for name, draw in draws.items()}, case.rounds)
    work = operations(case, network, device) * case.images * case.steps
    peaks = {name: peak(device, DTYPES[name]) for name in ("fp32", "bf16")}
    rows = []
    for name, own in seconds.items():
        precision = CONTENDERS[name].precision if name in CONTENDERS else "fp32"
        ratio, low, high = paired_ratio(seconds[PLAIN], own)
        rows.append(
            {
                "name": name,
                "precision": precision,
                "compiled": name in CONTENDERS and CONTENDERS[name].compiled,
                "network_batch": batches[name],
                "seconds": [round(value, 6) for value in own],
                "images_per_second": round(case.images / statistics.median(own), 4),
                "speed_up": ratio,
                "speed_up_95": [low, high],
                "share_of_peak": round(work / statistics.median(own) / peaks[precision], 4),
                "peak_tflops": round(peaks[precision] / 1e12, 3),
                "largest_difference": differences[name],
            }
        )
    return rows


def table(name: str, result: dict[str, Any]) -> str:
    """Return a case's rows as a markdown table."""
    case, machine = result["case"], result["machine"]
    lines = [
        f"{case['model']}, {case['steps']} Euler steps, {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']} (`{name}`)",
        "",
        "| sampling | images/s | speed-up (95%) | share of measured peak | largest difference, levels |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        low, high = row["speed_up_95"]
        lines.append(
            f"| {row['name']} | {row['images_per_second']:.2f} | {row['speed_up']:.2f} ({low:.2f}–{high:.2f}) "
            f"| {row['share_of_peak']:.0%} | {row['largest_difference']} |"
        )
    return "\n".join(lines)


def main(words: Iterable[str] | None = None) -> Path:
    """Measure the chosen cases, print their tables, and return the file that holds the results."""
    options = parser_of(__doc__, CASES, list(CONTENDERS)).parse_args(None if words is None else list(words))
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    if options.quick:
        cases = {"quick": QUICK}
    else:
        names = options.cases or (["sit-s-4", "sit-xl-2"] if device.type == "cuda" else ["sit-ti-4"])
        cases = {name: CASES[name] for name in names}
    results = {}
    for name, case in cases.items():
        chosen = replace(case, rounds=options.rounds or case.rounds)
        before = describe(device)
        rows = measure(chosen, options.contenders, device)
        results[name] = {
            "case": asdict(chosen),
            "machine": before,
            "load_average_after": describe(device)["load_average"],
            "rows": rows,
        }
        print(table(name, results[name]), end="\n\n")
    file = update_results(options.out, "sampling", before, results)
    print(f"Written: {file}")
    return file


if __name__ == "__main__":
    main()
