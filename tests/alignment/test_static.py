"""REPA, iREPA and the contrastive objective against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch
from vrpo.alignment.static import Contrastive, Irepa, Repa, spatial_normalise
from vrpo.config import AlignConfig

HIDDEN, TOKENS = 12, 16


def make_batch(images: int = 3, widths: Sequence[int] = (6, 10), **changes: object) -> AlignmentBatch:
    fields: dict[str, object] = {
        "targets": tuple(3 * torch.randn(images, TOKENS, width) + 1 for width in widths),
        "time": torch.rand(images),
        "clean": torch.randn(images, 3, 8, 8),
        "images": None,
        "images_seen": 0,
        "budget": 1000,
        "sample_weight": 1 / images,
    }
    return AlignmentBatch(**(fields | changes))


def make(kind: type[Repa], depths: Sequence[int] = (2, 4), widths: Sequence[int] = (6, 10), **config) -> Repa:
    settings = AlignConfig(projector_width=8, **config)
    return kind(settings, hidden_size=HIDDEN, depths=depths, encoder_widths=widths)


def run(objective: Repa, batch: AlignmentBatch, tokens: dict[int, Tensor]) -> Tensor | None:
    taps = objective.taps(batch)
    assert set(taps.tokens) <= set(tokens)
    for depth, tap in taps.tokens.items():
        assert torch.equal(tap(tokens[depth]), tokens[depth])
    return objective.loss(lambda: pytest.fail("a static objective predicts no image"))


def reference_cosine(projector: nn.Module, h: Tensor, y: Tensor) -> Tensor:
    """Mean cosine by loops over images and tokens."""
    layers = [(layer.weight, layer.bias) for layer in (projector.first, projector.second, projector.last)]
    total = torch.zeros((), dtype=h.dtype)
    for image in range(h.shape[0]):
        for token in range(h.shape[1]):
            x = h[image, token]
            for index, (weight, bias) in enumerate(layers):
                x = weight @ x + bias
                x = x / (1 + torch.exp(-x)) if index < 2 else x
            target = y[image, token]
            total = total + (x @ target) / ((x @ x).sqrt() * (target @ target).sqrt())
    return total / (h.shape[0] * h.shape[1])


def test_repa_loss_and_gradients_are_the_plain_formula() -> None:
    objective = make(Repa, weight=0.7).double()
    batch = make_batch(2)
    batch = make_batch(2, targets=tuple(target.double() for target in batch.targets))
    tokens = {depth: torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64).requires_grad_() for depth in (2, 4)}
    inputs = [*tokens.values(), *objective.parameters()]
    actual = torch.autograd.grad(run(objective, batch, tokens), inputs)

    heads = iter(objective.projectors)
    cosines = [reference_cosine(next(heads), tokens[d], y) for d in (2, 4) for y in batch.targets]
    loss = -0.7 * sum(cosines) / 4
    expected = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(run(objective, batch, tokens), loss)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_logs_are_the_mean_over_micro_batches_and_start_afresh() -> None:
    objective = make(Repa)
    tokens = {depth: torch.randn(3, TOKENS, HIDDEN) for depth in (2, 4)}
    batches = [make_batch(), make_batch()]
    measured = [objective.measure(batch, tokens) for batch in batches]
    assert objective.logs() == {}
    for batch in batches:
        run(objective, batch, tokens)
    logs = objective.logs()
    torch.testing.assert_close(logs["alignment"], torch.stack(measured).mean())
    heads = torch.stack([logs[f"alignment_depth{d}_encoder{e}"] for d in (2, 4) for e in (1, 2)])
    torch.testing.assert_close(heads.mean(), logs["alignment"])
    assert not logs["alignment"].requires_grad
    assert objective.logs() == {}


def test_loss_without_gradient_and_nothing_held_afterwards() -> None:
    objective = make(Repa)
    tokens = {depth: torch.randn(3, TOKENS, HIDDEN) for depth in (2, 4)}
    with torch.no_grad():
        loss = run(objective, make_batch(), tokens)
    assert not loss.requires_grad
    assert objective._tokens == {}
    assert objective._batch is None
    assert objective.loss(lambda: pytest.fail("not called")) is None


def test_targets_made_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        batch = make_batch()
    for kind in (Repa, Irepa, Contrastive):
        objective = make(kind)
        run(objective, batch, {depth: torch.randn(3, TOKENS, HIDDEN) for depth in (2, 4)}).backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())


@pytest.mark.parametrize("kind", [Repa, Irepa, Contrastive])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes_give_no_nan(kind: type[Repa], dtype: torch.dtype) -> None:
    objective = make(kind, depths=(4,), widths=(6,))
    h = torch.randn(3, TOKENS, HIDDEN) * torch.logspace(-7, 4.8, TOKENS)[None, :, None]
    h[0, 0] = 0
    h = h.clamp(-65504, 65504).to(dtype).requires_grad_()
    target = (torch.randn(3, TOKENS, 6) * torch.logspace(-7, 4.8, TOKENS)[None, :, None]).clamp(-65504, 65504)
    target[0] = 0
    with torch.autocast("cpu", dtype=dtype):
        loss = run(objective, make_batch(targets=(target.half(),)), {4: h})
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(h.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in objective.parameters())


def test_training_on_repa_aligns() -> None:
    objective = make(Repa, depths=(4,), widths=(6,))
    batch, h = make_batch(widths=(6,)), torch.randn(3, TOKENS, HIDDEN)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    before = objective.measure(batch, {4: h})
    for _ in range(100):
        optimiser.zero_grad()
        run(objective, batch, {4: h}).backward()
        optimiser.step()
    assert objective.measure(batch, {4: h}) > before + 0.3


def test_spatial_normalisation_matches_numpy() -> None:
    y = 5 * torch.randn(3, TOKENS, 7, dtype=torch.float64) + 2
    array = y.numpy()
    mean, deviation = array.mean(axis=1, keepdims=True), array.std(axis=1, ddof=1, keepdims=True)
    expected = (array - 0.6 * mean) / deviation
    np.testing.assert_allclose(spatial_normalise(y, 0.6).numpy(), expected, rtol=1e-5)

    objective = make(Irepa, widths=(7,), gamma=0.6)
    prepared = objective.prepare_target(y).numpy()
    np.testing.assert_allclose(prepared, expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-6)


def test_irepa_aligns_a_convolution_with_normalised_targets() -> None:
    objective = make(Irepa, depths=(3,), widths=(6,), weight=0.5)
    batch, h = make_batch(widths=(6,)), torch.randn(3, TOKENS, HIDDEN)
    conv = objective.projectors[0].conv
    grid = nn.functional.conv2d(h.mT.reshape(3, HIDDEN, 4, 4), conv.weight, conv.bias, padding=1)
    target = spatial_normalise(batch.targets[0], 0.6)
    cosine = nn.functional.cosine_similarity(grid.reshape(3, 6, TOKENS).mT, target, dim=-1).mean()
    torch.testing.assert_close(run(objective, batch, {3: h}), -0.5 * cosine)


def brute_force_info_nce(u: np.ndarray, y: np.ndarray, temperature: float) -> float:
    images, tokens, _ = u.shape
    total = 0.0
    for image in range(images):
        for token in range(tokens):
            scores = [math.exp(u[image, token] @ y[other, token] / temperature) for other in range(images)]
            total -= math.log(scores[image] / sum(scores))
    return total / (images * tokens)


def test_contrastive_is_cross_entropy_over_images() -> None:
    objective = make(Contrastive, depths=(3,), widths=(6,), weight=0.5, temperature=0.2)
    batch, h = make_batch(5, widths=(6,)), torch.randn(5, TOKENS, HIDDEN)
    u = objective.projectors[0](h).detach().double().numpy()
    y = batch.targets[0].double().numpy()
    u, y = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, y))
    loss = run(objective, batch, {3: h})
    assert loss.item() == pytest.approx(0.5 * brute_force_info_nce(u, y, 0.2), rel=1e-5)

    objective.group_limit = 2  # groups of 2, 2 and 1 images
    groups = [slice(0, 2), slice(2, 4), slice(4, 5)]
    expected = sum(len(u[g]) * brute_force_info_nce(u[g], y[g], 0.2) for g in groups) / 5
    assert run(objective, batch, {3: h}).item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_contrastive_gains_from_right_pairs_only() -> None:
    objective = make(Contrastive, depths=(3,), widths=(6,))
    target = objective.prepare_target(torch.randn(4, TOKENS, 6))
    zero = torch.zeros(())
    right = objective.head_loss(target, target, zero)
    wrong = objective.head_loss(target.roll(1, 0), target, zero)
    same = objective.head_loss(target[:1].expand(4, -1, -1), target[:1].expand(4, -1, -1), zero)
    assert right < same < wrong
    assert same.item() == pytest.approx(math.log(4), rel=1e-5)
