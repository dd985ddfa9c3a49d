"""Checkpoints that several processes write their shards of: under way when a run stops, on disk, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shards import limited_writes, slow_writes, synced_files
from team import Team

from vrpo.checkpoints import PARTS, find_checkpoints, read_state


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    workers = Team(2)
    yield workers
    workers.close()


def hidden(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
@pytest.mark.parametrize("why", ["steps that are not finite", "an error of one process that all raise"])
def test_a_checkpoint_under_way_is_finished_before_a_run_stops(
    why: str, parallel: str, team: Team, make_config: Any, tmp_path: Path
) -> None:
    train = {"images": 160, "checkpoint_every": 32, "stop_after_bad": 2, "log_every": 8, "parallel": parallel}
    values = make_config(train=train).model_dump(mode="json")
    answers = team.run(2, slow_writes, values, tmp_path / "run", why == "steps that are not finite")
    for sentence, writing in answers:
        assert "not finite" in sentence or "a file is gone" in sentence
        assert not writing, "the thread still writes when the processes part"
    assert not hidden(tmp_path / "run")
    (saved,) = find_checkpoints(tmp_path / "run")
    assert saved.name == "step-00000004"
    read_state(saved, verify=True)
    if "not finite" in answers[0][0]:
        assert "last good checkpoint is step-00000004" in answers[0][0]


def test_every_file_is_on_disk_before_it_has_its_name(team: Team, make_config: Any, tmp_path: Path) -> None:
    values = make_config(train={"images": 16, "parallel": "fsdp"}).model_dump(mode="json")
    synced, _ = team.run(2, synced_files, values, tmp_path / "run")
    (saved,) = find_checkpoints(tmp_path / "run")
    missing = [part for part in PARTS if (saved / f"{part}.safetensors").stat().st_ino not in synced]
    assert not missing


@pytest.mark.parametrize("rank", [0, 1])
def test_a_limit_of_the_system_in_one_process_is_told_by_all(
    rank: int, team: Team, make_config: Any, tmp_path: Path
) -> None:
    train = {"images": 64, "checkpoint_every": 32, "keep_checkpoints": 9, "parallel": "fsdp"}
    values = make_config(align={"objective": "repa"}, train=train).model_dump(mode="json")
    answers = team.run(2, limited_writes, values, tmp_path / "run", rank)
    for sentence in answers:
        assert sentence.startswith("CheckpointError: "), answers
        assert "could not be written" in sentence
    assert "file too large" in answers[0].lower()
    assert not hidden(tmp_path / "run")
    (saved,) = find_checkpoints(tmp_path / "run")
    assert saved.name == "step-00000004"
    read_state(saved, verify=True)
