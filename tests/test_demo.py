"""The demo's own parts: the embedded digits, the split, and what it refuses. CI runs the demo itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrpo.config_load import load_preset, to_yaml, validate
from vrpo.demo import HELD_OUT, digits, plan_budget, run_demo, split, time_to_train
from vrpo.errors import ConfigError, DataError


def test_digits_are_the_published_set() -> None:
    source = digits()
    assert len(source.entries) == 1797
    assert source.class_names == tuple("0123456789")
    labels = [entry.label for entry in source.entries]
    assert labels[:10] == list(range(10))
    with source.open(source.entries[0]) as stream:
        pixels = np.asarray(Image.open(stream).convert("L"))
    assert pixels.shape == (8, 8)
    assert pixels[3, 3] < 40 < 200 < pixels[1, 3], "a nought is dark inside and bright on its ring"


def test_split_is_a_partition_that_keeps_to_the_keys() -> None:
    source = digits()
    training, held_out = split(source, HELD_OUT)
    keys = [{entry.key for entry in part.entries} for part in (training, held_out)]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == {entry.key for entry in source.entries}
    # Four standard deviations of a binomial around one in eight.
    assert abs(len(keys[1]) - 1797 / 8) < 4 * (1797 * 1 / 8 * 7 / 8) ** 0.5
    assert [entry.key for entry in split(source, HELD_OUT)[1].entries] == [entry.key for entry in held_out.entries]


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for index in range(4):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "flat" / f"{index}.png")
    with pytest.raises(DataError, match="have no labels, and the demo fits its encoder to labels"):
        run_demo(tmp_path / "out", source=tmp_path / "flat", objectives=("none",))


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'repa'"):
        run_demo(tmp_path / "out", objectives=("repaa",))
    with pytest.raises(ConfigError, match="--minutes 0 is no time at all"):
        run_demo(tmp_path / "out", minutes=0)
    with pytest.raises(ConfigError, match="--size 30 is not a multiple of 16: use 32"):
        run_demo(tmp_path / "out", size=30)


@pytest.mark.parametrize("data", ["elsewhere/photos", None])
def test_a_run_that_no_demo_made_is_kept(tmp_path: Path, data: str | None) -> None:
    run = tmp_path / "runs" / "repa"
    (run / "checkpoints").mkdir(parents=True)
    if data is not None:
        config = validate({"data": {"path": str(tmp_path / data)}, "align": {"objective": "repa"}}, "the test")
        (run / "config.yaml").write_text(to_yaml(config))
    (run / "checkpoints" / "weights").write_bytes(b"days of training")
    with pytest.raises(ConfigError, match=r"repa holds something that no demo .* made: choose another --out\.$"):
        run_demo(tmp_path, minutes=0.01)
    assert (run / "checkpoints" / "weights").read_bytes() == b"days of training"
    assert [child.name for child in tmp_path.iterdir()] == ["runs"], "no work was done"


def test_a_report_that_no_demo_made_is_kept(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("a comparison of other runs")
    with pytest.raises(ConfigError, match="is no report of a demo in"):
        run_demo(tmp_path, minutes=0.01)
    assert (tmp_path / "report.html").read_text() == "a comparison of other runs"


def test_a_demo_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "data" / "training-16px").mkdir(parents=True)
    (tmp_path / "report.html").write_text("of the first time")
    run = tmp_path / "runs" / "none"
    run.mkdir(parents=True)
    config = validate({"data": {"path": str(tmp_path / "data" / "training-16px")}}, "the test")
    (run / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "runs" / "repa").mkdir()  # begun, and killed before anything was written
    with pytest.raises(ConfigError, match="--size 30 is not a multiple"):  # the next thing that is refused
        run_demo(tmp_path, size=30)


def test_budget_fits_the_time_in_whole_visits() -> None:
    base = validate(load_preset("demo"), "demo")
    images, visits = plan_budget(base, speed=2000.0, seconds=70.0)
    assert visits == 4
    assert images % (4 * base.train.batch_size) == 0
    # 70 s, less 3 to start and 4 visits of 1.5 s and 360 guided samples of 20 steps at 6,000 passes a second.
    assert images == pytest.approx(2000 * (70 - 3 - 4 * (1.5 + 360 * 20 * 2 / 6000)), abs=4 * base.train.batch_size)
    longer, _ = plan_budget(base, speed=2000.0, seconds=140.0)
    assert longer - images == pytest.approx(2000 * 70, abs=4 * base.train.batch_size)
    assert plan_budget(base, speed=100.0, seconds=1.0) == (base.train.batch_size, 1)


def test_a_slow_beginning_leaves_half_the_time_for_training() -> None:
    assert time_to_train(4.5, spent=30.0) == 240.0
    assert time_to_train(4.5, spent=400.0) == 135.0
