"""Faults of a run: non-finite steps, damaged and foreign checkpoints, a full disk, data that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASSES, pictures
from trained import assert_same, losses, records, run, weights

from vrpo.alignment.objective import Objective
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource
from vrpo.errors import CheckpointError, ConfigError, EvaluationError
from vrpo.processes import ALONE
from vrpo.training.folder import open_journal
from vrpo.training.trainer import Trainer
from vrpo.training.trouble import NonFiniteError


class Poison(Objective):
    """Adds a non-finite loss at chosen steps."""

    def __init__(self, when: Any) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def loss(self, predict_clean: Any) -> torch.Tensor:
        self.calls += 1
        return predict_clean().mean() * (float("nan") if self.when(self.calls) else 0.0)


def test_non_finite_steps_never_reach_the_weights(make_config: Any, tmp_path: Path) -> None:
    trainer = Trainer(make_config(), tmp_path / "run", say=lambda s: None)
    trainer.module.objective = Poison(lambda call: call in (2, 3, 7))
    trainer.train()
    assert all(
        torch.isfinite(value).all() for part in ("model", "ema") for value in weights(tmp_path / "run", part).values()
    )
    assert records(tmp_path / "run", "train")[-1]["skipped"] == 3


def test_a_loss_with_a_term_that_is_not_finite_is_null(make_config: Any, tmp_path: Path) -> None:
    trainer = Trainer(make_config(train={"images": 32}), tmp_path / "run", say=lambda s: None)
    trainer.module.objective = Poison(lambda call: call == 1)
    trainer.train()
    first, second = records(tmp_path / "run", "train")
    assert (first["alignment_loss"], first["loss"]) == (None, None)
    assert first["denoising"] is not None
    assert second["loss"] == second["denoising"] + second["alignment_loss"]


def test_tokens_that_are_not_finite_stay_out_of_the_prototypes(make_config: Any, tmp_path: Path) -> None:
    for name, bad in (("whole", False), ("bad", True)):
        trainer = Trainer(make_config(align={"objective": "repa"}), tmp_path / name, say=lambda s: None)
        given = trainer.parts.targets.of_batch

        def spoiled(*arguments: Any, given: Any = given, trainer: Any = trainer) -> Any:
            targets = given(*arguments)
            if trainer.step == 3:
                targets.tokens[0][1, 0] = torch.nan
            return targets

        if bad:
            trainer.parts.targets.of_batch = spoiled  # type: ignore[method-assign]
        trainer.train()
    kept, whole = (weights(tmp_path / name, "objective") for name in ("bad", "whole"))
    assert kept["prototypes.counts"].sum() == whole["prototypes.counts"].sum() - 1
    assert torch.isfinite(kept["prototypes.mean.0"]).all()


def test_a_held_out_loss_that_is_not_finite_is_null(make_config: Any, tmp_path: Path) -> None:
    config = make_config(align={"objective": "repa"}, train={"validate_every": 16, "validation_images": 30})
    trainer = Trainer(config, tmp_path / "run", say=lambda s: None)
    with torch.no_grad():
        for network in (trainer.ema.network, trainer.parts.trunk):
            next(network.parameters()).fill_(torch.nan)
    ((kind, work),) = trainer.observer.due(open_journal(tmp_path / "run", 0, ALONE, print), 0, lambda every: True, True)
    record = work()
    assert (kind, record) == ("validation", {"denoising": None, "alignment": None, "held_out_images": 30})


def test_endless_non_finite_steps_stop_the_run_with_a_sentence(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"images": 800, "stop_after_bad": 4})
    trainer = Trainer(config, tmp_path / "run", say=lambda s: None)
    before = {name: value.clone() for name, value in trainer.parts.trunk.state_dict().items()}
    trainer.module.objective = Poison(lambda call: True)
    with pytest.raises(NonFiniteError, match=r"not finite in the last \d+ steps"):
        trainer.train()
    for name, value in trainer.parts.trunk.state_dict().items():
        assert torch.equal(before[name], value)


def test_fp16_scale_recovers_from_overflow(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"precision": "fp16", "images": 320, "stop_after_bad": 40})
    trainer = Trainer(config, tmp_path / "run", say=lambda s: None)
    trainer.optimizer.scale.fill_(2.0**40)
    trainer.train()
    skipped = records(tmp_path / "run", "train")[-1]["skipped"]
    assert 0 < skipped < 36
    assert trainer.optimizer.scale.item() == 2.0 ** (40 - skipped)
    assert losses(tmp_path / "run")[-1] is not None


def test_existing_run_is_not_overwritten(make_config: Any, tmp_path: Path) -> None:
    run(make_config(), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        Trainer(make_config(), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        Trainer(make_config(), tmp_path / "other")


def test_resume_accepts_weights_that_were_moved(make_config: Any, tmp_path: Path) -> None:
    for place in ("here", "there"):
        weights = {"weights": f"/{place}/weights.safetensors"}
        further = [{"name": "vit", **weights}, {"name": "resnet10t", **weights}]
        config = make_config(encoder=weights, more_encoders=further, train={"images": 8})
        run(config, tmp_path / "run", resume=place == "there")


def test_resume_refuses_what_would_change_the_result(make_config: Any, tmp_path: Path) -> None:
    run(make_config(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"would change train.lr from 0.001 to 0.002"):
        Trainer(make_config(train={"lr": 2e-3}), tmp_path / "run", resume=True)
    longer = make_config(train={"images": 120})
    assert run(longer, tmp_path / "run", resume=True).images == 120


def test_damaged_checkpoint_is_passed_over(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"checkpoint_every": 32})
    run(config, tmp_path / "run")
    run(config, tmp_path / "whole")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    damaged = bytearray((newest / "model.safetensors").read_bytes())
    damaged[-5] ^= 1
    (newest / "model.safetensors").write_bytes(damaged)
    said: list[str] = []
    Trainer(config, tmp_path / "run", resume=True, say=said.append).train()
    assert any("does not match its hash" in sentence for sentence in said)
    assert_same(tmp_path / "run", tmp_path / "whole")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert f"damaged-{newest.name}" in names
    assert any(sentence.endswith(f"it was set aside as damaged-{newest.name}.") for sentence in said)


def test_the_pointer_names_a_checkpoint_that_is_there(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"checkpoint_every": 32, "keep_checkpoints": 9})
    run(config, tmp_path / "run")
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    (pointer.parent / "step-00000012" / "ema.safetensors").write_bytes(b"")
    Trainer(config, tmp_path / "run", resume=True, say=lambda s: None)
    assert pointer.read_text() == "step-00000008"
    Trainer(config, tmp_path / "run", resume=True, rewind=40, say=lambda s: None)
    assert pointer.read_text() == "step-00000004"


def test_no_whole_checkpoint_is_a_sentence_that_says_what_to_do(make_config: Any, tmp_path: Path) -> None:
    run(make_config(), tmp_path / "run")
    for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"can be used \(the newest: .*state.json .*\): put back a copy"):
        Trainer(make_config(), tmp_path / "run", resume=True, say=lambda s: None)


def test_good_checkpoints_outlive_damaged_ones(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"checkpoint_every": 32, "keep_checkpoints": 2})
    run(config, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    (newest / "ema.safetensors").write_bytes(b"")
    assert run(config, tmp_path / "run", resume=True).status == "finished"
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [older.name, newest.name]
    assert Trainer(config, tmp_path / "run", resume=True, say=lambda s: None).step == 12


def test_failing_evaluation_does_not_cost_what_was_trained(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        train={"evaluate_every": 32},
        evaluate={"features": "resnet10t", "weights": "random", "input_size": 32, "samples": 6},
    )
    trainer = Trainer(config, tmp_path / "run", say=lambda s: None)

    def fail() -> dict[str, Any]:
        raise EvaluationError("the features are not finite.")

    trainer.observer.scorer = fail
    with pytest.raises(EvaluationError):
        trainer.train()
    monkeypatch.undo()
    run(config, tmp_path / "run", resume=True)
    run(make_config(), tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_means_of_a_failed_start_are_not_reused(make_config: Any, tmp_path: Path) -> None:
    first = make_config(align={"objective": "repa"}, encoder={"center": True})
    Trainer(first, tmp_path / "run", say=lambda s: None)
    other = make_config(align={"objective": "repa"}, encoder={"center": True, "feature": 0, "input_size": 8})
    again = Trainer(other, tmp_path / "run", say=lambda s: None)
    fresh = Trainer(other, tmp_path / "fresh", say=lambda s: None)
    assert torch.equal(again.parts.targets.means[0], fresh.parts.targets.means[0])  # type: ignore[arg-type]


def test_full_disk_keeps_the_last_checkpoint(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from vrpo.training import checkpoint as checkpoint_module

    config = make_config(train={"checkpoint_every": 32})
    original = checkpoint_module.save_tensors
    calls = 0

    def save(path: Path, tensors: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:  # in the middle of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, tensors)

    monkeypatch.setattr(checkpoint_module, "save_tensors", save)
    with pytest.raises(CheckpointError, match="no space is left on the device"):
        run(config, tmp_path / "run")
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004"]
    run(config, tmp_path / "run", resume=True)
    run(config, tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_checkpoint_of_another_architecture(make_config: Any, tmp_path: Path) -> None:
    from vrpo.files import load_into
    from vrpo.models.transformer import build_transformer

    run(make_config(), tmp_path / "run")
    other = build_transformer("SiT-Ti/4", input_size=16, in_channels=3, num_classes=3)
    with pytest.raises(CheckpointError, match=r"another architecture than this .*: '.*' is \(.*\) and should be \("):
        load_into(other, weights(tmp_path / "run"), "the file")


def test_unlabelled_data_with_a_conditional_configuration(make_config: Any, tmp_path: Path) -> None:
    images, _ = pictures(12, 0)
    prepare(ArraySource(images, None, (), "flat"), tmp_path / "flat", size=16, workers=1, progress=False)
    over = {"data": {"path": str(tmp_path / "flat"), "validation": None}}
    with pytest.raises(ConfigError, match=r"has no labels, and data.conditional is true: .*--data.conditional False"):
        Trainer(make_config(**over), tmp_path / "run")
    over["data"]["conditional"] = False  # type: ignore[assignment]
    assert run(make_config(**over), tmp_path / "run").status == "finished"


def test_held_out_data_of_another_size_is_refused(make_config: Any, tmp_path: Path) -> None:
    images, labels = pictures(12, 0)
    prepare(ArraySource(images, labels, CLASSES, "large"), tmp_path / "large", size=32, workers=1, progress=False)
    with pytest.raises(Exception, match="are 32 px and the training images 16 px"):
        Trainer(make_config(data={"validation": str(tmp_path / "large")}), tmp_path / "run")


def test_image_size_that_the_patch_does_not_divide(make_config: Any, tmp_path: Path) -> None:
    images, labels = pictures(12, 0)
    prepare(ArraySource(images, labels, CLASSES, "odd"), tmp_path / "odd", size=18, workers=1, progress=False)
    over = {"path": str(tmp_path / "odd"), "validation": None}
    with pytest.raises(ConfigError, match=r"18 x 18 cannot be cut into patches of 4: use a size such as 16"):
        Trainer(make_config(data=over), tmp_path / "run")
