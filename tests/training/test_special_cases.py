"""What is a special case of what holds for whole runs: the weights that a run ends with are the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trained import run, weights

from vrpo.report.policy import policy_sentences
from vrpo.runs import Run

# VRPO without all that makes it more than REPA.
PURE = {"alpha_end": 1.0, "trust": 0.0, "gate": False}
# 96 images in steps of 8: the encoder supplies in the first six steps.
CLOCK = {"supply": "clock", "share": 0.5}
LIMIT = {"supply": "advantage", "earliest": 1.0, "latest": 0.5, "fraction": 0.5}
TOKEN = {"use": True, "pair": "time"}


@pytest.mark.parametrize(
    ("special", "general"),
    [
        ({"objective": "repa"}, {"objective": "vrpo", "vrpo": PURE}),
        ({"objective": "repi", "scaffold": {"share": 0.5}}, {"objective": "repa", "scaffold": CLOCK}),
        ({"objective": "repi", "scaffold": {"share": 0.5}}, {"objective": "vrpo", "vrpo": PURE, "scaffold": CLOCK}),
        ({"objective": "repi", "scaffold": {"share": 0.5}}, {"objective": "repi", "scaffold": LIMIT}),
        ({"objective": "reg"}, {"objective": "repa", "token": {"use": True}}),
        ({"objective": "reg"}, {"objective": "vrpo", "vrpo": PURE, "token": {"use": True, "tau": 0.5}}),
    ],
    ids=["repa", "repi", "repi-of-vrpo", "repi-by-limit", "reg", "reg-of-vrpo-one-noising"],
)
def test_a_special_case_trains_the_same_weights(
    special: dict[str, Any], general: dict[str, Any], make_config: Any, tmp_path: Path
) -> None:
    for name, align in (("special", special), ("general", general)):
        run(make_config(align=align), tmp_path / name)
    for part in ("model", "ema"):
        a, b = weights(tmp_path / "special", part), weights(tmp_path / "general", part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_large_tau_trains_the_weights_of_reg(make_config: Any, tmp_path: Path) -> None:
    for name, tau in (("reg", None), ("policy", 1e9), ("sharp", 0.2)):
        align = {"objective": "reg", "token": {**TOKEN, "tau": tau}}
        run(make_config(align=align, train={"noisings": 4}), tmp_path / name)
    found = {name: weights(tmp_path / name) for name in ("reg", "policy", "sharp")}
    assert all(torch.equal(value, found["policy"][name]) for name, value in found["reg"].items())
    assert not all(torch.equal(value, found["sharp"][name]) for name, value in found["reg"].items())


def test_a_run_s_report_says_in_three_sentences_what_the_policy_did(make_config: Any, tmp_path: Path) -> None:
    inside = {"scaffold": LIMIT, "token": {"use": True}}
    for name, align in (("side", {}), ("inside", inside)):
        run(make_config(align={"objective": "vrpo", **align}), tmp_path / name)
    gate, agreement, direction = policy_sentences([Run(tmp_path / "side")])
    assert gate.startswith("Alignment ")
    assert agreement.startswith("What the encoder asks of a token agreed with what denoising asks most at times ")
    assert direction.startswith("The direction on which the rewards agreed had a length of 0.")
    scaffold, gap, token = policy_sentences([Run(tmp_path / "inside")])
    assert "handed over to the block at 48 images; in 10 of 10 time bins the limit align.scaffold.latest" in scaffold
    assert gap.startswith("Once the block was on its own")
    assert token.startswith("The velocity loss of the representation token went from ")
