"""Several processes train as one does, refuse as one does, and pass a run on to more or fewer of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import team as team_module
from team import Team

from vrpo.errors import ConfigError
from vrpo.training.distributed import World, share
from vrpo.training.trainer import Trainer

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
    "align",
    [
        {"objective": "repa"},
        {"objective": "vrpo", "vrpo": {"warmup": 0.2}},
        {"objective": "vrpo", "depth": [1, 2], "vrpo": {"warmup": 0.2, **SAMPLED}},
        {"objective": "haste", "haste": {"stop": "fixed", "stop_images": 48}},
    ],
    ids=["repa", "vrpo", "vrpo-sampled", "haste-that-ends"],
)
def test_processes_train_as_one(align: dict[str, Any], team: Team, make_config: Any, tmp_path: Path) -> None:
    train = {"validate_every": 48, "sample_every": 48, "validation_images": 30}
    config = make_config(align=align, train=train)
    alone(config, tmp_path / "one")
    split = make_config(align=align, train={**train, "micro_batch": 2})
    for size in (2, 4) if align["objective"] == "repa" else (2,):
        folder = tmp_path / str(size)
        answers = team.run(size, team_module.train, split.model_dump(mode="json"), folder)
        assert [status for status, _, _ in answers] == ["finished"] * size
        assert all(not said for _, said, _ in answers[1:]), "only the first process speaks"
        assert any(f"divided among {size} processes: {8 // size} each" in sentence for sentence in answers[0][1])
        assert_same_curve(tmp_path / "one", folder)
        for name in ("denoising", "alignment"):
            found = [[record[name] for record in records(run, "validation")] for run in (tmp_path / "one", folder)]
            assert found[0] == pytest.approx(found[1], abs=1e-5)
        assert len(records(folder, "samples")) == 3


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
    assert len({status for status, _, _ in answers}) == 1
    assert "batch_size 9 does not divide among 2 processes" in answers[0][0]
    assert [silent for _, _, silent in answers] == [False, True]
