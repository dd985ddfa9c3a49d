"""The option that lets a GPU repeat itself, as far as a CPU can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import assert_same

from vrpo.errors import ConfigError
from vrpo.training.repeatable import WORKSPACE, repeatable
from vrpo.training.trainer import train


def test_the_option_changes_nothing_on_a_cpu_and_ends_with_the_run(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WORKSPACE:
        monkeypatch.setenv(name, ":16:8")
    for name, wanted in (("free", False), ("repeatable", True)):
        config = make_config(align={"objective": "vrpo"}, train={"images": 32, "deterministic": wanted})
        train(config, tmp_path / name, say=lambda sentence: None)
        assert json.loads((tmp_path / name / "run.json").read_text())["deterministic"] is wanted
        assert not torch.are_deterministic_algorithms_enabled()
    assert_same(tmp_path / "free", tmp_path / "repeatable")


def test_an_operation_without_a_repeatable_form_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORKSPACE:
        monkeypatch.setenv(name, ":16:8")
    words = r"train\.deterministic: \S+ has no deterministic form .*: leave the option"
    with pytest.raises(ConfigError, match=words), repeatable(True):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="mine"), repeatable(True):
        raise RuntimeError("mine")
