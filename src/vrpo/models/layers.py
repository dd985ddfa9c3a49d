"""The parts of a diffusion transformer: embedders, adaLN-Zero block, final layer, position table."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.models.taps import AttentionTap

TIME_FREQUENCIES = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale normalised tokens (B, N, D) by one vector an image (B, D)."""
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def time_frequencies(device: torch.device | str | None = None) -> Tensor:
    """Return the angular frequencies of the timestep embedding, shape (128,), falling from 1 towards 1/10000.

    The arithmetic is float32, as published: at t = 999 exact exponents would move the phases by 1e-5.
    """
    half = TIME_FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(-math.log(MAX_PERIOD) * steps / half)


def time_features(t: Tensor) -> Tensor:
    """Return [cos(f t), sin(f t)] for times ``t`` (B,): (B, 256), float32, or float64 for float64 times."""
    dtype = torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else torch.float32
    phases = t.to(dtype)[:, None] * time_frequencies(t.device).to(dtype)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


def position_table(hidden_size: int, grid_size: int) -> Tensor:
    """Return the fixed sin-cos table of a square grid: (grid_size ** 2, hidden_size), float64, row-major.

    The first half of the channels encodes the column and the second half the row (MAE, arXiv 2111.06377,
    whose mesh puts the width first); each half holds its sines before its cosines.
    """
    quarter = hidden_size // 4
    frequencies = 1.0 / MAX_PERIOD ** (np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    halves = []
    for position in (columns, rows):
        phases = position[:, None] * frequencies
        halves += [np.sin(phases), np.cos(phases)]
    return torch.from_numpy(np.concatenate(halves, axis=1))


class PatchEmbedding(nn.Module):
    """Cut an image (B, C, H, W) into square patches and project each to a token: (B, N, D), row-major."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Embed times (B,) as conditioning vectors (B, D): sinusoids, then Linear-SiLU-Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(TIME_FREQUENCIES, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        features = time_features(t).to(self.expand.weight.dtype)
        return self.output(F.silu(self.expand(features)))


class LabelEmbedding(nn.Module):
    """Embed labels (B,) in [0, num_classes] as vectors (B, D); the last row is the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D), optionally with layer-normalised queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.query_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor, tap: AttentionTap | None = None) -> Tensor:
        split = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast the norms answer in float32; attention wants one dtype.
        q, k = self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)
        if tap is not None:
            q, k, v = tap(q, k, v)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.output(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The block's two-layer perceptron with GELU in its tanh form."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, width)
        self.output = nn.Linear(width, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(F.gelu(self.expand(tokens), approximate="tanh"))


class Block(nn.Module):
    """One adaLN-Zero block (arXiv 2212.09748, section 3.2), of tokens (B, N, D) and condition (B, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.attention = Attention(hidden_size, num_heads, qk_norm)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.feed_forward = FeedForward(hidden_size, int(hidden_size * mlp_ratio))
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, tokens: Tensor, condition: Tensor, tap: AttentionTap | None = None) -> Tensor:
        parts = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts
        normed = modulate(self.attention_norm(tokens), shift_attention, scale_attention)
        tokens = tokens + gate_attention.unsqueeze(1) * self.attention(normed, tap)
        normed = modulate(self.feed_forward_norm(tokens), shift_mlp, scale_mlp)
        return tokens + gate_mlp.unsqueeze(1) * self.feed_forward(normed)


class FinalLayer(nn.Module):
    """Project modulated tokens (B, N, D) to the values of their patches, (B, N, patch values)."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.linear(self.modulated(tokens, condition))

    def modulated(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return the tokens (B, N, D) that the linear map reads."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return modulate(self.norm(tokens), shift, scale)


class RepresentationToken(nn.Module):
    """One more token: a noised class token (B, C) on its way in, its predicted velocity on its way out.

    As in REG (arXiv 2507.01467): a linear map and a layer norm in, no position, and the image's own modulation before
    a linear map out.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.output = nn.Linear(hidden_size, width)

    def forward(self, token: Tensor) -> Tensor:
        """Return the token (B, 1, D) that joins those of the patches."""
        return self.norm(self.embedding(token)).unsqueeze(1)
