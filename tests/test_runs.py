"""Reading run folders, also damaged and unfinished ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vrpo.errors import CheckpointError, DataError
from vrpo.runs import Run, flatten, open_checkpoint


def _folder(path: Path, records: list[dict[str, Any]] | None = None, tail: str = "") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "align": {"objective": "repa"}}))
    if records is not None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (path / "metrics.jsonl").write_text(text + tail)
    return path


def _train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "images": 64 * step, "seconds": 0.5 * step, **values}


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^no run at .*: give a folder made by vrpo train\.$"):
        Run(tmp_path)
    with pytest.raises(DataError, match="no run at"):
        Run(tmp_path / "absent")


@pytest.mark.parametrize("text", ["a: [1", "just words", "\x00"])
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml") as caught:
        _ = Run(tmp_path).config
    assert "\n" not in str(caught.value)


def test_a_run_with_nothing_but_its_configuration_reads_as_empty(tmp_path: Path) -> None:
    run = Run(_folder(tmp_path / "run"))
    assert (run.info, run.metrics("train"), run.evaluations, run.sample_grids) == ({}, [], [], [])
    assert (run.seed, run.objective, run.name) == (3, "repa", "run")


def test_facts_that_are_not_json_are_one_sentence(tmp_path: Path) -> None:
    run = Run(_folder(tmp_path / "run"))
    (run.path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is not a JSON object"):
        _ = run.info


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', '{"kind": "train"', "\xff", "7"])
def test_a_torn_last_line_is_passed_over_in_silence(tmp_path: Path, tail: str) -> None:
    run = Run(_folder(tmp_path / "run", [_train(1), _train(2)], tail))
    assert [record["step"] for record in run.metrics("train")] == [1, 2]
    assert run.damaged_lines == 0


def test_a_torn_line_in_the_middle_is_counted(tmp_path: Path) -> None:
    after = json.dumps(_train(3)) + "\n"
    run = Run(_folder(tmp_path / "run", [_train(1)], '{"kind": "tr{"kind": "train"}\n' + after))
    assert [record["step"] for record in run.metrics("train")] == [1, 3]
    assert run.damaged_lines == 1


@pytest.mark.parametrize("key", ["step", "images"])
@pytest.mark.parametrize("value", ["x", None, True, -1, float("nan"), 10**120, [3]])
def test_a_line_without_step_or_images_is_counted_as_damaged(tmp_path: Path, key: str, value: object) -> None:
    run = Run(_folder(tmp_path / "run", [_train(1), {**_train(2), key: value}, _train(3)]))
    assert [record["step"] for record in run.metrics("train")] == [1, 3]
    assert run.damaged_lines == 1


@pytest.mark.parametrize("facts", [{"data": "text"}, {"data": None}, {"encoders": 3}])
def test_facts_of_another_shape_are_one_sentence(tmp_path: Path, facts: dict[str, Any]) -> None:
    run = Run(_folder(tmp_path / "run"))
    (run.path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"run\.json is not a JSON object or was damaged"):
        _ = run.info


def test_steps_that_a_resumed_run_repeats_are_kept_once(tmp_path: Path) -> None:
    first = [_train(step, loss=1.0) for step in (10, 20, 30)]
    again = [_train(step, loss=2.0) for step in (20, 40)]
    run = Run(_folder(tmp_path / "run", [*first, *again]))
    assert [(r["step"], r["loss"]) for r in run.metrics("train")] == [(10, 1.0), (20, 2.0), (40, 2.0)]


def test_two_protocols_at_one_step_are_two_evaluations(tmp_path: Path) -> None:
    def scored(features: str, value: float) -> dict[str, Any]:
        protocol = {"features": features}
        return {**_train(5), "kind": "evaluation", "metrics": {"fd": value}, "protocol": protocol}

    run = Run(_folder(tmp_path / "run", [scored("a", 1.0), scored("b", 2.0), scored("a", 3.0)]))
    found = {r["protocol"]["features"]: r["metrics"]["fd"] for r in run.evaluations}
    assert found == {"a": 3.0, "b": 2.0}
    assert len(run.evaluations) == 2


def test_a_later_evaluation_takes_images_and_seconds_from_the_telemetry(tmp_path: Path) -> None:
    run = Run(_folder(tmp_path / "run", [_train(5), _train(7)]))
    (run.path / "evaluations").mkdir()
    (run.path / "evaluations" / "a.json").write_text(json.dumps({"step": 7, "metrics": {"fd": 2.0}}))
    (run.path / "evaluations" / "b.json").write_text("{")
    (record,) = run.evaluations
    assert (record["images"], record["seconds"]) == (448, 3.5)


def test_latest_checkpoint_is_the_newest_whatever_the_pointer_says(tmp_path: Path) -> None:
    run = Run(_folder(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"^no checkpoint in .*\.$"):
        run.latest_checkpoint()
    for step in (1000, 2000, 3000):
        folder = run.path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if step < 3000:  # the last one was torn: no state
            (folder / "state.json").write_text("{}")
    pointer = run.path / "checkpoints" / "latest"
    for stale in ("step-00001000\n", "step-00003000", "step-00009000"):
        pointer.write_text(stale)
        assert run.latest_checkpoint().name == "step-00002000"
        for path in (run.path, pointer, pointer.parent, run.path / "checkpoints" / "step-00002000"):
            found, checkpoint = open_checkpoint(path)
            assert (found.path, checkpoint.name) == (run.path, "step-00002000")
    assert open_checkpoint(run.path / "checkpoints" / "step-00001000")[1].name == "step-00001000"


def test_grids_without_a_file_are_left_out(tmp_path: Path) -> None:
    records = [
        {**_train(step), "kind": "samples", "file": f"samples/{step}.png", "rows": 2, "columns": 3} for step in (1, 2)
    ]
    run = Run(_folder(tmp_path / "run", records))
    (run.path / "samples").mkdir()
    (run.path / "samples" / "2.png").write_bytes(b"")
    (grid,) = run.sample_grids
    assert (grid.step, grid.images, grid.rows, grid.columns, grid.labels) == (2, 128, 2, 3, [])


def test_a_grid_of_no_sensible_layout_has_none(tmp_path: Path) -> None:
    strange = {"rows": "many", "columns": -3, "labels": 7, "file": "a" * 300 + ".png"}
    run = Run(_folder(tmp_path / "run", [{**_train(1), "kind": "samples", **strange}]))
    (run.path / "samples").mkdir()
    assert run.sample_grids == []
    (run.path / "metrics.jsonl").write_text(json.dumps({**_train(1), "kind": "samples", **strange, "file": "a.png"}))
    (run.path / "samples" / "a.png").write_bytes(b"")
    (grid,) = Run(run.path).sample_grids
    assert (grid.rows, grid.columns, grid.labels) == (0, 0, [])


def test_flatten_numbers_lists_of_mappings_only() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"f": 3}, {"f": 4}], "g": []}
    assert flatten(tree) == {"a.b": 1, "a.c": {}, "d": [1, 2], "e.0.f": 3, "e.1.f": 4, "g": []}


def test_reading_runs_needs_no_torch() -> None:
    code = "import sys, vrpo.runs, vrpo.report.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
