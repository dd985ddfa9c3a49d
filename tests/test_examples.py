"""The examples run as they are, briefly, and do what they show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrpo.alignment import Aligner
from vrpo.alignment.rewards import _REGISTRY
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _own_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("signs", "distinct"):
        monkeypatch.delitem(_REGISTRY, name, raising=False)


def numbers(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, list[float]]:
    """Run an example with command-line ``words`` and return what it prints, by name."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    found: dict[str, list[float]] = {}
    for key, value in re.findall(r"(\w+) +(-?[\d.]+)(?=\s)", capsys.readouterr().out):
        found.setdefault(key, []).append(float(value))
    return found


@pytest.mark.parametrize(("name", "steps"), [("plain_loop.py", 60), ("diffusers_transformer.py", 30)])
def test_loops_learn_and_align(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = numbers(name, ["--steps", str(steps)], monkeypatch, capsys)
    assert len(printed["step"]) == 10
    assert printed["denoising"][-1] < 0.9 * printed["denoising"][0]
    assert printed["alignment"][-1] > printed["alignment"][0] + 0.2


def test_custom_rewards_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = numbers("custom_reward.py", ["--images", "1280", "--out", str(tmp_path)], monkeypatch, capsys)
    assert len(printed["images"]) == 8
    assert all(0 <= value <= 1 for value in printed["signs"])
    assert printed["signs"][-1] > printed["signs"][0]
    assert (tmp_path / "run" / "checkpoints").is_dir()


class Constant:
    """An encoder that gives every patch one token, which a model can learn without knowing where it is."""

    width = 24

    def tokens(self, images: Tensor) -> Tensor:
        token = torch.randn(self.width, generator=torch.Generator().manual_seed(0))
        return token.expand(len(images), 16, -1)


@pytest.mark.parametrize(("name", "mode"), [("signs", "sampled"), ("distinct", "sampled"), ("distinct", "analytic")])
def test_a_custom_reward_alone_teaches(name: str, mode: str) -> None:
    runpy.run_path(str(EXAMPLES / "custom_reward.py"), run_name="example")
    off = dict.fromkeys(("semantic", "relational", "fidelity", "perceptual", "warmup", "trust"), 0.0)
    # An old policy that keeps up: what is logged are its actions' rewards.
    settings = {"mode": mode, "gate": False, "rewards": {name: 1.0}, "old_decay": 0.5, "group": 16, **off}
    align = AlignConfig.model_validate({"objective": "vrpo", "projector_width": 48, "vrpo": settings})
    model = nn.Sequential(nn.Unflatten(1, (16, 12)), nn.Linear(12, 32), nn.Linear(32, 12), nn.Flatten())
    aligner = Aligner(model, "1", hidden_size=32, tokens=16, encoders=Constant(), budget=1000, objective=align)
    optimizer = torch.optim.AdamW([*model.parameters(), *aligner.parameters()], 3e-3)
    means = []
    for _ in range(40):
        images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
        clean = images / 127.5 - 1
        with aligner.step(images, torch.rand(8), clean):
            output = model(clean.flatten(1))
        ((output - clean.flatten(1)).square().mean() + aligner.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()
        means.append(aligner.logs()[f"reward_{name}"].nanmean().item())
    assert means[0] < 0.6
    assert means[-1] > 0.9


def test_a_score_alone_is_refused_in_analytic_mode() -> None:
    runpy.run_path(str(EXAMPLES / "custom_reward.py"), run_name="example")
    settings: dict[str, Any] = {"objective": "vrpo", "vrpo": {"rewards": {"signs": 1.0}}}
    with pytest.raises(ConfigError, match=r"'signs' has a score but no preference.*mode sampled"):
        Aligner(
            nn.Sequential(nn.Linear(12, 32)),
            "0",
            hidden_size=32,
            tokens=16,
            encoders=Constant(),
            budget=1000,
            objective=AlignConfig.model_validate(settings),
        )
