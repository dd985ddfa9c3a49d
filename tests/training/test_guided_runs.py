"""Runs keep class prototypes, and are sampled with several candidates or refuse to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vrpo.alignment.projector import unit
from vrpo.alignment.prototypes import Prototypes
from vrpo.cli import main
from vrpo.data.shards import ShardedDataset
from vrpo.training.trainer import Trainer


@pytest.fixture
def guided_run(make_config: Any, tmp_path: Path) -> Path:
    """A tiny run aligned with an encoder, and its trainer's prototypes."""
    Trainer(make_config(align={"objective": "repa"}), tmp_path / "run", say=lambda sentence: None).train()
    return tmp_path / "run"


def objective_file(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text() / "objective.safetensors"


def exit_code(words: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert exit_code(words) == 2
    return capsys.readouterr().err


def test_prototypes_of_a_run_are_the_pooled_tokens_of_its_classes(make_config: Any, tmp_path: Path) -> None:
    config = make_config(align={"objective": "irepa"}, data={"flip": False}, train={"images": 180, "batch_size": 90})
    trainer = Trainer(config, tmp_path / "run", say=lambda sentence: None)
    trainer.train()
    pixels, labels = ShardedDataset(config.data.path).read(np.arange(90))
    tokens = trainer.parts.objective.prepare_target(trainer.parts.targets.online(pixels).tokens[0])
    assert (tokens - unit(trainer.parts.targets.online(pixels).tokens[0])).abs().max() > 0.05  # iREPA's own targets
    stored = load_file(objective_file(tmp_path / "run"))
    assert stored["prototypes.counts"].sum() == 64  # the first 32 of each batch
    for label, prototype in enumerate(stored["prototypes.mean.0"]):
        expected = tokens[labels == label].mean((0, 1))
        assert torch.cosine_similarity(prototype, expected, dim=0) > 0.98


def test_candidates_are_drawn_and_recorded(guided_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["sample", str(guided_run), "--count", "6", "--steps", "4", "--device", "cpu", "--seed", "3"]
    several = [*words, "--candidates", "4", "--select-at", "0.6"]
    for name, given in {"plain": words, "best": several, "drawn": [*several, "--select", "resample"]}.items():
        assert exit_code([*given, "--out", str(out / f"{name}.npz")]) == 0
    plain, best, drawn = (np.load(out / f"{name}.npz") for name in ("plain", "best", "drawn"))
    assert (plain["arr_1"] == best["arr_1"]).all()
    kept = (plain["arr_0"] == best["arr_0"]).all((1, 2, 3))
    assert not kept.all()
    assert (drawn["arr_0"] != best["arr_0"]).any()


def test_what_cannot_choose_is_refused_in_a_sentence(
    guided_run: Path, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(run: Path, *words: str) -> str:
        return refusal(["sample", str(run), "--out", str(tmp_path / "x.png"), "--device", "cpu", *words], capsys)

    assert "no projector: use --candidates 1, or a run with repa" in sample(
        trained(make_config(), tmp_path / "none"), "--candidates", "2"
    )
    unconditional = make_config(align={"objective": "repa"}, data={"conditional": False})
    assert "has no classes: use --candidates 1" in sample(trained(unconditional, tmp_path / "u"), "--candidates", "2")
    assert "--select-at is about several candidates" in sample(guided_run, "--select-at", "0.5")
    assert "--select-at" in sample(guided_run, "--candidates", "2", "--select-at", "1.0")
    assert "--select-at" in sample(guided_run, "--candidates", "2", "--select-at", "0")
    assert "--candidates" in sample(guided_run, "--candidates", "0")
    tensors = {name: value for name, value in load_file(objective_file(guided_run)).items() if "prototypes" not in name}
    save_file(tensors, objective_file(guided_run))
    assert "holds no class prototypes" in sample(guided_run, "--candidates", "2")
    assert not (tmp_path / "x.png").exists()


def trained(config: Any, folder: Path) -> Path:
    Trainer(config, folder, say=lambda sentence: None).train()
    return folder


def test_a_checkpoint_without_prototypes_is_resumed(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Prototypes, "state", lambda self: {})
        run = trained(make_config(align={"objective": "repa"}), tmp_path / "run")
    assert not any("prototypes" in name for name in load_file(objective_file(run)))
    config = make_config(align={"objective": "repa"}, train={"images": 128})
    Trainer(config, run, resume=True, say=lambda sentence: None).train()
    assert load_file(objective_file(run))["prototypes.counts"].sum() == 32
