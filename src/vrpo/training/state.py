"""What a checkpoint holds of a run, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vrpo.alignment.prototypes import Prototypes
from vrpo.checkpoints import Checkpoint, load_checkpoint
from vrpo.config import RunConfig
from vrpo.decoding import latent_state
from vrpo.errors import CheckpointError, ConfigError
from vrpo.files import load_into
from vrpo.processes import World
from vrpo.training.checkpoint import find_newest
from vrpo.training.ema import Ema
from vrpo.training.optim import Optimizer
from vrpo.training.rewind import passed_at, read_rewinds, rewind_run, set_aside_rewound
from vrpo.training.setup import Parts


@dataclass
class Counters:
    """How far a run is: steps and images trained on, seconds of training, steps whose data rewinds passed over."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    passed: int = 0

    @property
    def position(self) -> int:
        """The place of the next step's data and noise in the run's order."""
        return self.step + self.passed


@dataclass(frozen=True)
class RunState:
    """All of a run that training changes, but the optimiser, which can be built only when weights are in place."""

    config: RunConfig
    parts: Parts
    ema: Ema
    prototypes: Prototypes
    counters: Counters

    def tensors(self, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint keeps, by part."""
        return {
            "model": self.parts.trunk.state_dict(),
            "ema": self.ema.network.state_dict(),
            "objective": {**self.parts.objective.state_dict(), **self.prototypes.state()},
            "optimizer": optimizer.state(),
        }

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself."""
        dataset = self.parts.dataset
        return {
            **asdict(self.counters),
            "seconds": round(self.counters.seconds, 3),
            "network": self.parts.trunk.config,
            "class_names": list(dataset.class_names) if self.parts.num_classes else [],
            "data": dataset.fingerprint,
            **latent_state(dataset.manifest),
            "encoders": self.parts.targets.fingerprints,
            "seed": self.config.seed,
        }

    def take(self, checkpoint: Checkpoint, run: Path) -> None:
        """Go on from a checkpoint of folder ``run``.

        Raises:
            CheckpointError: it is of other data, encoders or networks.
            ConfigError: it has seen more images than the budget.
        """
        state, train = checkpoint.state, self.config.train
        if state["data"] != self.parts.dataset.fingerprint:
            raise CheckpointError(
                f"{run} was trained on another data set than {self.parts.dataset.path}: give the one in its "
                "config.yaml."
            )
        if state["encoders"] != self.parts.targets.fingerprints:
            raise CheckpointError(f"{run} was aligned to another encoder: give the weights that it began with.")
        where = f"the checkpoint at step {state['step']} of {run}"
        load_into(self.parts.trunk, checkpoint.tensors["model"], where)
        load_into(self.ema.network, checkpoint.tensors["ema"], where)
        load_into(self.parts.objective, self.prototypes.load(checkpoint.tensors["objective"]), where)
        counters = self.counters
        counters.step, counters.images, counters.seconds = state["step"], state["images"], state["seconds"]
        counters.passed = passed_at(read_rewinds(run), counters.step)
        if counters.images > train.images + train.batch_size:
            raise ConfigError(
                f"{run} has trained on {counters.images:,} images already, more than train.images {train.images:,}: "
                "give a larger budget."
            )


def take_up(
    run: Path, state: RunState, rewind: int | None, world: World, say: Callable[[str], None]
) -> dict[str, Tensor] | None:
    """Fill ``state`` from the newest checkpoint that verifies; return the optimiser's part, None if there is none.

    ``rewind`` goes back to the newest one of at most that many images first.

    Raises:
        CheckpointError, ConfigError: there are checkpoints, but none that this run can go on from.
    """
    if rewind is not None:
        say(world.ask_first(lambda: rewind_run(run, rewind, state.config.train.batch_size)))
    world.ask_first(lambda: set_aside_rewound(run))
    found = world.ask_first(lambda: find_newest(run))
    if found is None:
        say(f"{run} has no checkpoint: starting from the beginning.")
        return None
    path, complaints = found
    for complaint in complaints:
        say(f"Passed over a checkpoint: {complaint}")
    with world.agreed():
        checkpoint = load_checkpoint(path)
        state.take(checkpoint, run)
    say(f"Resumed {run} at {state.counters.images:,} images (step {state.counters.step}).")
    return checkpoint.tensors["optimizer"]
