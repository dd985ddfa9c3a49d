"""Steps that are not finite: skipped, told with their term and samples, and gone back before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from team import Team, train_spoiled

from vrpo.alignment.objective import Objective
from vrpo.checkpoints import read_state
from vrpo.data.loader import BatchOrder
from vrpo.errors import CheckpointError
from vrpo.training import rewind as rewind_module
from vrpo.training.rewind import Rewind, passed_at, read_rewinds
from vrpo.training.step import StepOutput
from vrpo.training.trainer import Trainer
from vrpo.training.trouble import NonFiniteError, Watch

STEPS = {"train": {"images": 160, "checkpoint_every": 16, "keep_checkpoints": 20, "stop_after_bad": 3, "log_every": 8}}


def trainer(config: Any, folder: Path, **options: Any) -> Trainer:
    return Trainer(config, folder, say=lambda sentence: None, **options)


def states(folder: Path) -> dict[int, dict[str, Any]]:
    found = [read_state(path) for path in sorted((folder / "checkpoints").glob("step-*"))]
    return {state["step"]: state for state in found}


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").glob("step-*")) / "model.safetensors")


def spoil(run: Trainer, steps: range, row: int | None, always: bool = False) -> list[str]:
    """Make the denoising loss of one image (or the gradient alone) infinite at these steps; return the image's key.

    It stays finite once the run was rewound, unless ``always``.
    """
    original = run._train_step
    key = "" if row is None else run.parts.dataset.key(int(run.loader.indices(steps[0])[row]))
    loss = run.parts.denoising.loss

    def step(batch: Any) -> None:
        bad = run.step in steps and (always or run.counters.passed == 0)

        def spoiled(output: torch.Tensor, *rest: Any) -> torch.Tensor:
            values = loss(output, *rest)
            if not bad:
                return values
            if row is None:  # finite, with an infinite slope
                return values + (values - values.detach()).clamp(min=0).sqrt()
            return values + torch.where(torch.arange(len(values)) == row, torch.inf, 0.0)

        run.parts.denoising.loss = spoiled  # type: ignore[method-assign]
        original(batch)

    run._train_step = step  # type: ignore[method-assign]
    return [key]


def test_the_sentence_names_term_sample_step_and_checkpoint(make_config: Any, tmp_path: Path) -> None:
    run = trainer(make_config(**STEPS), tmp_path / "run")
    (key,) = spoil(run, range(7, 20), row=5)
    with pytest.raises(NonFiniteError) as caught:
        run.train()
    sentence = str(caught.value)
    assert "the denoising loss was not finite in the last 3 steps, first in step 8 on" in sentence
    assert f"on '{key}';" in sentence
    assert "last good checkpoint is step-00000006" in sentence
    assert "--resume --rewind 56" in sentence


def test_a_span_is_told_from_its_first_step_however_rarely_records_come(make_config: Any, tmp_path: Path) -> None:
    rarely = {"train": STEPS["train"] | {"log_every": 64}}
    run = trainer(make_config(**rarely), tmp_path / "run")
    (key,) = spoil(run, range(7, 20), row=5)
    with pytest.raises(NonFiniteError) as caught:
        run.train()
    sentence = str(caught.value)
    assert f"the denoising loss was not finite in the last 9 steps, first in step 8 on '{key}';" in sentence
    assert "last good checkpoint is step-00000006" in sentence
    assert "--resume --rewind 56" in sentence


def test_a_span_that_began_before_a_resume_is_told_as_such(make_config: Any, tmp_path: Path) -> None:
    rarely = {"train": STEPS["train"] | {"log_every": 64}}
    config = make_config(**rarely)
    run = trainer(config.model_copy(update={"train": config.train.model_copy(update={"images": 72})}), tmp_path / "run")
    spoil(run, range(7, 20), row=5)
    run.train()
    again = trainer(config, tmp_path / "run", resume=True)
    spoil(again, range(7, 20), row=5)
    with pytest.raises(NonFiniteError) as caught:
        again.train()
    sentence = str(caught.value)
    assert "last 9 steps, first in step 8 before the run was resumed (on which samples is not known);" in sentence
    assert "last good checkpoint is step-00000006" in sentence
    assert "--resume --rewind 56" in sentence


def test_a_rewind_that_did_not_help_is_not_advised_again(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**STEPS)
    run = trainer(config, tmp_path / "run")
    spoil(run, range(7, 20), row=5)
    with pytest.raises(NonFiniteError, match=r"--resume --rewind 56, or start again with a lower train\.lr"):
        run.train()
    again = trainer(config, tmp_path / "run", resume=True, rewind=56)
    spoil(again, range(7, 20), row=5, always=True)
    with pytest.raises(NonFiniteError) as caught:
        again.train()
    sentence = str(caught.value)
    assert sentence.endswith(
        "a rewind to 56 images, past other data, did not help: start again with a lower train.lr or "
        "--train.precision fp32."
    )
    said: list[str] = []
    Trainer(config, tmp_path / "run", resume=True, rewind=56, say=said.append)
    assert "was rewound to 56 images already: going on from there; another number goes back again." in said[0]


def test_the_good_checkpoints_outlive_a_long_span(make_config: Any, tmp_path: Path) -> None:
    often = {"checkpoint_every": 8, "keep_checkpoints": 2, "log_every": 160}
    config = make_config(train=STEPS["train"] | often)
    run = trainer(config, tmp_path / "run")
    spoil(run, range(7, 20), row=5)
    with pytest.raises(NonFiniteError, match=r"the last good checkpoint is step-00000007; .* --resume --rewind 56"):
        run.train()
    assert list(states(tmp_path / "run"))[:2] == [6, 7]
    assert trainer(config, tmp_path / "run", resume=True, rewind=56).step == 7


def test_a_checkpoint_that_was_due_in_a_span_is_made_after_it(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train=STEPS["train"] | {"images": 120, "checkpoint_every": 40, "log_every": 120})
    run = trainer(config, tmp_path / "run")
    spoil(run, range(4, 7), row=5)
    run.train()
    assert list(states(tmp_path / "run")) == [8, 10, 15]


def test_a_stop_in_a_span_keeps_where_it_was_and_the_good_ones(make_config: Any, tmp_path: Path) -> None:
    config = make_config(
        train=STEPS["train"] | {"checkpoint_every": 8, "keep_checkpoints": 1, "log_every": 160, "stop_after_bad": 9}
    )
    half = config.model_copy(update={"train": config.train.model_copy(update={"images": 72})})
    run = trainer(half, tmp_path / "run")
    spoil(run, range(6, 20), row=5)
    run.train()
    assert list(states(tmp_path / "run")) == [6, 9]


def test_the_terms_of_a_loss_are_told_apart() -> None:
    outputs = {
        "denoising loss": StepOutput(torch.ones(()), torch.tensor([1.0, torch.inf]), None, torch.ones(2)),
        "alignment loss": StepOutput(torch.ones(()), torch.ones(2), torch.tensor(torch.nan), torch.ones(2)),
        "token loss": StepOutput(torch.ones(()), torch.ones(2), torch.ones(()), torch.ones(2), torch.tensor(torch.inf)),
    }
    for name, output in outputs.items():
        watch = Watch()
        watch.add(output)
        watch.end(0, torch.tensor(1))
        assert watch.diagnose(1, 1).terms == (name,)


def test_a_gradient_is_told_from_a_loss(make_config: Any, tmp_path: Path) -> None:
    run = trainer(make_config(**STEPS), tmp_path / "run")
    spoil(run, range(20), row=None)
    with pytest.raises(
        NonFiniteError, match=r"the gradient \(every loss was finite\) was .* on the batch of '.*; start"
    ):
        run.train()


def test_a_loss_that_is_not_finite_skips_the_step_whatever_its_gradient(make_config: Any, tmp_path: Path) -> None:
    class Constant(Objective):
        def loss(self, predict_clean: Any) -> torch.Tensor:
            return torch.tensor(float("inf"))

    config = make_config(train={"images": 16, "log_every": 8})
    run = trainer(config, tmp_path / "run")
    before = {name: value.clone() for name, value in run.parts.trunk.state_dict().items()}
    run.module.objective = Constant()
    run.train()
    assert all(torch.equal(value, before[name]) for name, value in final(tmp_path / "run").items())
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [record["skipped"] for record in records] == [1, 2]


def test_rewind_passes_over_the_data_and_repeats_to_the_bit(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**STEPS)
    read: dict[str, list[list[int]]] = {}
    for name in ("one", "two"):
        folder = tmp_path / name
        run = trainer(config, folder)
        spoil(run, range(7, 20), row=5)
        with pytest.raises(NonFiniteError):
            run.train()
        again = trainer(config, folder, resume=True, rewind=56)
        assert (again.step, again.counters.passed) == (6, 4)
        read[name] = []
        original = again._train_step

        def note(batch: Any, name: str = name, original: Any = original) -> None:
            read[name].append(batch.indices.tolist())
            original(batch)

        again._train_step = note  # type: ignore[method-assign]
        assert again.train().status == "finished"
    order = BatchOrder(90, 8, config.seed)
    assert read["one"] == read["two"] == [order.indices(step).tolist() for step in range(10, 24)]
    for name, value in final(tmp_path / "one").items():
        assert torch.equal(value, final(tmp_path / "two")[name])


def test_a_rewound_run_resumes_as_if_uninterrupted(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**STEPS)
    for name in ("whole", "stopped"):
        trainer(config, tmp_path / name).train()
    trainer(config, tmp_path / "whole", resume=True, rewind=50).train()
    half = config.model_copy(update={"train": config.train.model_copy(update={"images": 88})})
    trainer(half, tmp_path / "stopped", resume=True, rewind=50).train()
    # A launcher repeats the command as it was.
    resumed = trainer(config, tmp_path / "stopped", resume=True, rewind=50)
    assert (resumed.step, resumed.counters.passed) == (11, 14)
    resumed.train()
    for name, value in final(tmp_path / "whole").items():
        assert torch.equal(value, final(tmp_path / "stopped")[name])
    assert {step: state["passed"] for step, state in states(tmp_path / "whole").items()} == {
        **dict.fromkeys((2, 4, 6), 0),
        **dict.fromkeys((8, 10, 12, 14, 16, 18, 20), 14),
    }


def test_a_crash_after_the_decision_goes_on_with_it(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vrpo.training import state as state_module

    config = make_config(**STEPS)
    trainer(config, tmp_path / "run").train()

    def crash(run: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state_module, "set_aside_rewound", crash)
    with pytest.raises(KeyboardInterrupt):
        trainer(config, tmp_path / "run", resume=True, rewind=50)
    monkeypatch.undo()
    assert trainer(config, tmp_path / "run", resume=True).step == 6
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    assert kept[0] == "rewound-step-00000008"
    assert kept[-1] == "step-00000006"


def test_a_rewind_that_cannot_be_is_one_sentence(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"images": 32, "checkpoint_every": 16})
    with pytest.raises(CheckpointError, match="no checkpoint of at most 8 images"):
        trainer(config, tmp_path / "run", resume=True, rewind=8)
    trainer(config, tmp_path / "other").train()
    with pytest.raises(CheckpointError, match=r"at most 8 images \(the oldest is of 16\)"):
        trainer(config, tmp_path / "other", resume=True, rewind=8)
    with pytest.raises(CheckpointError, match="nothing to rewind"):
        trainer(config, tmp_path / "other", resume=True, rewind=32)
    (tmp_path / "other" / rewind_module.FILE).write_text('{"rewinds": []}')
    with pytest.raises(CheckpointError, match=r"rewinds.json is damaged \(it has no seal\)"):
        trainer(config, tmp_path / "other", resume=True)


def test_a_rewind_passes_over_damaged_checkpoints(make_config: Any, tmp_path: Path) -> None:
    config, folder = make_config(**STEPS), tmp_path / "run"
    trainer(config, folder).train()
    saved = folder / "checkpoints"
    for file in (saved / "step-00000020" / "state.json", saved / "step-00000006" / "ema.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    said: list[str] = []
    again = Trainer(config, folder, resume=True, rewind=56, say=said.append)
    assert (again.step, again.counters.passed) == (4, 16)
    assert "step-00000006/ema.safetensors" in said[0]
    assert "Rewound" in said[0]
    assert "step-00000020/state.json" in said[1]
    assert again.train().status == "finished"
    assert sorted(path.name for path in saved.glob("step-*"))[1:3] == ["step-00000004", "step-00000006"]
    for path in saved.glob("step-0000000[24]/ema.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint to rewind to can be used; the newest: .*step-00000004"):
        trainer(config, folder, resume=True, rewind=40)


def test_what_was_passed_over_adds_up() -> None:
    rewinds = [Rewind(48, 6, 4), Rewind(96, 12, 9)]
    assert [passed_at(rewinds, step) for step in (0, 5, 6, 11, 12, 99)] == [0, 0, 4, 4, 9, 9]
    assert read_rewinds(Path("nowhere")) == []


def test_processes_skip_together_and_one_tells_the_other_s_sample(make_config: Any, tmp_path: Path) -> None:
    team = Team(2)
    values = make_config(**STEPS).model_dump(mode="json")
    first, second = team.run(2, train_spoiled, values, tmp_path / "run")
    team.close()
    assert first[0] == second[0]
    assert f"on '{second[2]}'" in first[0]
    assert "the denoising loss was not finite in the last 3 steps, first in step 1" in first[0]
    assert (first[1], second[1]) == (False, True)
    assert first[3], "a step changed the weights of the first process"
    assert second[3], "a step changed the weights of the second process"
