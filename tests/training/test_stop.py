"""A request to stop, at every moment: soon honoured, nothing lost; the run goes on as if it had not been stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from team import Team, train_told

from vrpo.config import RunConfig
from vrpo.training import checkpoint as checkpoint_module
from vrpo.training.checkpoint import find_checkpoints
from vrpo.training.trainer import Trainer
from vrpo.training.validation import Validation

WATCHED = {
    "train": {"images": 48, "checkpoint_every": 16, "validate_every": 16, "sample_every": 16, "evaluate_every": 16},
    "evaluate": {"features": "resnet10t", "weights": "random", "input_size": 32, "samples": 24, "metrics": ["fd"]},
    "sample": {"compute_batch": 4},
}


def final(folder: Path) -> bytes:
    return (find_checkpoints(folder)[0] / "model.safetensors").read_bytes()


def measured(folder: Path) -> list[tuple[str, int]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return sorted((record["kind"], record["images"]) for record in records if record["kind"] != "train")


class Moment:
    """Sends a signal at the first call of something at ``images`` images, and counts the calls from then on."""

    def __init__(
        self, run: Trainer, what: str, images: int, number: int, times: int, patch: pytest.MonkeyPatch
    ) -> None:
        self.calls = 0
        place: Any
        place, name = {
            "step": (run, "_train_step"),
            "validation": (Validation, "_measure"),
            "samples": (run.observer._sampler, "_group"),
            "write": (checkpoint_module, "save_tensors"),
        }[what]
        original = getattr(place, name)

        def called(*arguments: Any) -> Any:
            if run.images == images:
                self.calls += 1
                if self.calls == 1:
                    for _ in range(times):
                        os.kill(os.getpid(), number)
            return original(*arguments)

        patch.setattr(place, name, called)


def start(config: RunConfig, folder: Path, **options: Any) -> Trainer:
    return Trainer(config, folder, say=lambda sentence: None, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def config(make_config: Any, whole: Path) -> RunConfig:
    """The configuration of a run that measures and draws, of which ``whole`` is the undisturbed one."""
    config = make_config(**WATCHED)
    if not whole.is_dir():
        start(config, whole).train()
    return config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("what", "images", "reached"),
    [
        ("step", 0, 8),
        ("step", 40, 48),
        ("validation", 0, 0),
        ("validation", 32, 32),
        ("samples", 16, 16),
        ("samples", 48, 48),
        ("write", 16, None),
    ],
)
def test_stopped_at_any_moment(
    what: str,
    images: int,
    reached: int | None,
    number: signal.Signals,
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = start(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        moment = Moment(run, what, images, number, 1, patch)
        result = run.train()
    assert (result.status, result.signal) == ("stopped", number)
    if reached is not None:
        assert result.images == reached
    if what in ("validation", "samples"):
        assert moment.calls == 1, "what was under way was not broken off"
    assert find_checkpoints(tmp_path / "run")[0].name == f"step-{result.step:08d}"
    assert start(config, tmp_path / "run", resume=True).train().status == "finished"
    assert final(tmp_path / "run") == final(whole)
    assert measured(tmp_path / "run") == measured(whole)


@pytest.mark.parametrize(("what", "images", "kept"), [("step", 40, 32), ("samples", 32, 32)])
def test_a_second_interrupt_ends_at_once_and_keeps_the_last_checkpoint(
    what: str, images: int, kept: int, config: RunConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        Moment(run, what, images, signal.SIGINT, 2, patch)
        with pytest.raises(KeyboardInterrupt):
            run.train()
        run._writer.wait()  # as the interpreter does before it ends
    assert find_checkpoints(tmp_path / "run")[0].name == f"step-{kept // 8:08d}"
    start(config, tmp_path / "run", resume=True).train()
    assert final(tmp_path / "run") == final(whole)
    assert measured(tmp_path / "run") == measured(whole)


def test_what_is_trained_is_saved_before_it_is_measured(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that takes the process with it, as one that runs out of memory, costs nothing trained."""
    run = start(config, tmp_path / "run")

    class Gone(BaseException):
        pass

    def gone(*arguments: Any) -> None:
        if run.images:
            raise Gone

    monkeypatch.setattr(run.observer, "scorer", gone)
    with pytest.raises(Gone):
        run.train()
    run._writer.wait()
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-00000002"]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    workers = Team(2)
    yield workers
    workers.close()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("what", ["validation", "samples"])
def test_one_process_that_is_told_while_all_measure_stops_all(
    what: str, parallel: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    more = {"train": WATCHED["train"] | {"parallel": parallel}, "evaluate": {}}
    values = make_config(**WATCHED | more).model_dump(mode="json")
    values["evaluate"] = WATCHED["evaluate"]
    told = team.run(2, train_told, values, tmp_path / "run", False, what, 16)
    assert [found[:2] for found in told] == [("stopped", 16)] * 2
    assert max(found[2] for found in told) < 4, "what was under way was not broken off"
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-00000002"]
    again = team.run(2, train_told, values, tmp_path / "run", True, what, -1)
    assert [found[:2] for found in again] == [("finished", 48)] * 2
    kinds = ("evaluation", "samples", "validation")
    wanted = {(kind, images) for kind in kinds for images in (16, 32, 48)} | {("samples", 0), ("validation", 0)}
    assert set(measured(tmp_path / "run")) == wanted
