"""Group-relative normalisers against their formulas, and the properties they are chosen for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.alignment.advantage import combine, group_spread, norm

RULES = ("agreement", "sum", "per-reward", "centred")


def _centred(*shape: int) -> Tensor:
    scores = torch.randn(*shape, dtype=torch.float64)
    return scores - scores.mean(-1, keepdim=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [group_spread, norm])
def test_each_rule_is_its_formula(rule: str, length) -> None:
    x = [_centred(2, 3, 8) for _ in range(3)]
    w, sigma0 = [1.0, 0.5, 2.0], 0.25

    def size(v: np.ndarray) -> np.ndarray:
        return v.std(-1, keepdims=True) if length is group_spread else np.linalg.norm(v, axis=-1, keepdims=True)

    n = [v.numpy() for v in x]
    total = sum(a * v for a, v in zip(w, n, strict=True))
    expected = {
        "agreement": total / (sum(a * size(v) for a, v in zip(w, n, strict=True)) + sigma0),
        "sum": total / (size(total) + sigma0),
        "per-reward": sum(a * v / (size(v) + sigma0) for a, v in zip(w, n, strict=True)) / 3.5,
        "centred": total / 3.5,
    }[rule]
    found = combine(x, w, rule=rule, sigma0=sigma0, length=length)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_opposed_rewards_cancel_and_equal_rewards_add_up() -> None:
    x = _centred(4, 5, 16)
    opposed = combine([x, -x], [1.0, 1.0], rule="agreement", sigma0=0.25, length=group_spread)
    equal = combine([x, x], [1.0, 1.0], rule="agreement", sigma0=0.0, length=group_spread)
    assert opposed.abs().max() < 1e-12
    torch.testing.assert_close(group_spread(equal), torch.ones(4, 5, 1, dtype=torch.float64))


def test_conflict_shrinks_the_agreement_rule_only() -> None:
    x, y = _centred(1, 1, 512), _centred(1, 1, 512)
    sizes = {
        rule: group_spread(combine([x, -0.9 * x + 0.1 * y], [1.0, 1.0], rule=rule, sigma0=0.01, length=group_spread))
        for rule in ("agreement", "sum")
    }
    assert sizes["agreement"] < 0.15
    assert sizes["sum"] > 0.8


@pytest.mark.parametrize("rule", RULES)
def test_flat_rewards_give_zero_even_without_a_floor(rule: str) -> None:
    flat = torch.zeros(2, 3, 8)
    found = combine([flat, flat], [1.0, 1.0], rule=rule, sigma0=0.0, length=group_spread)
    assert torch.equal(found, flat)


def test_a_constant_reward_beside_another_changes_nothing() -> None:
    x, flat = _centred(2, 3, 8), torch.zeros(2, 3, 8, dtype=torch.float64)
    alone = combine([x], [1.0], rule="agreement", sigma0=0.25, length=group_spread)
    beside = combine([x, flat], [1.0, 3.0], rule="agreement", sigma0=0.25, length=group_spread)
    assert torch.equal(alone, beside)


def test_the_floor_keeps_collapsed_rewards_from_being_amplified() -> None:
    x = 1e-3 * _centred(2, 3, 8)
    found = combine([x], [1.0], rule="agreement", sigma0=0.25, length=group_spread)
    assert group_spread(found).max() < 0.02
