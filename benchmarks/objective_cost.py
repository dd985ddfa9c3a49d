"""Step time and peak memory of the alignment objectives, as ratios to REPA's.

    python benchmarks/objective_cost.py            # the small CPU model, or SiT-B/2 and SiT-XL/2 where there is a GPU
    python benchmarks/objective_cost.py --cases sit-xl-2 --rounds 50

A step is the trainer's own: random draws, forward, backward, optimiser, statistics, moving average. Data and targets
are synthetic and on the device already, as those of a token cache are; the contenders named ``online`` run an encoder
in the step. All share one trunk in one process and take turns in an order shuffled every round, so that what disturbs
the machine disturbs all of them.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from machine import describe
from timing import paired_ratio, parser_of, take_turns, timed, update_results
from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.alignment.objective import TargetBatch
from vrpo.config import RunConfig
from vrpo.config_load import load_preset, merge, validate
from vrpo.devices import DTYPES, resolve_device
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.planning.live_bytes import LiveBytes, storages
from vrpo.sampling import build_denoising
from vrpo.training.ema import Ema
from vrpo.training.optim import Optimizer
from vrpo.training.step import DenoisingStep, draw_step
from vrpo.vision.encoders import Encoder, load_encoder

WARMUP = 3
# Where in its budget a run is timed: past VRPO's warm-up (10%), before HASTE's end (40%).
IMAGES_SEEN, BUDGET = 250_000_000, 1_000_000_000
MEMORY = {
    "cuda": "standing tensors, plus the growth of max_memory_allocated in a step",
    "cpu": "standing tensors, plus the most bytes of tensors made in a step and alive at one time",
}


@dataclass(frozen=True)
class Case:
    """A trunk and its batch: ``size`` and ``channels`` of its input, ``width`` of the encoder tokens it is given."""

    preset: str
    model: str
    batch: int
    size: int
    channels: int
    classes: int
    image_size: int
    width: int
    online_encoder: str
    rounds: int
    burst: int


CASES = {
    "sit-ti-4": Case("cifar10-sit-ti-4", "SiT-Ti/4", 64, 32, 3, 10, 32, 320, "dinov2-vit-s", rounds=30, burst=1),
    "sit-s-2": Case("cifar10-sit-s-2", "SiT-S/2", 16, 32, 4, 1000, 256, 768, "dinov2-vit-s", rounds=30, burst=1),
    "sit-b-2": Case("cifar10-sit-s-2", "SiT-B/2", 64, 32, 4, 1000, 256, 768, "dinov2-vit-s", rounds=30, burst=5),
    "sit-xl-2": Case("cifar10-sit-s-2", "SiT-XL/2", 32, 32, 4, 1000, 256, 768, "dinov2-vit-s", rounds=30, burst=5),
}
QUICK = Case("cifar10-sit-ti-4", "SiT-N/4", 8, 16, 3, 10, 16, 16, "vit_tiny_patch16_224", rounds=3, burst=1)


@dataclass(frozen=True)
class Contender:
    """An objective with changes to its configuration, and the contender it is compared to."""

    objective: str
    reference: str = "repa"
    changes: dict[str, Any] | None = None
    noisings: int = 1
    online: bool = False


SAMPLED = {"vrpo": {"mode": "sampled", "group": 8}}
# The encoder still supplies, so that every step tries the other supplier.
TRIAL = {"supply": "advantage", "earliest": 1.0, "latest": 1.0}
CONTENDERS = {
    "none": Contender("none"),
    "repa": Contender("repa"),
    "irepa": Contender("irepa"),
    "contrastive": Contender("contrastive"),
    "haste": Contender("haste"),
    "vrpo analytic": Contender("vrpo"),
    "vrpo sampled": Contender("vrpo", changes=SAMPLED),
    "repi": Contender("repi"),
    "repa, scaffold trial": Contender("repa", changes={"scaffold": TRIAL}),
    "reg": Contender("reg"),
    "vrpo, scaffold trial and token": Contender("vrpo", changes={"scaffold": TRIAL, "token": {"use": True}}),
    "repa online": Contender("repa", "repa online", online=True),
    "vrpo analytic online": Contender("vrpo", "repa online", online=True),
    "repa online, 4 noisings": Contender("repa", "repa online", noisings=4, online=True),
    "vrpo analytic online, 4 noisings": Contender("vrpo", "repa online", noisings=4, online=True),
}


class Bench:
    """What the contenders of one case share: trunk, its moving average and optimiser state, data."""

    def __init__(self, case: Case, device: torch.device, token: bool = False) -> None:
        """Build the trunk, with a representation token or without."""
        self.case, self.device = case, device
        torch.manual_seed(0)
        self.trunk: DiffusionTransformer = build_transformer(
            case.model, input_size=case.size, in_channels=case.channels, num_classes=case.classes
        )
        if token:
            self.trunk.add_token(case.width)
        self.trunk.to(device).train()
        self.ema = Ema(self.trunk, 0.9999)
        self.trunk_state: dict[nn.Parameter, Any] = {}
        shape = (case.batch, case.channels, case.size, case.size)
        self.clean = torch.randn(shape, device=device)
        self.labels = torch.randint(case.classes, (case.batch,), device=device)
        pictures = (case.batch, 3, case.image_size, case.image_size)
        self.images = torch.randint(256, pictures, dtype=torch.uint8, device=device)
        self.targets = torch.randn(case.batch, self.trunk.num_tokens, case.width, device=device)
        self.class_tokens = torch.randn(case.batch, case.width, device=device)
        self.encoder: Encoder | None = None

    def online_encoder(self) -> Encoder:
        """Return the encoder with random weights, the same for all contenders."""
        if self.encoder is None:
            self.encoder = load_encoder(
                self.case.online_encoder, weights="random", grid=self.trunk.grid_size, device=self.device
            )
        return self.encoder


class Runner:
    """One contender, ready to take steps."""

    def __init__(self, bench: Bench, contender: Contender, config: RunConfig) -> None:
        self.bench, self.contender, self.config = bench, contender, config
        self.encoder = bench.online_encoder() if contender.online else None
        torch.manual_seed(1)
        self.objective = build_objective(
            self.config.align,
            TrunkShape.of(bench.trunk, bench.case.model),
            (bench.case.width if self.encoder is None else self.encoder.width,),
            (bench.case.width, bench.case.width),
        ).to(bench.device)
        train = self.config.train
        self.optimizer = Optimizer([*bench.trunk.parameters(), *self.objective.parameters()], train, bench.device)
        denoising = build_denoising(bench.trunk.kind, self.config.diffusion)
        self.module = DenoisingStep(bench.trunk, self.objective, denoising, DTYPES[train.precision])
        self.steps = 0

    def step(self) -> Tensor:
        """Take one training step and return its loss."""
        bench, noisings = self.bench, self.contender.noisings
        case = bench.case
        rows = slice(case.batch // noisings)
        targets = TargetBatch()
        if self.contender.objective != "none":
            tokens = bench.targets[rows] if self.encoder is None else self.encoder.tokens(bench.images[rows])
            tokens = _repeat(tokens, noisings)
            # As of an encoder without attention, whose tokens serve as keys and values.
            attended = () if self.config.align.supply == "none" else (tokens,)
            classes = (_repeat(bench.class_tokens[rows], noisings),) if self.config.align.uses_token else ()
            targets = TargetBatch((tokens,), attended, attended, classes)
        draws = draw_step(
            0,
            self.steps,
            count=case.batch,
            shape=(case.channels, case.size, case.size),
            noisings=noisings,
            label_dropout=self.config.model.label_dropout,
            device=bench.device,
            token_width=bench.trunk.token_width,
        )
        output = self.module(
            _repeat(bench.clean[rows], noisings),
            _repeat(bench.labels[rows], noisings),
            draws,
            targets,
            _repeat(bench.images[rows], noisings) if targets.tokens else None,
            images_seen=IMAGES_SEEN + self.steps * case.batch,
            budget=BUDGET,
            sample_weight=self.optimizer.scale / case.batch,
        )
        output.loss.backward()
        self.optimizer.step(IMAGES_SEEN)
        self.objective.update()
        bench.ema.update(bench.trunk, IMAGES_SEEN)
        self.steps += 1
        return output.loss.detach()

    def timing(self) -> Callable[[], float]:
        """Return what takes a turn's steps and reports the seconds of one."""
        return lambda: timed(self.step, self.bench.device, self.bench.case.burst)

    def share_trunk_state(self) -> None:
        """Use the moments that the first contender made for the trunk: nine copies of them would not fit a GPU."""
        shared = self.bench.trunk_state
        state = self.optimizer.adamw.state
        for parameter in self.bench.trunk.parameters():
            if parameter in shared:
                state[parameter] = shared[parameter]
            elif parameter in state:
                shared[parameter] = state[parameter]

    def standing_bytes(self) -> int:
        """Return the bytes that a run of this contender alone holds between steps: weights, moments, data."""
        bench = self.bench
        held: list[Tensor] = [bench.clean, bench.labels]
        if self.contender.objective != "none":
            held += [bench.images] if self.encoder is not None else [bench.images, bench.targets]
        for module in (bench.trunk, bench.ema.network, self.objective, self.encoder):
            if module is not None:
                held += [*module.parameters(), *module.buffers()]
        for state in self.optimizer.adamw.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        return sum({storage._cdata: storage.nbytes() for storage in storages(held)}.values())

    def transient_bytes(self) -> int:
        """Return the most that one step holds beside that: activations, gradients, temporaries."""
        device = self.bench.device
        gc.collect()
        if device.type != "cuda":
            with LiveBytes() as live:
                self.step()
            return live.peak
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before


def _config(case: Case, contender: Contender) -> RunConfig:
    values = merge(
        load_preset(f"{case.preset}-{contender.objective}"),
        {
            "model": {"name": case.model},
            "align": contender.changes or {},
            "train": {"batch_size": case.batch, "noisings": contender.noisings, "precision": "bf16"},
        },
    )
    return validate(values, "the benchmark")


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)


def measure(case: Case, names: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Time the contenders ``names`` in turn and return one row for each.

    Raises:
        ConfigError: a contender that does not fit the case.
    """
    benches: dict[bool, Bench] = {}
    runners = {}
    for name in names:
        config = _config(case, CONTENDERS[name])
        token = config.align.uses_token
        if token not in benches:
            benches[token] = Bench(case, device, token)
        runner = runners[name] = Runner(benches[token], CONTENDERS[name], config)
        runner.share_trunk_state()
        for _ in range(WARMUP):
            runner.step()
        runner.share_trunk_state()
    seconds = take_turns({name: runner.timing() for name, runner in runners.items()}, case.rounds)
    rows: list[dict[str, Any]] = []
    for name, runner in runners.items():
        memory = {"standing_bytes": runner.standing_bytes(), "transient_bytes": runner.transient_bytes()}
        rows.append(
            {
                "name": name,
                "reference": runner.contender.reference,
                "objective": runner.contender.objective,
                "noisings": runner.contender.noisings,
                "encoder": None if runner.encoder is None else f"{runner.encoder.name}, random weights",
                "loss": runner.step().item(),
                "step_seconds": round(statistics.median(seconds[name]), 6),
                "seconds": [round(value, 6) for value in seconds[name]],
                **memory,
                "peak_bytes": sum(memory.values()),
            }
        )
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        reference = by_name.get(row["reference"])
        if reference is not None:
            row["time_ratio"], *row["time_ratio_95"] = paired_ratio(row["seconds"], reference["seconds"])
            row["memory_ratio"] = round(row["peak_bytes"] / reference["peak_bytes"], 4)
    return rows


def table(name: str, result: dict[str, Any]) -> str:
    """Return a case's rows as a markdown table."""
    case = result["case"]
    lines = [
        f"{case['model']}, batch {case['batch']}, bf16, {result['machine']['device']}, "
        f"{result['machine']['threads']} threads, torch {result['machine']['torch']} (`{name}`)",
        "",
        "| objective | step, ms | time / reference (95%) | peak memory, MB | memory / reference | reference |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in result["rows"]:
        ratio = memory = "–"
        if "time_ratio" in row:
            low, high = row["time_ratio_95"]
            ratio = f"{row['time_ratio']:.3f} ({low:.3f}–{high:.3f})"
            memory = f"{row['memory_ratio']:.3f}"
        lines.append(
            f"| {row['name']} | {1000 * row['step_seconds']:.1f} | {ratio} | {row['peak_bytes'] / 1e6:,.0f} "
            f"| {memory} | {row['reference']} |"
        )
    return "\n".join(lines)


def main(words: Iterable[str] | None = None) -> Path:
    """Measure the chosen cases, print their tables, and return the file that holds the results."""
    parser = parser_of(__doc__, CASES, list(CONTENDERS), batch="noised images a step")
    options = parser.parse_args(None if words is None else list(words))
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    if options.quick:
        cases = {"quick": QUICK}
    else:
        names = options.cases or (["sit-b-2", "sit-xl-2"] if device.type == "cuda" else ["sit-ti-4"])
        cases = {name: CASES[name] for name in names}
    results = {}
    for name, case in cases.items():
        chosen = {**asdict(case), "rounds": options.rounds or case.rounds, "batch": options.batch or case.batch}
        before = describe(device)
        rows = measure(Case(**chosen), options.contenders, device)
        results[name] = {
            "case": chosen,
            "machine": before,
            "load_average_after": describe(device)["load_average"],
            "memory": MEMORY["cuda" if device.type == "cuda" else "cpu"],
            "rows": rows,
        }
        print(table(name, results[name]), end="\n\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    file = update_results(options.out, "objective-cost", before, results)
    print(f"Written: {file}")
    return file


if __name__ == "__main__":
    main()
