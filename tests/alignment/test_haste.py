"""HASTE: the attention loss, the trigger's cosine, and the end of alignment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.alignment.haste import TRIGGER_PERIOD, Haste, affinity_map, cross_entropy, student_map
from vrpo.alignment.objective import AlignmentBatch
from vrpo.config import AlignConfig, HasteConfig

HIDDEN, TOKENS, HEADS, WIDTH = 8, 9, 2, 6


def make(weight: float = 0.5, num_heads: int = HEADS, depth: int = 3, **haste: object) -> Haste:
    config = AlignConfig(objective="haste", weight=weight, projector_width=8, haste=HasteConfig(**haste))
    return Haste(config, hidden_size=HIDDEN, depths=(depth,), encoder_widths=(WIDTH,), num_heads=num_heads)


def make_batch(images_seen: int = 0, budget: int = 1000) -> AlignmentBatch:
    return AlignmentBatch(
        targets=(torch.randn(2, TOKENS, WIDTH),),
        time=torch.rand(2),
        clean=torch.randn(2, 3, 6, 6),
        images=None,
        images_seen=images_seen,
        budget=budget,
        sample_weight=0.5,
    )


def predict_clean() -> Tensor:
    raise AssertionError("HASTE predicts no image")


def step(objective: Haste, batch: AlignmentBatch, h: Tensor, denoising: Tensor) -> Tensor | None:
    """One training step whose denoising gradient at the tokens is ``denoising``."""
    taps = objective.taps(batch)
    if not taps.tokens:
        return objective.loss(predict_clean)
    qkv = torch.randn(3, 2, HEADS, TOKENS, HIDDEN // HEADS)
    for tap in taps.attention.values():
        assert all(torch.equal(a, b) for a, b in zip(tap(*qkv), qkv, strict=True))
    onward = taps.tokens[3](h)
    loss = objective.loss(predict_clean)
    (loss + (onward * denoising).sum()).backward()
    objective.update()
    return loss


def plain_map(logits: np.ndarray) -> np.ndarray:
    """Softmax of each row over the other columns, by loops."""
    result = np.zeros_like(logits)
    for row in range(len(logits)):
        others = [column for column in range(len(logits)) if column != row]
        weights = [math.exp(logits[row, column]) for column in others]
        result[row, others] = np.array(weights) / sum(weights)
    return result


def test_maps_and_cross_entropy_are_the_plain_formulas() -> None:
    y = torch.randn(TOKENS, WIDTH)
    q, k = torch.randn(2, 3, TOKENS, 4)
    unit = y.double().numpy() / np.linalg.norm(y.double().numpy(), axis=1, keepdims=True)
    teacher = plain_map(unit @ unit.T / 0.1)
    np.testing.assert_allclose(affinity_map(y[None])[0].numpy(), teacher, atol=1e-5)

    heads = [plain_map(q[head].double().numpy() @ k[head].double().numpy().T / 2) for head in range(3)]
    student = np.mean(heads, axis=0)
    np.testing.assert_allclose(student_map(q[None], k[None])[0].numpy(), student, atol=1e-5)

    expected = np.mean(
        [
            -sum(t * math.log(s) for t, s in zip(*rows, strict=True) if t > 0)
            for rows in zip(teacher, student, strict=True)
        ]
    )
    actual = cross_entropy(affinity_map(y[None]), student_map(q[None], k[None]))
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_loss_adds_attention_over_the_aligned_heads() -> None:
    objective = make(weight=0.5, attention_weight=0.25)
    objective.aligned_heads = 1
    batch, h = make_batch(), torch.randn(2, TOKENS, HIDDEN)
    taps = objective.taps(batch)
    assert set(taps.attention) == {2, 3}
    attention = []
    for tap in taps.attention.values():
        q, k, v = torch.randn(3, 2, HEADS, TOKENS, 4)
        tap(q, k, v)
        attention.append(cross_entropy(affinity_map(batch.targets[0]), student_map(q[:, :1], k[:, :1])))
    taps.tokens[3](h)
    expected = -0.5 * objective.measure(batch, {3: h}) + 0.25 * sum(attention) / 2
    torch.testing.assert_close(objective.loss(predict_clean), expected)
    torch.testing.assert_close(objective.logs()["attention"], sum(attention) / 2)
    assert objective._maps == {}


def test_attention_loss_draws_queries_towards_the_teacher() -> None:
    objective, batch = make(weight=0.0), make_batch()
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 4)
    q.requires_grad_()
    optimiser = torch.optim.Adam([q], lr=0.1)
    losses = []
    for _ in range(30):
        taps = objective.taps(batch)
        taps.tokens[3](torch.zeros(2, TOKENS, HIDDEN))
        taps.attention[3](q, k, v)
        loss = objective.loss(predict_clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_half_precision_extremes_are_finite() -> None:
    q, k = (torch.randn(2, 1, HEADS, TOKENS, 64) * 1e3).half()
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = cross_entropy(affinity_map(torch.zeros(1, TOKENS, WIDTH)), student_map(q, k))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize(("stop_images", "last"), [(0, 399), (120, 119)])
def test_fixed_stop_costs_nothing_afterwards(stop_images: int, last: int) -> None:
    objective = make(stop_images=stop_images)
    assert objective.taps(make_batch(last)).tokens
    taps = objective.taps(make_batch(last + 1))
    assert not taps.tokens
    assert not taps.attention


def test_loss_is_none_after_the_stop() -> None:
    objective, h = make(stop_images=100), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    assert step(objective, make_batch(0), h, torch.zeros(())) is not None
    objective.logs()
    assert step(objective, make_batch(100), h, torch.zeros(())) is None
    assert objective.logs() == {}
    assert objective.measure(make_batch(100), {3: h}) is not None


def test_trigger_sees_the_cosine_of_the_two_gradients_and_changes_neither() -> None:
    objective, plain = make(stop="trigger"), make(stop="fixed")
    plain.load_state_dict(objective.state_dict())
    batch, h = make_batch(), torch.randn(2, TOKENS, HIDDEN)
    denoising = torch.randn_like(h)
    seen, unseen = h.clone().requires_grad_(), h.clone().requires_grad_()
    for each, tokens in ((objective, seen), (plain, unseen)):
        torch.manual_seed(1)
        step(each, batch, tokens, denoising)
    torch.testing.assert_close(seen.grad, unseen.grad)
    alignment = unseen.grad - denoising
    cosine = torch.nn.functional.cosine_similarity(alignment.flatten(), denoising.flatten(), dim=0)
    torch.testing.assert_close(objective.logs()["gradient_cosine"], cosine, rtol=1e-4, atol=1e-5)


def test_trigger_ends_alignment_when_gradients_oppose_and_resumes_ended() -> None:
    objective, h = make(stop="trigger"), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    batch = make_batch(images_seen=50)

    def alignment_gradient() -> Tensor:
        with torch.enable_grad():
            objective.taps(batch).tokens[3](h)
            return torch.autograd.grad(objective.loss(predict_clean), h)[0]

    for _ in range(2 * TRIGGER_PERIOD):  # agreeing: never ends
        step(objective, batch, h, alignment_gradient())
    assert not objective.stopped
    assert objective.logs()["gradient_cosine"] > 0.9
    for _ in range(TRIGGER_PERIOD):
        step(objective, make_batch(images_seen=0), h, torch.zeros_like(h))  # the first step's zero gradient
    assert not objective.stopped
    for _ in range(3 * TRIGGER_PERIOD):
        if objective.taps(batch).tokens:
            step(objective, batch, h, -alignment_gradient())
    assert objective.stopped
    assert not objective.taps(batch).tokens

    resumed = make(stop="trigger")
    assert resumed.taps(batch).tokens
    resumed.load_state_dict(objective.state_dict())
    assert not resumed.taps(batch).tokens


def test_trigger_waits_for_its_share_of_the_budget() -> None:
    objective, h = make(stop="trigger", trigger_cosine=1.0), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    for _ in range(TRIGGER_PERIOD):
        step(objective, make_batch(images_seen=49), h, torch.ones_like(h))
    assert not objective.stopped
    for _ in range(TRIGGER_PERIOD):
        step(objective, make_batch(images_seen=50), h, torch.ones_like(h))
    assert objective.stopped


def test_trigger_resumed_midway_ends_at_the_same_step() -> None:
    h = torch.randn(2, TOKENS, HIDDEN)
    batch = make_batch(images_seen=500)
    torch.manual_seed(3)
    initial = make(stop="trigger", trigger_cosine=1.0)

    def steps_until_end(restart_at: int | None) -> int:
        objective = make(stop="trigger", trigger_cosine=1.0)
        objective.load_state_dict(initial.state_dict())
        for count in range(3 * TRIGGER_PERIOD):
            if not objective.taps(batch).tokens:
                return count
            if count == restart_at:
                state = objective.state_dict()
                objective = make(stop="trigger", trigger_cosine=1.0)
                objective.load_state_dict(state)
            step(objective, batch, h.clone().requires_grad_(), torch.ones_like(h))
        raise AssertionError("never ended")

    assert steps_until_end(None) == steps_until_end(7) == TRIGGER_PERIOD


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_trigger_follows_the_cosine_of_the_whole_step(passes: int) -> None:
    mine, onward = torch.randn(2, 4, TOKENS, HIDDEN)
    objective = make(stop="trigger")
    for a, b in zip(mine.chunk(passes), onward.chunk(passes), strict=True):
        objective._keep_gradient(a)
        objective._keep_gradient(b)
    objective.update()
    cosine = torch.cosine_similarity(mine.double().flatten(), onward.double().flatten(), dim=0)
    assert objective.trigger_sum.item() / 0.01 == pytest.approx(cosine.item(), rel=1e-4)


def test_no_gradient_pass_leaves_the_trigger_alone() -> None:
    objective, h = make(stop="trigger"), torch.randn(2, TOKENS, HIDDEN)
    with torch.no_grad():
        assert objective.taps(make_batch()).tokens[3](h) is h
        assert objective.loss(predict_clean) is not None
    assert objective.trigger_weight == 0
