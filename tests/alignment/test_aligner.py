"""The drop-in: on our transformer it equals the built-in trainer's step, on any other it changes nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vrpo.alignment import Aligner
from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.alignment.objective import Objective, TargetBatch
from vrpo.config import AlignConfig, DiffusionConfig
from vrpo.errors import ConfigError
from vrpo.models.transformer import DiffusionTransformer
from vrpo.pixels import to_float
from vrpo.sampling import build_denoising
from vrpo.training.step import DenoisingStep, draw_step

BATCH, SIDE, TOKENS, HIDDEN, DEPTH, BUDGET = 8, 8, 16, 32, 4, 40
DENOISING = build_denoising("SiT", DiffusionConfig())


class Patches:
    """Encoders for tests: a fixed linear map of each patch."""

    def __init__(self, width: int = 24, grid: int = 4) -> None:
        self.width, self.grid = width, grid
        values = 3 * (SIDE // grid) ** 2
        self.matrix = torch.randn(values, width, generator=torch.Generator().manual_seed(width)) / values**0.5

    def tokens(self, images: Tensor) -> Tensor:
        patches = nn.functional.pixel_unshuffle(to_float(images), SIDE // self.grid)
        return patches.flatten(2).transpose(1, 2) @ self.matrix


def trunk() -> DiffusionTransformer:
    torch.manual_seed(0)
    net = DiffusionTransformer(
        input_size=SIDE, patch_size=2, in_channels=3, hidden_size=HIDDEN, depth=DEPTH, num_heads=2, num_classes=0
    )
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def config(objective: str, **vrpo: Any) -> AlignConfig:
    return AlignConfig.model_validate({"objective": objective, "projector_width": 48, "vrpo": vrpo})


def pictures(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def make(model: nn.Module, blocks: str | Sequence[str] = "blocks.1", **over: Any) -> Aligner:
    torch.manual_seed(1)
    values: dict[str, Any] = {"hidden_size": HIDDEN, "tokens": TOKENS, "encoders": Patches(), "budget": BUDGET}
    values = {**values, "objective": config("vrpo"), **over}
    return Aligner(model, blocks, **values)


def denoise(model: nn.Module, clean: Tensor, draws: Any) -> Tensor:
    """Return the denoising loss as somebody else's trainer would compute it."""
    noised = DENOISING.noised(clean, draws.noise, draws.uniforms)
    return DENOISING.loss(model(noised, draws.uniforms).float(), clean, draws.noise, draws.uniforms).mean()


def run(
    model: nn.Module,
    aligner: Aligner,
    steps: int = 4,
    *,
    parts: int = 1,
    scale: float = 1.0,
    inside: bool = False,
    forward: nn.Module | None = None,
) -> list[dict[str, Tensor]]:
    """Train with plain SGD, and return every step's gradients."""
    optimizer = torch.optim.SGD([*model.parameters(), *aligner.parameters()], lr=0.05)
    history, size = [], BATCH // parts
    for step in range(steps):
        images = pictures(step)
        draws = draw(step)
        for start in range(0, BATCH, size):
            part, some = draws.part(start, start + size), images[start : start + size]
            with aligner.step(some, part.uniforms):
                loss = denoise(model if forward is None else forward, to_float(some), part)
                if inside:
                    ((loss + aligner.loss()) * (scale / parts)).backward()
            if not inside:
                (scale * (loss + aligner.loss()) / parts).backward()
        history.append(gradients(model, aligner.objective, scale))
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()
    return history


def draw(step: int) -> Any:
    return draw_step(
        0, step, count=BATCH, shape=(3, SIDE, SIDE), noisings=1, label_dropout=0, device=torch.device("cpu")
    )


def gradients(model: nn.Module, objective: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    found = {}
    for prefix, module in (("model", model), ("objective", objective)):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
                found[f"{prefix}.{name.replace('_orig_mod.', '')}"] = parameter.grad.clone()
    return found


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


class Loop(nn.Module):
    """The blocks one after the other or, as trainers of large models do, each recomputed in the backward pass."""

    def __init__(self, net: DiffusionTransformer, reentrant: bool | None = None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        net = self.net
        tokens, condition = net.patch_embedding(x) + net.position_table, net.time_embedding(t)
        for block in net.blocks:
            if self.reentrant is None:
                tokens = block(tokens, condition)
            else:
                tokens = checkpoint(block, tokens, condition, use_reentrant=self.reentrant)
        return net._unpatchify(net.final(tokens, condition))


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(inside: bool) -> None:
    settings = config("vrpo", warmup=0.0, mode="sampled")
    model, other = trunk(), trunk()
    plain = run(model, make(model, objective=settings))
    assert_same(plain, run(other, make(other, objective=settings), inside=inside, forward=Loop(other, False)))


def test_reentrant_checkpointing_is_refused() -> None:
    model = trunk()
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        run(model, make(model), forward=Loop(model, True))


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


def noised() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), torch.rand(BATCH, generator=generator)


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


# -- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "over", "sentence"),
    [
        ("block.1", {}, r"the model has no block 'block\.1': did you mean 'blocks\.1'\?"),
        ("", {}, "the model has no block ''"),
        ([], {}, "must name one block or several"),
        (["blocks.1", "blocks.1"], {}, "must name one block or several, each once"),
        ("blocks.1", {"objective": "vrpoo"}, r"no objective 'vrpoo': did you mean 'vrpo'\?"),
        ("blocks.1", {"objective": "haste"}, "'haste' reads queries and keys"),
        ("blocks.1", {"objective": AlignConfig(depth=(2,))}, "align.depth is set"),
        ("blocks.1", {"tokens": 17, "encoders": "resnet10t"}, "'resnet10t' needs a square grid"),
    ],
)
def test_construction_refuses_in_one_sentence(blocks: Any, over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(trunk(), blocks, **over)


@pytest.mark.parametrize(
    ("blocks", "over", "sentence"),
    [
        ("blocks", {}, "'blocks' did not run with gradients .* name a block rather than a list"),
        ("time_embedding", {}, r"'time_embedding' returns a tensor of shape \(8, 32\), not tokens"),
        ("blocks.1", {"hidden_size": 64}, r"shape \(8, 16, 32\), not tokens \(B, N, 64\)"),
        ("blocks.1", {"encoders": Patches(grid=2)}, "an encoder gives 4 tokens an image, and Aligner was built for 16"),
        ("blocks.1", {"tokens": 4, "encoders": Patches(grid=2)}, "gives 16 tokens an image, where tokens is 4"),
        ("blocks.1", {"select": slice(1, None)}, "gives 15 tokens an image, where tokens is 16"),
    ],
)
def test_a_step_refuses_in_one_sentence(blocks: str, over: dict[str, Any], sentence: str) -> None:
    model = trunk()
    with pytest.raises(ConfigError, match=sentence):
        run(model, make(model, blocks, **over), 1)


def test_misuse_is_told_in_one_sentence() -> None:
    model = trunk()
    aligner, (x, t) = make(model), noised()
    with pytest.raises(ConfigError, match="goes with a step"):
        aligner.loss()
    with pytest.raises(ConfigError, match=r"integer times.*t / 999"), aligner.step(pictures(0), (t * 999).long()):
        pass
    with pytest.raises(ConfigError, match="give uint8 pixels"), aligner.step(pictures(0).float(), t):
        pass
    with pytest.raises(ConfigError, match="no images"), aligner.step(None, t):
        pass
    with pytest.raises(ConfigError, match="4 times for 8 images"), aligner.step(pictures(0), t[:4]):
        pass
    with aligner.step(pictures(0), t):
        model(x, t)
    with pytest.raises(ConfigError, match=r"add aligner\.loss\(\)"):
        aligner.update()


# -- two processes ----------------------------------------------------------------------------------------------------


class Both(nn.Module):
    def __init__(self, model: nn.Module, aligner: Aligner) -> None:
        super().__init__()
        self.model, self.aligner = model, aligner

    def forward(self, images: Tensor, draws: Any) -> Tensor:
        with self.aligner.step(images, draws.uniforms):
            loss = denoise(self.model, to_float(images), draws)
        return loss + self.aligner.loss()


def _train(rank: int, wrap_both: bool) -> dict[str, Tensor]:
    model = trunk()
    torch.manual_seed(rank)
    aligner = make(model, objective=config("vrpo", warmup=0.0), budget=1000)
    both = Both(model, aligner)
    step_module: Any = both
    if dist.is_initialized():
        if wrap_both:
            step_module = DistributedDataParallel(both)
        else:
            both.model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([*model.parameters(), *aligner.parameters()], lr=0.05)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2) if dist.is_initialized() else slice(0, BATCH)
    for step in range(3):
        step_module(pictures(step)[half], draw(step).part(half.start, half.stop)).backward()
        if not wrap_both:
            aligner.average_gradients()
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()
    state = {**model.state_dict(), **{f"aligner.{name}": value for name, value in aligner.state_dict().items()}}
    return {name: value.detach().clone() for name, value in state.items()}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({wrap: _train(rank, wrap) for wrap in (False, True)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    alone = _train(0, False)
    for rank in range(2):
        for state in torch.load(tmp_path / f"{rank}.pt").values():
            for name, value in alone.items():
                assert torch.allclose(state[name].double(), value.double(), rtol=2e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("align", "sentence"),
    [
        ({"objective": "reg"}, "align.token is one more token"),
        ({"objective": "repi"}, "align.scaffold acts on keys and values"),
        ({"objective": "vrpo", "scaffold": {"supply": "advantage"}}, "align.scaffold acts on keys and values"),
    ],
)
def test_what_acts_inside_blocks_is_refused(align: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Aligner(
            trunk(), "blocks.1", hidden_size=32, tokens=16, encoders=Patches(), budget=8,
            objective=AlignConfig.model_validate(align),
        )  # fmt: skip
