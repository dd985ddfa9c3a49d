"""Layers against timm's and diffusers' own, which were written independently."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.models.layers import (
    Attention,
    Block,
    FeedForward,
    PatchEmbedding,
    TimeEmbedding,
    position_table,
    time_features,
    time_frequencies,
)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_timm(qk_norm: bool) -> None:
    from timm.layers import Attention as TimmAttention

    ours = Attention(32, 4, qk_norm)
    theirs = TimmAttention(32, num_heads=4, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    theirs.fused_attn = False
    randomise(ours)
    names = {"q_norm": "query_norm", "k_norm": "key_norm", "proj": "output", "qkv": "qkv"}
    state = ours.state_dict()
    theirs.load_state_dict({k: state[f"{names[k.split('.')[0]]}.{k.split('.')[1]}"] for k in theirs.state_dict()})
    tokens = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-12)


def test_patch_embedding_and_feed_forward_equal_timm() -> None:
    from timm.layers import Mlp, PatchEmbed

    embedding, timm_embedding = PatchEmbedding(3, 4, 32), PatchEmbed(16, 4, 3, 32)
    timm_embedding.proj.load_state_dict(embedding.projection.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(embedding(x), timm_embedding(x), rtol=0, atol=0)

    mlp = FeedForward(32, 64)
    timm_mlp = Mlp(32, 64, act_layer=lambda: nn.GELU(approximate="tanh"))
    timm_mlp.fc1.load_state_dict(mlp.expand.state_dict())
    timm_mlp.fc2.load_state_dict(mlp.output.state_dict())
    tokens = embedding(x)
    torch.testing.assert_close(mlp(tokens), timm_mlp(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(("hidden_size", "grid_size"), [(32, 4), (1152, 16), (16, 1)])
def test_position_table_equals_diffusers(hidden_size: int, grid_size: int) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size, output_type="pt")
    torch.testing.assert_close(position_table(hidden_size, grid_size), theirs, rtol=0, atol=1e-12)


def test_position_table_puts_the_column_first() -> None:
    table = position_table(8, 3)
    row, column, frequencies = 1, 2, (1.0, 1 / 100)
    expected = [function(p * f) for p in (column, row) for function in (math.sin, math.cos) for f in frequencies]
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected), rtol=0, atol=1e-14)


def test_time_features_equal_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1e-3, 0.37, 1.0, 12.0, 999.0], dtype=torch.float32)
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_features(t), theirs, rtol=0, atol=1e-6)
    assert time_features(t).dtype is torch.float32


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_time_features_are_never_computed_below_float32(given: torch.dtype, kept: torch.dtype) -> None:
    t = torch.tensor([0, 1, 3]).to(given)
    features = time_features(t)
    assert features.dtype is kept
    phases = t.double()[:, None] * time_frequencies().double()
    torch.testing.assert_close(features.double(), torch.cat([phases.cos(), phases.sin()], 1), rtol=0, atol=1e-6)


def test_frequencies_fall_from_one_geometrically_towards_a_ten_thousandth() -> None:
    frequencies = time_frequencies().double()
    expected = torch.tensor([10_000 ** (-i / 128) for i in range(128)])
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)


def test_time_embedding_runs_in_half_precision() -> None:
    embedding = TimeEmbedding(32).to(torch.bfloat16)
    exact = TimeEmbedding(32)
    exact.load_state_dict(embedding.state_dict())
    t = torch.rand(4, dtype=torch.float32)
    assert embedding(t).dtype is torch.bfloat16
    torch.testing.assert_close(embedding(t).double(), exact(t), rtol=0.05, atol=0.05)


def test_attention_tap_replaces_queries_keys_and_values() -> None:
    attention = Attention(32, 4, qk_norm=True)
    randomise(attention)
    tokens = torch.randn(2, 9, 32)
    seen: list[Tensor] = []

    def only_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.extend((q, k, v))
        return torch.zeros_like(q), k, v

    output = attention(tokens, only_values)
    q, k, v = seen
    assert q.shape == k.shape == v.shape == (2, 4, 9, 8)
    # Zero queries attend evenly, so every token receives the mean value.
    mean = v.mean(dim=2, keepdim=True).expand_as(v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, attention.output(mean), rtol=0, atol=1e-12)
    # What the tap saw is normalised already: replaying it through softmax gives the untapped output.
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    replayed = attention.output((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(replayed, attention(tokens), rtol=0, atol=1e-12)


def test_block_with_closed_gates_is_the_identity_and_gates_act_separately() -> None:
    block = Block(32, 4, 4.0, qk_norm=False)
    randomise(block)
    tokens, condition = torch.randn(2, 9, 32), torch.randn(2, 32)
    nn.init.zeros_(block.modulation.weight)
    nn.init.zeros_(block.modulation.bias)
    assert torch.equal(block(tokens, condition), tokens)
    # Modulation order: shift, scale, gate of attention, then of the perceptron.
    with torch.no_grad():
        block.modulation.bias[2 * 32 : 3 * 32] = 1
    normed = F.layer_norm(tokens, (32,), eps=1e-6)
    torch.testing.assert_close(block(tokens, condition), tokens + block.attention(normed))
    with torch.no_grad():
        block.modulation.bias.zero_()
        block.modulation.bias[5 * 32 :] = 1
    torch.testing.assert_close(block(tokens, condition), tokens + block.feed_forward(normed))
