"""The transformer's sizes, initialisation, taps, checkpointing and compilation."""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrpo.errors import ConfigError
from vrpo.models.taps import Taps
from vrpo.models.transformer import (
    MODEL_NAMES,
    DiffusionTransformer,
    build_transformer,
    parameter_count,
    parse_model_name,
)


def small(**changes: Any) -> DiffusionTransformer:
    config: dict[str, Any] = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32}
    config |= {"depth": 3, "num_heads": 4, "num_classes": 5}
    return DiffusionTransformer(**(config | changes))


def randomised(**changes: Any) -> DiffusionTransformer:
    """A model whose every layer matters; the published initialisation hides most of them behind zeros."""
    model = small(**changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.rand(batch), torch.randint(0, 6, (batch,))


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(*args, **kwargs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        # Embedders, blocks and final layer added up by hand from the paper's definition, in `by_hand`.
        ("SiT-S/2", 33),
        ("SiT-B/2", 130),
        ("SiT-L/2", 458),
        ("SiT-XL/2", 675),
        ("DiT-XL/2", 675),
    ],
)
def test_published_parameter_counts(name: str, exact: int) -> None:
    with torch.device("meta"):
        model = build_transformer(name, input_size=32, in_channels=4, num_classes=1000)
    count = parameter_count(model)
    assert round(count / 1e6) == exact
    d, depth, out = model.hidden_size, model.depth, 16 * (2 if name.startswith("DiT") else 1)
    per_block = (3 * d + 1) * d + 2 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d + (d + 1) * 6 * d
    by_hand = 17 * d + 257 * d + (d + 1) * d + 1001 * d + depth * per_block + (d + 1) * 2 * d + (d + 1) * out
    assert count == by_hand


def test_published_initialisation() -> None:
    model = build_transformer("SiT-N/2", input_size=8, in_channels=3, num_classes=10, qk_norm=True)
    state = dict(model.named_parameters())
    zero = {name for name in state if "modulation" in name or name.startswith("final.linear")}
    normal = {"time_embedding.expand.weight", "time_embedding.output.weight", "label_embedding.table.weight"}
    for name, parameter in state.items():
        if name in zero:
            assert not parameter.any(), name
        elif "_norm." in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif name in normal:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert parameter.abs().max() > 0.05, name
        else:
            weight = parameter.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))
            assert bound * 0.95 < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06), name


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_initial_output_is_exactly_zero(kind: str) -> None:
    x, t, labels = inputs()
    assert not small(kind=kind)(x, t, labels).any()


def test_a_seed_fixes_the_weights_and_meta_models_can_be_initialised_later() -> None:
    first = small()
    with torch.device("meta"):
        second = small()
    second.to_empty(device="cpu")
    for model in (first, second):
        torch.manual_seed(4)
        model.initialise()
    assert torch.equal(first.position_table, second.position_table)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("kind", "learn_sigma", "channels"),
    [("SiT", False, 3), ("SiT", True, 3), ("DiT", False, 3), ("DiT", True, 6)],
)
def test_output_channels(kind: str, learn_sigma: bool, channels: int) -> None:
    model = randomised(kind=kind, learn_sigma=learn_sigma)
    x, t, labels = inputs()
    output = model(x, t, labels)
    assert output.shape == (2, channels, 8, 8)
    assert model.out_channels == channels
    # A SiT's dropped half is the second half of what the same weights give as a DiT.
    other = DiffusionTransformer(**model.config | {"kind": "DiT"})
    other.load_state_dict(model.state_dict())
    assert torch.equal(output, other(x, t, labels)[:, :channels])


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_a_patch_only_sees_itself_when_attention_is_shut(patch_size: int) -> None:
    model = randomised(patch_size=patch_size)
    for block in model.blocks:
        nn.init.zeros_(block.attention.output.weight)
    x, t, labels = inputs(1)
    changed = x.clone()
    changed[..., :patch_size, 8 - patch_size :] += 1
    difference = (model(changed, t, labels) - model(x, t, labels)).abs().sum(1)[0]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:patch_size, 8 - patch_size :] = True
    assert torch.equal(difference > 0, inside)


def test_null_class_is_the_default_label_and_differs_from_every_class() -> None:
    model = randomised()
    x, t, _ = inputs(1)
    null = model(x, t, torch.tensor([5]))
    assert torch.equal(model(x, t), null)
    assert all(not torch.allclose(model(x, t, torch.tensor([c])), null) for c in range(5))


def test_unconditional_model_has_no_label_table() -> None:
    model = randomised(num_classes=0)
    x, t, labels = inputs()
    assert model(x, t).shape == x.shape
    assert not any("label" in name for name in model.state_dict())
    with pytest.raises(ConfigError, match="takes no labels"):
        model(x, t, labels)


def test_config_reproduces_the_model() -> None:
    model = randomised(num_classes=0, learn_sigma=True, qk_norm=True, kind="DiT", mlp_ratio=2.0)
    again = DiffusionTransformer(**model.config)
    again.load_state_dict(model.state_dict())
    x, t, _ = inputs()
    assert torch.equal(again(x, t), model(x, t))
    assert again.config == model.config


def test_position_table_is_fixed_and_not_saved() -> None:
    model = small()
    assert "position_table" not in model.state_dict()
    assert "position_table" not in dict(model.named_parameters())
    assert model.position_table.shape == (1, 16, 32)


def test_identity_taps_leave_the_output_bit_identical() -> None:
    model = randomised(qk_norm=True)
    args = inputs()
    taps = Taps(
        tokens={d: lambda h: h for d in (1, 2, 3)},
        attention={d: lambda q, k, v: (q, k, v) for d in (1, 2, 3)},
    )
    assert torch.equal(model(*args), model(*args, taps=taps))


def test_taps_run_in_order_with_the_right_tensors() -> None:
    model = randomised()
    args = inputs()
    calls: list[tuple[str, int]] = []
    seen: dict[int, Tensor] = {}

    def attention(depth: int) -> Any:
        def tap(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            calls.append(("attention", depth))
            assert q.shape == k.shape == v.shape == (2, 4, 16, 8)
            return q, k, v

        return tap

    def tokens(depth: int) -> Any:
        def tap(h: Tensor) -> Tensor:
            calls.append(("tokens", depth))
            seen[depth] = h
            return h

        return tap

    model(*args, taps=Taps({d: tokens(d) for d in (1, 2, 3)}, {d: attention(d) for d in (1, 2, 3)}))
    assert calls == [(kind, d) for d in (1, 2, 3) for kind in ("attention", "tokens")]
    # The tap after block 3 sees what block 3 made of what the tap after block 2 handed on.
    condition = model.time_embedding(args[1]) + model.label_embedding(args[2])
    assert torch.equal(model.blocks[2](seen[2], condition), seen[3])


def test_the_next_block_reads_what_a_tap_returns() -> None:
    model = randomised()
    x, t, labels = inputs()
    fixed = torch.randn(2, 16, 32)
    output = model(x, t, labels, taps=Taps({2: lambda h: fixed}))
    assert torch.equal(model(x + 1, t, labels, taps=Taps({2: lambda h: fixed})), output)
    # Not a shift: the norms above would take it out.
    assert not torch.allclose(model(x, t, labels, taps=Taps({2: lambda h: fixed.flip(-1)})), output, atol=1e-2)


def test_checkpointing_gives_identical_gradients_and_calls_taps_once() -> None:
    model = randomised(qk_norm=True)
    args = inputs()
    calls = []

    def tap(h: Tensor) -> Tensor:
        calls.append("tokens")
        return h * 1.5

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append("attention")
        return q * 2, k, v

    taps = Taps({2: tap}, {3: attention})
    plain = gradients(model, *args, taps=taps)
    assert calls == ["tokens", "attention"]
    model.checkpoint_blocks = True
    recomputed = gradients(model, *args, taps=taps)
    assert calls == ["tokens", "attention"] * 2
    assert plain.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_checkpointing_keeps_fewer_activations() -> None:
    args = inputs(4)

    def saved_bytes(model: nn.Module) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*args)
        return sum(kept.values())

    model = randomised()
    plain = saved_bytes(model)
    model.checkpoint_blocks = True
    assert saved_bytes(model) < plain / 2


def test_blocks_share_one_compiled_graph_and_tapped_blocks_run_without_it() -> None:
    graphs: list[torch.fx.GraphModule] = []
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)

        def run(*args: Tensor) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    torch._dynamo.reset()
    model = randomised()
    args = inputs()
    expected = model(*args)
    expected_gradients = gradients(model, *args)
    model.compile_blocks(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(*args), expected)
    assert (len(graphs), len(runs)) == (1, 3)
    hooked: list[nn.Module] = []
    model.blocks[1].register_forward_pre_hook(lambda module, _: hooked.append(module))
    taps = Taps({1: lambda h: h}, {2: lambda q, k, v: (q, k, v)})
    runs.clear()
    torch.testing.assert_close(model(*args, taps=taps), expected)
    assert len(runs) == 2
    assert hooked == [model.blocks[1]]
    model.checkpoint_blocks = True
    for name, gradient in gradients(model, *args).items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    # A copy, such as an EMA model, is an ordinary model again, with the same names.
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys() == small().state_dict().keys()


def test_compiled_backward_gives_the_same_gradients() -> None:
    torch._dynamo.reset()
    model = randomised()
    args = inputs()
    expected = gradients(model, *args)
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(model, *args).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile generates C++ and there is no g++")
def test_generated_code_gives_the_same_output() -> None:
    torch._dynamo.reset()
    model = randomised(depth=1)
    args = inputs()
    with torch.no_grad():
        expected = model(*args)
        model.compile_blocks(fullgraph=True)
        torch.testing.assert_close(model(*args), expected)


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    model = randomised(qk_norm=True)
    args = inputs()
    dtypes: list[torch.dtype] = []

    def tokens(h: Tensor) -> Tensor:
        dtypes.append(h.dtype)
        return h

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtypes.extend((q.dtype, k.dtype, v.dtype))
        return q, k, v

    with torch.autocast("cpu", torch.bfloat16):
        output = model(*args, taps=Taps({2: tokens}, {2: attention}))
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32]
    torch.testing.assert_close(output.float(), model(*args), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("SiT-S/2", ("SiT", "S", 2)), ("DiT-XL/8", ("DiT", "XL", 8)), ("sit-ti/4", ("SiT", "Ti", 4))],
)
def test_names_are_parsed(name: str, parts: tuple[str, str, int]) -> None:
    assert parse_model_name(name) == parts


def test_every_name_builds_as_its_kind_and_size() -> None:
    for name in MODEL_NAMES:
        with torch.device("meta"):
            model = build_transformer(name, input_size=16, in_channels=3, num_classes=2)
        kind, _, patch_size = parse_model_name(name)
        assert (model.kind, model.patch_size, model.learn_sigma) == (kind, patch_size, kind == "DiT")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SiT-M/2", "did you mean 'SiT-"),
        ("sit-xl2", "'SiT-XL/2'"),
        ("SiT-S/3", "'SiT-S/"),
        ("resnet50", "look like"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model_name(name)
    message = str(caught.value)
    assert f"'{name}'" in message
    assert hint in message
    assert "\n" not in message


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"30 x 30 .* patches of 4: use a size such as 28, or a patch size of 1 or 2"):
        small(input_size=30, patch_size=4)
    with pytest.raises(ConfigError, match="multiple of 4 and of the number of heads"):
        small(hidden_size=32, num_heads=5)
