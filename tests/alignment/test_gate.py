"""Running means by time bin against a plain loop, and the gate they drive."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vrpo.alignment.gate import DECAY, RunningMeans, gate_value, pooled, time_bins
from vrpo.alignment.head import PolicyHead
from vrpo.config import VrpoConfig
from vrpo.training.telemetry import plain


def test_the_gate_closes_with_disagreement_only() -> None:
    m = torch.tensor([0.08, 0.0, -0.05, -0.09, -0.5])
    torch.testing.assert_close(gate_value(m, 0.1, 0.1), torch.tensor([1.0, 1.0, 0.5, 0.1, 0.1]))


def test_bins_cover_both_ends_of_time() -> None:
    assert time_bins(torch.tensor([0.0, 0.0999, 0.1001, 0.95, 1.0]), 10).tolist() == [0, 0, 1, 9, 9]


def test_means_are_decayed_sums_over_decayed_counts() -> None:
    rng = np.random.default_rng(0)
    means = RunningMeans(["a", "b"], 4)
    totals, counts = np.zeros(4), np.zeros(4)
    for _ in range(30):
        values, mask, bins = rng.normal(size=(6, 5)), rng.random((6, 5)) < 0.7, rng.integers(0, 3, 6)
        values[~mask] = np.nan
        sums, seen = np.zeros(4), np.zeros(4)
        for i in range(6):
            sums[bins[i]] += np.nansum(values[i])
            seen[bins[i]] += mask[i].sum()
        totals, counts = DECAY * totals + sums, DECAY * counts + seen
        observed = (torch.tensor(values), torch.tensor(mask))
        means.observe({"b": observed}, torch.tensor(bins))
        means.update()
    found = means.means("b").numpy()
    np.testing.assert_allclose(found[:3], totals[:3] / counts[:3], rtol=1e-5, atol=1e-6)
    # The bin that was never seen has the mean of all.
    assert found[3] == pytest.approx(totals.sum() / counts.sum(), abs=1e-6)
    assert torch.equal(means.means("a"), torch.zeros(4))


def test_nothing_enters_before_update_and_the_split_does_not_matter() -> None:
    values, bins = torch.randn(8, 5), torch.randint(0, 4, (8,))
    whole, parts = RunningMeans(["a"], 4), RunningMeans(["a"], 4)
    whole.observe({"a": values}, bins)
    assert torch.equal(whole.means("a"), torch.zeros(4))
    for part in (slice(0, 2), slice(2, 8)):
        parts.observe({"a": values[part]}, bins[part])
    whole.update()
    parts.update()
    torch.testing.assert_close(whole.means("a"), parts.means("a"))
    assert whole.means("a").abs().max() > 0


def test_reports_cover_the_steps_since_the_last_and_no_others() -> None:
    means = RunningMeans(["a"], 2)
    bins = torch.tensor([0, 1])
    for value in (1.0, 3.0):
        means.observe({"a": torch.full((2,), value)}, bins)
        means.update()
    assert pooled(*means.take()["a"]) == 2
    assert means.take() == {}
    means.observe({"a": torch.full((2,), 7.0)}, bins)
    means.update()
    assert pooled(*means.take()["a"]) == 7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_counts_nowhere(bad: float) -> None:
    means = RunningMeans(["a", "b"], 3)
    bins = torch.tensor([0, 1, 1])
    values = torch.tensor([[2.0, 4.0], [bad, 6.0], [8.0, bad]])
    means.observe({"a": values, "b": (values, torch.tensor([[True, True], [True, False], [True, False]]))}, bins)
    sums, counts = means.update()
    assert sums.tolist() == [[6, 14, 0], [6, 8, 0]]
    assert counts.tolist() == [[2, 2, 0], [2, 1, 0]]
    assert means.means("a").tolist() == [3, 7, 5]


@pytest.mark.parametrize("seen", [1, 0], ids=["one-bin", "none"])
def test_an_empty_bin_is_null_in_the_telemetry_and_its_gate_a_number(seen: int) -> None:
    projector = torch.nn.Linear(6, 4)
    head = PolicyHead(VrpoConfig(time_bins=3), projector, 4, ["semantic"], keep_old=False)
    values = torch.full((2, 5), -0.05)
    counted = torch.full((2, 5), bool(seen))
    names = ("semantic/reward", "semantic/size", "semantic/dropped", "agreement", "direction")
    head.statistics.observe(dict.fromkeys(names, (values, counted)), torch.tensor([1, 1]))
    head.update(projector)
    logs = {name: plain(value) for name, value in head.logs().items()}
    assert json.loads(json.dumps(logs, allow_nan=False)) == logs
    one = pytest.approx(-0.05) if seen else None
    assert logs["reward_semantic"] == logs["spread_semantic"] == logs["agreement"] == [None, one, None]
    assert logs["direction_norm"] == one
    # A bin that was never seen has the gate of all, and one is open before anything was.
    gate = gate_value(torch.tensor(-0.05 * seen), head.config.gate_scale, head.config.gate_floor)
    assert logs["gate"] == [pytest.approx(gate.item())] * 3
