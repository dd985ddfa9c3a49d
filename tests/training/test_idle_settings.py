"""Settings that do nothing are told when a run begins."""

from __future__ import annotations

from typing import Any

import pytest

from vrpo.alignment.scaffold import CHECK_TRIALS, looks_before_latest
from vrpo.config import RunConfig, ScaffoldConfig
from vrpo.processes import ALONE, World
from vrpo.training.setup import idle_settings
from vrpo.training.share import describe_share, share


def told(align: dict[str, Any], **train: Any) -> list[str]:
    config = RunConfig.model_validate({"align": align, "train": {"validate_every": 0, "evaluate_every": 0, **train}})
    return list(idle_settings(config))


@pytest.mark.parametrize(
    ("align", "words"),
    [
        ({"objective": "vrpo", "token": {"tau": 1.0}}, "align.token do nothing: there is no token"),
        ({"objective": "reg", "token": {"use": False, "pair": "time"}}, "align.token do nothing: there is no token"),
        ({"objective": "reg", "token": {"tau": 1.0}}, "weights are all one"),
        ({"objective": "repa", "scaffold": {"growth": 0.1}}, "align.scaffold do nothing: the block supplies itself"),
        ({"objective": "repi", "scaffold": {"supply": "none", "steps": 9}}, "align.scaffold do nothing"),
    ],
)
def test_a_setting_without_effect_is_told(align: dict[str, Any], words: str) -> None:
    (sentence,) = told(align)
    assert words in sentence


@pytest.mark.parametrize(
    ("align", "train"),
    [
        ({"objective": "vrpo"}, {}),
        ({"objective": "reg"}, {}),
        ({"objective": "reg", "token": {"use": False}}, {}),
        ({"objective": "reg", "token": {"tau": 1.0}}, {"noisings": 4}),
        ({"objective": "repi", "scaffold": {"steps": 9}}, {}),
        ({"objective": "vrpo", "scaffold": {"supply": "advantage"}}, {"images": 10_000_000}),
    ],
)
def test_settings_that_work_are_passed_over_in_silence(align: dict[str, Any], train: dict[str, Any]) -> None:
    assert told(align, **train) == []


def test_a_budget_too_small_for_the_scaffold_s_rule_is_told() -> None:
    scaffold = {"supply": "advantage", "time_bins": 10, "fraction": 0.0625, "latest": 0.5}
    (sentence,) = told({"objective": "vrpo", "scaffold": scaffold}, images=16_000)
    assert "ended by align.scaffold.latest and not by its rule: until then a time bin is looked at 1 times" in sentence


@pytest.mark.parametrize("budget", [16_000, 64_000, 1_000_000])
def test_looks_are_as_many_as_trials_and_time_allow(budget: int) -> None:
    config = ScaffoldConfig(time_bins=4, fraction=0.25, latest=0.5)
    trials = looks = 0.0
    for image in range(budget // 2):
        trials += config.fraction / config.time_bins
        if (image + 1) % (budget // 100) == 0 and trials >= CHECK_TRIALS:
            trials, looks = 0, looks + 1
    assert looks_before_latest(config, budget) == pytest.approx(looks, abs=1)


@pytest.mark.parametrize("train", [{"parallel": "fsdp"}, {"parallel": "hybrid", "shard_size": 3}, {"shard_size": 2}])
def test_sharding_that_one_process_cannot_do_is_told(train: dict[str, Any]) -> None:
    (sentence,) = told({"objective": "none"}, **train)
    assert "does nothing" in sentence


def test_sharding_by_several_is_passed_over_in_silence() -> None:
    config = RunConfig.model_validate(
        {"align": {"objective": "none"}, "train": {"parallel": "hybrid", "shard_size": 2}}
    )
    assert list(idle_settings(config, World(size=4))) == []


def test_the_passes_of_one_process_are_told() -> None:
    assert describe_share(share(64, 16, 1), ALONE) == "A step's 64 images are taken in 4 passes of 16."
