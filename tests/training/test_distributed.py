"""Several processes train as one does, refuse as one does, and pass a run on to more or fewer of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import team as team_module
import torch
from team import Team

from vrpo.checkpoints import PARTS, find_checkpoints, load_checkpoint
from vrpo.errors import ConfigError
from vrpo.processes import World
from vrpo.training.share import share
from vrpo.training.trainer import Trainer

# A token, and a scaffold whose trials not every pass of every process takes part in.
INSIDE = {
    "objective": "reg",
    "scaffold": {"supply": "advantage", "fraction": 0.25, "latest": 0.5},
}
SAMPLED = {"mode": "sampled", "group": 4, "trust": 0.01}


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    workers = Team(4)
    yield workers
    workers.close()


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def alone(config: Any, folder: Path) -> None:
    Trainer(config, folder, say=lambda sentence: None).train()


def assert_same_curve(first: Path, second: Path) -> None:
    a, b = records(first), records(second)
    assert [record["images"] for record in a] == [record["images"] for record in b]
    for one, other in zip(a, b, strict=True):
        for name in ("denoising", "alignment_loss", "alignment", "grad_norm"):
            np.testing.assert_allclose(numbers(one.get(name)), numbers(other.get(name)), 1e-5, 1e-5, err_msg=name)
        for name in (name for name in one if name.startswith("objective/")):
            np.testing.assert_allclose(numbers(one[name]), numbers(other[name]), 1e-4, 1e-4, err_msg=name)


def numbers(value: Any) -> np.ndarray:
    """Return a value of the telemetry as an array, not a number where it is None."""
    return np.asarray(value, dtype=float)


@pytest.mark.parametrize(
    ("align", "size", "train"),
    [
        ({"objective": "repa"}, 4, {"micro_batch": 1}),
        ({"objective": "repa"}, 4, {"parallel": "hybrid", "shard_size": 2}),
        ({"objective": "vrpo", "vrpo": {"warmup": 0.2}}, 2, {}),
        ({"objective": "vrpo", "vrpo": {"warmup": 0.2}}, 2, {"parallel": "fsdp", "micro_batch": 2}),
        ({"objective": "vrpo", "depth": [1, 2], "vrpo": {"warmup": 0.2, **SAMPLED}}, 2, {"micro_batch": 2}),
        ({"objective": "haste", "haste": {"stop": "fixed", "stop_images": 48}}, 2, {"micro_batch": 2}),
        (INSIDE, 2, {"micro_batch": 2}),
        (INSIDE, 2, {"parallel": "fsdp"}),
    ],
    ids=["repa", "repa-hybrid", "vrpo", "vrpo-fsdp", "vrpo-sampled", "haste-that-ends", "inside", "inside-fsdp"],
)
def test_processes_train_as_one(
    align: dict[str, Any], size: int, train: dict[str, Any], team: Team, make_config: Any, tmp_path: Path
) -> None:
    observed = {"validate_every": 48, "sample_every": 48, "validation_images": 30}
    alone(make_config(align=align, train=observed), tmp_path / "one")
    config = make_config(align=align, train={**observed, **train})
    folder = tmp_path / "several"
    answers = team.run(size, team_module.train, config.model_dump(mode="json"), folder)
    assert [status for status, *_ in answers] == ["finished"] * size
    assert all(not said for _, said, *_ in answers[1:]), "only the first process speaks"
    assert any(f"divided among {size} processes: {8 // size} each" in sentence for sentence in answers[0][1])
    assert_same_curve(tmp_path / "one", folder)
    for name in ("denoising", "alignment"):
        found = [[record[name] for record in records(run, "validation")] for run in (tmp_path / "one", folder)]
        assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert len(records(folder, "samples")) == 3


@pytest.mark.parametrize("objective", ["none", "repa"])
def test_processes_that_compare_no_image_report_with_those_that_do(
    objective: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    network = {"kind": "encoder", "network": "resnet10t", "network_weights": "random", "feature": 1, "input_size": 32}
    align = {
        "objective": objective,
        "perceptual_image": {**network, "start": 0.5, "max_time": 0.8, "fraction": 0.5, "weight": {"0": 1.0}},
    }
    config = make_config(align=align, train={"images": 24, "batch_size": 2, "log_every": 2, "micro_batch": 1})
    alone(config, tmp_path / "one")
    team.run(2, team_module.train, config.model_dump(mode="json"), tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    found = [record.get("objective/image_distance") for record in records(tmp_path / "two")]
    assert found[:6] == [None] * 6
    assert None in found[6:], "a step compares nothing"
    assert sum(value is not None for value in found) >= 2


Station = tuple[int, str, int | None]
"""How many processes, how they share the weights, and up to how many images."""


def check_passing_on(
    align: dict[str, Any], stations: Sequence[Station], images: int, team: Team, make_config: Any, folder: Path
) -> None:
    """Train alone, and from station to station: every image comes once an epoch, and there is one loss curve."""
    train = {"images": images, "log_every": 8}
    alone(make_config(align=align, train=train), folder / "one")
    seen: list[int] = []
    for size, parallel, stop in stations:
        config = make_config(align=align, train={**train, "parallel": parallel, "shard_size": 2 if size > 1 else 1})
        values = config.model_dump(mode="json")
        answers = team.run(size, team_module.train, values, folder / "passed", bool(seen), stop)
        assert [answer[0] for answer in answers] == ["finished" if stop is None else "stopped"] * size
        # Of each step, the rows of all processes in order.
        steps = zip(*(np.reshape(rows, (-1, 8 // size)).tolist() for *_, rows in answers), strict=True)
        seen += [row for step in steps for part in step for row in part]
    assert len(seen) == images
    for epoch in range(images // 90):
        assert sorted(seen[90 * epoch : 90 * epoch + 90]) == list(range(90)), "an epoch holds every image once"
    assert_same_curve(folder / "one", folder / "passed")


@pytest.mark.parametrize("objective", ["repa", "vrpo"])
def test_a_run_passes_from_one_to_many_and_back(objective: str, team: Team, make_config: Any, tmp_path: Path) -> None:
    stations = [(1, "ddp", 48), (2, "fsdp", 96), (4, "ddp", 144), (1, "fsdp", None)]
    check_passing_on({"objective": objective, "vrpo": {"warmup": 0.2}}, stations, 192, team, make_config, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hybrid"])
@pytest.mark.parametrize(
    "align",
    [{"objective": "repa"}, {"objective": "irepa"}, {"objective": "vrpo"}, {"objective": "vrpo", "vrpo": SAMPLED}],
    ids=["repa", "irepa", "vrpo", "vrpo-sampled"],
)
def test_long_runs_pass_from_one_to_many_and_back(
    align: dict[str, Any], parallel: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    stations = [(1, parallel, 96), (2, parallel, 200), (4, parallel, 304), (1, parallel, 400), (4, parallel, None)]
    check_passing_on(align, stations, 544, team, make_config, tmp_path)


@pytest.mark.parametrize(("size", "parallel"), [(4, "ddp"), (2, "fsdp")])
def test_the_same_number_resumes_to_the_bit(
    size: int, parallel: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    config = make_config(align={"objective": "vrpo", "vrpo": {"warmup": 0.2}}, train={"parallel": parallel})
    values = config.model_dump(mode="json")
    team.run(size, team_module.train, values, tmp_path / "whole")
    stopped = team.run(size, team_module.train, values, tmp_path / "parts", False, 40)
    assert [status for status, *_ in stopped] == ["stopped"] * size
    team.run(size, team_module.train, values, tmp_path / "parts", True)
    whole, parts = (load_checkpoint(find_checkpoints(tmp_path / name)[0]) for name in ("whole", "parts"))
    for part in PARTS:
        assert whole.tensors[part].keys() == parts.tensors[part].keys()
        for name, value in whole.tensors[part].items():
            assert torch.equal(value, parts.tensors[part][name]), (part, name)


def test_share_of_a_step() -> None:
    part = share(64, 8, 2, World(rank=1, size=4))
    assert (part.start, part.stop, part.micro, part.passes) == (16, 32, 8, 2)
    assert share(64, 0, 1, World(rank=3, size=4)).micro == 16
    with pytest.raises(ConfigError, match="batch_size 62 does not divide among 4 processes: use 64"):
        share(62, 0, 1, World(size=4))
    with pytest.raises(ConfigError, match=r"micro_batch 6 does not divide the 16 images a step of each process .* 4"):
        share(64, 6, 1, World(size=4))


def test_a_refusal_is_one_sentence(team: Team, make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"batch_size": 9}).model_dump(mode="json")
    answers = team.run(2, team_module.train, config, tmp_path / "run")
    assert len({status for status, *_ in answers}) == 1
    assert "batch_size 9 does not divide among 2 processes" in answers[0][0]
    assert [silent for _, _, silent, _ in answers] == [False, True]


def test_a_process_that_does_not_answer_is_waited_for_so_long_and_no_longer(team: Team) -> None:
    (told, seconds), (silent, _) = team.run(2, team_module.wait_for_silence)
    assert told.startswith("ProcessError: process 0 of 2 has waited in vain for another one, which hangs (")
    assert seconds >= 1
    assert silent == "silent"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_recomputed_activations_leave_the_curve_as_it_is(
    parallel: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    for recompute in (False, True):
        config = make_config(
            model={"checkpoint_blocks": recompute},
            align={"objective": "vrpo", "vrpo": {"warmup": 0.2}},
            train={"images": 48, "parallel": parallel, "micro_batch": 2},
        )
        team.run(2, team_module.train, config.model_dump(mode="json"), tmp_path / str(recompute))
    assert_same_curve(tmp_path / "False", tmp_path / "True")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_meet_once_a_step_however_many_passes(
    parallel: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    sent = {}
    for micro in (4, 1):
        config = make_config(
            align={"objective": "repa"},
            train={"images": 40, "parallel": parallel, "micro_batch": micro, "log_every": 40},
        )
        values = config.model_dump(mode="json")
        sent[micro], _ = team.run(2, team_module.count_reductions, values, tmp_path / str(micro))
    # One for each bucket or sharded unit of the trunk, one for the objective, in every step.
    assert sent[4] == sent[1]
    assert len(set(sent[1])) == 1
    assert sent[1][0] >= 2
