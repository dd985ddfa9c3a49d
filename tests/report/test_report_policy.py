"""What the report says and draws of a policy inside the trunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fabricated import fabricate

from vrpo.report.compare import compare
from vrpo.report.policy import policy_sentences
from vrpo.report.telemetry import classify
from vrpo.runs import Run

RULED = {"rule": [1.0, 1.0], "limit": [1.0, 0.0]}


def with_logs(folder: Path, add: Callable[[float], dict[str, Any]], objective: str = "repa") -> Path:
    """Return a fabricated run whose training records also hold ``add(share of training)``."""
    run = fabricate(folder, objective, 0)
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    end = max(row["images"] for row in rows)
    for row in rows:
        if row["kind"] == "train":
            row |= {f"objective/{name}": value for name, value in add(row["images"] / end).items()}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def scaffold(share: float) -> dict[str, Any]:
    early, late = share >= 0.2, share >= 0.4
    return {
        "scaffold_advantage": [None if late else 0.1 * share, None if late else 0.5 * share],
        "scaffold_growth": [0.0, 0.0],
        "scaffold_gap": [1.5 - share if early else None, 1.5 - share if late else None],
        "scaffold_encoder": [float(not early), float(not late)],
        "scaffold_handed_at": [12800 if early else None, 25600 if late else None],
        "token_loss": [1.0 - 0.5 * share, 1.0 - 0.5 * share],
    }


def test_three_sentences_say_what_scaffold_and_token_did(tmp_path: Path) -> None:
    first, second, third = policy_sentences([Run(with_logs(tmp_path / "run", scaffold))])
    assert "at times 0.5 to 1" in first
    assert "from 12,800 images on (at times 0 to 0.5) and was done at 25,600 (at times 0.5 to 1)" in first
    assert second.startswith("Once the block was on its own")
    gaps = [float(word.rstrip(".")) for word in second.split() if word[0].isdigit()]
    assert gaps[0] > gaps[1] > 0.4
    assert "representation token went from 0.99" in third
    assert third.endswith("to 0.502.")


def test_a_scaffold_that_the_limit_ended_is_not_said_to_have_followed_its_gain(tmp_path: Path) -> None:
    def add(share: float, ruled: list[float]) -> dict[str, Any]:
        return {**scaffold(share), "scaffold_ruled": ruled}

    runs = {name: with_logs(tmp_path / name, partial(add, ruled=ruled)) for name, ruled in RULED.items()}
    (rule, *_), (limit, *_) = (policy_sentences([Run(run)]) for run in runs.values())
    assert "while that gained" in rule
    assert "while that gained" not in limit
    assert limit.endswith("in 1 of 2 time bins the limit align.scaffold.latest ended this, not the rule.")


def test_a_scaffold_that_never_ended_says_so(tmp_path: Path) -> None:
    def add(share: float) -> dict[str, Any]:
        return {"scaffold_handed_at": [None, None], "scaffold_gap": [None, None], "scaffold_encoder": [1.0, 1.0]}

    (sentence,) = policy_sentences([Run(with_logs(tmp_path / "run", add))])
    assert sentence == (
        "The encoder supplied keys and values and had not handed over to the block when training ended."
    )


def test_nothing_is_said_of_objectives_without_a_policy_and_the_gate_of_vrpo_is(tmp_path: Path) -> None:
    assert policy_sentences([Run(fabricate(tmp_path / "repa", "repa", 0))]) == ()
    said = policy_sentences([Run(fabricate(tmp_path / "vrpo", "vrpo", 0))])
    assert said[0].startswith("Alignment was hardly turned down: it kept 9")


def test_the_policy_of_a_side_head_is_told_by_gate_agreement_and_rewards(tmp_path: Path) -> None:
    def add(share: float) -> dict[str, Any]:
        return {"gate": [0.5, 1.0], "agreement": [-0.04, 0.08], "direction_norm": 0.6 + 0.0 * share}

    gate, agreement, direction = policy_sentences([Run(with_logs(tmp_path / "run", add))])
    assert "turned down to 75% on average, most at times 0 to 0.5, where it kept 50%" in gate
    assert "most at times 0.5 to 1 (cosine 0.08) and least at times 0 to 0.5 (-0.04)" in agreement
    assert "a length of 0.60" in direction


def test_a_gate_that_hardly_closed_is_not_said_to_have_turned_alignment_down(tmp_path: Path) -> None:
    gate = [1.0] * 9 + [0.97]
    (said,) = policy_sentences([Run(with_logs(tmp_path / "run", lambda share: {"gate": gate}))])
    assert said == "Alignment was hardly turned down: it kept 97% at times 0.9 to 1, and more at all others."


@pytest.mark.filterwarnings("error")
def test_a_time_bin_that_was_always_empty_counts_nowhere(tmp_path: Path) -> None:
    def add(share: float) -> dict[str, Any]:
        return {"gate": [0.5, None, 1.0], "agreement": [-0.04, None, 0.08]}

    gate, agreement = policy_sentences([Run(with_logs(tmp_path / "run", add))])
    assert "turned down to 75% on average, most at times 0 to 0.33, where it kept 50%" in gate
    assert "most at times 0.67 to 1 (cosine 0.08) and least at times 0 to 0.33 (-0.04)" in agreement
    (same,) = policy_sentences([Run(with_logs(tmp_path / "open", lambda share: {"gate": [None, 1.0, 1.0]}))])
    assert same == "Alignment never disagreed with denoising by enough to be turned down."


def test_the_report_holds_sentences_and_heat_maps(tmp_path: Path) -> None:
    compare([with_logs(tmp_path / "run", scaffold)], tmp_path / "r.html", title="One")
    html = (tmp_path / "r.html").read_text()
    assert "The encoder supplied keys and values while that gained" in html
    assert "Scaffold advantage" in html
    assert "Supplier of keys and values" in html
    assert "Scaffold handed at" not in html


def test_roles_of_the_scaffold_s_logs() -> None:
    roles = {name: classify(f"objective/scaffold_{name}").role for name in ("advantage", "encoder", "gap")}
    assert roles == {"advantage": "advantage", "encoder": "supply", "gap": "other"}
    assert {classify(f"objective/scaffold_{name}").role for name in ("handed_at", "ruled")} == {"hand-over"}


def test_the_token_s_logs_are_no_rewards() -> None:
    for name in ("token_loss", "token_spread", "token_evenness"):
        assert classify(f"objective/{name}").role == "other"
