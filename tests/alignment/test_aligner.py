"""The drop-in: on our transformer it equals the built-in trainer's step, on any other it changes nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loop import (
    BATCH,
    BUDGET,
    DENOISING,
    DEPTH,
    HIDDEN,
    TOKENS,
    Loop,
    Patches,
    config,
    draw,
    gradients,
    make,
    noised,
    pictures,
    run,
    trunk,
)
from torch import Tensor, nn

from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.alignment.objective import Objective, TargetBatch
from vrpo.errors import ConfigError
from vrpo.models.transformer import DiffusionTransformer
from vrpo.pixels import to_float
from vrpo.training.step import DenoisingStep


def built_in(objective: Objective, encoders: Sequence[Patches], parts: int, scale: float) -> list[dict[str, Tensor]]:
    """Do the same with the modules and in the manner of the project's own trainer."""
    model = trunk()
    step_module = DenoisingStep(model, objective, DENOISING, torch.float32)
    optimizer = torch.optim.SGD(step_module.parameters(), lr=0.05)
    history, size = [], BATCH // parts
    for step in range(4):
        images, draws = pictures(step), draw(step)
        for start in range(0, BATCH, size):
            some = images[start : start + size]
            output = step_module(
                to_float(some),
                None,
                draws.part(start, start + size),
                TargetBatch(tuple(encoder.tokens(some) for encoder in encoders)),
                some,
                images_seen=step * BATCH,
                budget=BUDGET,
                sample_weight=torch.tensor(scale) / BATCH,
            )
            output.loss.backward()
        history.append(gradients(model, objective, scale))
        optimizer.step()
        optimizer.zero_grad()
        objective.update()
    return history


def assert_same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]], rtol: float = 0.0) -> None:
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            if rtol:
                assert (a[name] - b[name]).norm() <= rtol * a[name].norm() + 1e-7, (step, name)
            else:
                assert torch.equal(a[name], b[name]), (step, name)


@pytest.mark.parametrize(
    ("name", "vrpo", "blocks", "parts", "scale"),
    [
        ("none", {}, [2], 1, 1.0),
        ("repa", {}, [2], 1, 1.0),
        ("irepa", {}, [2], 2, 1.0),
        ("contrastive", {}, [1, 3], 1, 1.0),
        ("vrpo", {}, [2], 1, 1.0),
        ("vrpo", {}, [1, 3], 2, 1024.0),
        ("vrpo", {"mode": "sampled", "warmup": 0.0}, [2], 2, 1.0),
        ("vrpo", {"trust": 0.0, "perceptual": 0.0, "warmup": 0.0}, [2], 2, 64.0),
    ],
)
def test_equals_the_built_in_trainer(
    name: str, vrpo: dict[str, Any], blocks: list[int], parts: int, scale: float
) -> None:
    encoders = [Patches(24), Patches(20)] if len(blocks) > 1 else [Patches()]
    align = config(name, **vrpo).model_copy(update={"depth": tuple(blocks)})
    torch.manual_seed(1)
    objective = build_objective(align, TrunkShape(HIDDEN, DEPTH, 2, TOKENS, "N"), [e.width for e in encoders])
    model = trunk()
    aligner = make(model, [f"blocks.{d - 1}" for d in blocks], objective=config(name, **vrpo), encoders=encoders)
    aligner.objective.load_state_dict(objective.state_dict())
    mine = run(model, aligner, parts=parts, scale=scale)
    assert_same(built_in(objective, encoders, parts, scale), mine)
    assert aligner.images_seen == 4 * BATCH
    # The comparison would also pass if nothing were aligned.
    plain = run(other := trunk(), make(other, objective="none"))[3]
    assert torch.equal(
        plain["model.blocks.0.feed_forward.output.weight"], mine[3]["model.blocks.0.feed_forward.output.weight"]
    ) == (name == "none")


def test_what_the_loss_is_multiplied_by_does_not_matter() -> None:
    settings = config("vrpo", warmup=0.0, mode="sampled")
    runs = []
    for options in ({}, {"parts": 4}, {"scale": 2.0**12, "inside": True}, {"scale": 3.7, "parts": 2}):
        model = trunk()
        runs.append(run(model, make(model, objective=settings), **options))
    for other in runs[1:]:
        assert_same(runs[0], other, rtol=2e-4)


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(inside: bool) -> None:
    settings = config("vrpo", warmup=0.0, mode="sampled")
    model, other = trunk(), trunk()
    plain = run(model, make(model, objective=settings))
    assert_same(plain, run(other, make(other, objective=settings), inside=inside, forward=Loop(other, False)))


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_give_the_same_gradients(whole: bool) -> None:
    model, other = trunk(), trunk()
    plain = run(model, make(model, objective=config("vrpo", warmup=0.0)), 2)
    aligner = make(other, objective=config("vrpo", warmup=0.0))
    if whole:
        compiled = run(other, aligner, 2, forward=torch.compile(Loop(other), backend="aot_eager"))
    else:
        other.compile_blocks(backend="aot_eager")
        compiled = run(other, aligner, 2)
    torch.compiler.reset()
    assert_same(plain, compiled, rtol=1e-4)


def test_bfloat16_autocast_trains() -> None:
    model = trunk()
    with torch.autocast("cpu", torch.bfloat16):
        history = run(model, make(model, objective=config("vrpo", warmup=0.0)))
    assert all(gradient.isfinite().all() for step in history for gradient in step.values())


def test_detached_leaves_the_model_as_it_was() -> None:
    model = trunk()
    before, keys = model(*(inputs := noised())), list(model.state_dict())
    aligner = make(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(*inputs), before)
    with aligner.step(pictures(0), inputs[1]):
        assert torch.equal(model(*inputs), before)
    aligner.loss()
    aligner.detach()
    assert not any(module._forward_hooks for module in model.modules())
    with aligner.step(pictures(0), inputs[1]):
        model(*inputs)
    with pytest.raises(ConfigError, match="did not run"):
        aligner.loss()


def test_a_copy_of_the_model_is_not_aligned() -> None:
    model = trunk()
    aligner = make(model)
    average = copy.deepcopy(model)
    inputs = noised()
    with aligner.step(pictures(0), inputs[1]):
        average(*inputs)
    with pytest.raises(ConfigError, match="did not run"):
        aligner.loss()


def test_a_pass_without_gradients_goes_before_the_aligned_one() -> None:
    """Self-conditioning runs the model twice; only the pass that is trained counts."""
    first, second = trunk(), trunk()
    a, b = make(first, objective=config("repa")), make(second, objective=config("repa"))
    inputs = noised()
    for model, aligner, conditioned in ((first, a, False), (second, b, True)):
        with aligner.step(pictures(0), inputs[1]):
            if conditioned:
                with torch.no_grad():
                    model(inputs[0] * 2, inputs[1])
            model(*inputs)
        aligner.loss().backward()
    assert_same([gradients(first, a.objective)], [gradients(second, b.objective)])


class Foreign(nn.Module):
    """Somebody else's transformer: a class token before the patches, their order reversed, tuples between blocks."""

    def __init__(self, net: DiffusionTransformer, place: int, kind: type) -> None:
        super().__init__()
        self.net, self.place, self.kind = net, place, kind
        self.layer = nn.ModuleList(_TupleBlock(block, place, kind) for block in net.blocks)
        self.class_token = nn.Parameter(torch.zeros(1, 1, HIDDEN))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        net = self.net
        condition = net.time_embedding(t)
        tokens = (net.patch_embedding(x) + net.position_table).flip(1)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1)
        for layer in self.layer:
            tokens = layer(tokens, condition)[self.place]
        return net._unpatchify(net.final(tokens[:, 1:].flip(1), condition))


class _TupleBlock(nn.Module):
    def __init__(self, block: nn.Module, place: int, kind: type) -> None:
        super().__init__()
        self.block, self.place, self.kind = block, place, kind

    def forward(self, tokens: Tensor, condition: Tensor) -> Any:
        # Attention sees patches alone, so that what the class token does cannot matter.
        patches = torch.cat([tokens[:, :1], self.block(tokens[:, 1:], condition)], 1)
        return self.kind([patches, condition] if self.place == 0 else [condition, patches])


@pytest.mark.parametrize(("place", "kind"), [(0, tuple), (1, list)])
def test_prefix_tokens_other_orders_and_tuples(place: int, kind: type) -> None:
    settings = config("vrpo", warmup=0.0)
    model = trunk()
    plain = run(model, make(model, objective=settings), 2)
    foreign = Foreign(trunk(), place, kind)
    aligner = make(foreign, "layer.1", objective=settings, select=range(TOKENS, 0, -1), output=place)
    other = [
        {name.replace("model.net.", "model."): value for name, value in step.items() if ".layer." not in name}
        for step in run(foreign, aligner, 2)
    ]
    for step in other:
        step.pop("model.class_token")
    assert_same(plain, other, rtol=1e-4)
    sliced = make(Foreign(trunk(), place, kind), "layer.2", objective=settings, select=slice(1, None), output=place)
    assert sliced.tokens == TOKENS


def test_a_resumed_run_goes_on_as_the_uninterrupted_one() -> None:
    settings = config("vrpo", mode="sampled")
    model = trunk()
    whole = make(model, objective=settings)
    run(model, whole, 2)
    again_model = copy.deepcopy(model)
    again = make(again_model, objective=settings, seed=0)
    again.load_state_dict(whole.state_dict())
    assert again.images_seen == 2 * BATCH
    assert_same(run(model, whole, 2), run(again_model, again, 2))
    assert all(isinstance(value, Tensor) for value in whole.state_dict().values())


def test_targets_and_their_mean() -> None:
    model = trunk()
    aligner = make(model)
    images = pictures(0)
    (raw,) = aligner.targets(images)
    assert torch.equal(raw, Patches().tokens(images))
    aligner.center(images)
    (centred,) = aligner.targets(images)
    assert centred.mean((0, 1)).abs().max() < 1e-6
    assert (raw - centred).std((0, 1)).max() < 1e-6
    resumed = make(trunk())
    resumed.load_state_dict(aligner.state_dict())
    assert torch.equal(resumed.targets(images)[0], centred)


def test_targets_given_are_those_computed() -> None:
    inputs, found = noised(), []
    for given in (False, True):
        model = trunk()
        aligner = make(model, objective=config("repa"))
        targets = aligner.targets(pictures(0)) if given else None
        images = None if given else pictures(0)
        with aligner.step(images, inputs[1], to_float(pictures(0)), targets=targets):
            model(*inputs)
        aligner.loss().backward()
        found.append(gradients(model, aligner.objective))
    assert_same(found[:1], found[1:])


def test_logs_tell_of_alignment_and_rewards() -> None:
    model = trunk()
    aligner = make(model, objective=config("vrpo", warmup=0.0))
    run(model, aligner)
    logs = aligner.logs()
    assert logs["alignment"].isfinite()
    assert logs["reward_fidelity"].shape == logs["gate"].shape == (10,)
    assert not aligner.logs()
