"""Keys, values and class tokens against the library's own weights, applied by hand to the layer's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrpo.errors import ConfigError
from vrpo.vision.cache import TokenCache
from vrpo.vision.encoders import Encoder, load_encoder, resample_tokens
from vrpo.vision.timm_encoder import TimmBackbone

WIDTH, GRID = 32, 3


def random_images(count: int, side: int = 48) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def small_timm(
    name: str, *, feature: int | None = None, grid: int = GRID, input_size: int = 48, **over: Any
) -> Encoder:
    """Return an encoder around a two-block network of a timm architecture, with biases that are not zero."""
    import timm

    network = timm.create_model(
        name, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=4, dynamic_img_size=True, **over
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    backbone = TimmBackbone(name, network, feature=feature, weights_hash="random")
    return Encoder(
        backbone,
        grid=grid,
        input_size=input_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
        keys_values=True,
        class_token=True,
    )


def states_before(encoder: Encoder, images: Tensor, module: nn.Module) -> Tensor:
    """Return what ``module`` was given when the encoder looked at ``images``."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.tokens(images)
    hook.remove()
    return seen[0].clone()


@pytest.mark.parametrize("feature", [None, 0])
def test_fused_projection_of_a_vision_transformer_with_registers(feature: int | None) -> None:
    encoder = small_timm("vit_tiny_patch16_224", feature=feature, reg_tokens=3)
    network: Any = encoder.backbone.network
    block = network.blocks[-1 if feature is None else feature]
    images = random_images(2)
    found = encoder.outputs(images)
    states = states_before(encoder, images, block)
    assert states.shape == (2, 1 + 3 + GRID**2, WIDTH)
    _, keys, values = block.attn.qkv(block.norm1(states)).split(WIDTH, dim=-1)
    torch.testing.assert_close(found.keys, keys[:, 4:])
    torch.testing.assert_close(found.values, values[:, 4:])
    assert torch.equal(found.tokens, encoder.tokens(images))
    after = network.norm(block(states))
    torch.testing.assert_close(found.class_token, after[:, 0])
    torch.testing.assert_close(found.tokens, after[:, 4:])
    assert (encoder.key_width, encoder.value_width, encoder.has_attention) == (WIDTH, WIDTH, True)


@pytest.mark.parametrize("name", ["eva_giant_patch14_224", "eva02_tiny_patch14_224"])
def test_biases_beside_the_projection_and_separate_projections(name: str) -> None:
    encoder = small_timm(name, input_size=42)
    block = encoder.backbone.network.blocks[-1]  # type: ignore[union-attr,index]
    attention: Any = block.attn
    images = random_images(2)
    found = encoder.outputs(images)
    states = states_before(encoder, images, attention)
    if attention.qkv is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        _, keys, values = F.linear(states, attention.qkv.weight, bias).split(WIDTH, dim=-1)
        assert attention.v_bias.abs().max() > 0.01
    else:
        keys = F.linear(states, attention.k_proj.weight)
        values = F.linear(states, attention.v_proj.weight, attention.v_proj.bias)
    torch.testing.assert_close(found.keys, keys[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.values, values[:, 1:], atol=1e-5, rtol=1e-4)


def test_transformers_networks(tmp_path: Path) -> None:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    small = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 16, "image_size": 48}
    models: dict[str, tuple[nn.Module, int]] = {
        "dinov2": (Dinov2Model(Dinov2Config(**small)), 1),
        "registers": (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, num_register_tokens=2)), 3),
        "clip": (CLIPVisionModel(CLIPVisionConfig(**small, intermediate_size=64)), 1),
        "siglip": (SiglipVisionModel(SiglipVisionConfig(**small, intermediate_size=64)), 0),
    }
    images = random_images(2)
    for name, (model, prefix) in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        encoder = load_encoder(str(tmp_path / name), grid=GRID, keys_values=True, class_token=True)
        found = encoder.outputs(images)
        linear = {path: part for path, part in encoder.backbone.named_modules() if isinstance(part, nn.Linear)}
        key, value = (
            next(part for path, part in linear.items() if f".1.{which}" in path_of(path, which))
            for which in ("k_proj", "v_proj")
        )
        states = states_before(encoder, images, key)
        torch.testing.assert_close(found.keys, key(states)[:, prefix:])
        torch.testing.assert_close(found.values, value(states)[:, prefix:])
        assert torch.equal(found.tokens, encoder.tokens(images))
        expected = encoder.pooled(images) if prefix else found.tokens.mean(1)
        torch.testing.assert_close(found.class_token, expected)


def path_of(path: str, leaf: str) -> str:
    """Return a layer's path as ``...NUMBER.leaf``, whatever lies between."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f".{numbers[-1]}.{leaf}" if numbers and parts[-1] == leaf else ""


def test_convolutional_tokens_serve_for_keys_values_and_class_token() -> None:
    encoder = load_encoder("mobilenetv2_050", weights="random", grid=2, keys_values=True, class_token=True)
    found = encoder.outputs(random_images(3))
    assert found.keys is found.tokens
    assert found.values is found.tokens
    torch.testing.assert_close(found.class_token, found.tokens.mean(1))
    assert (encoder.key_width, encoder.has_attention) == (encoder.width, False)


def test_what_was_not_asked_for_is_absent_and_changes_no_token() -> None:
    images = random_images(2)
    plain = load_encoder("vit_tiny_patch16_224", weights="random", grid=GRID)
    asked = load_encoder("vit_tiny_patch16_224", weights="random", grid=GRID, keys_values=True)
    found = plain.outputs(images)
    assert (found.keys, found.values, found.class_token) == (None, None, None)
    assert asked.outputs(images).class_token is None
    assert torch.equal(found.tokens, asked.outputs(images).tokens)
    assert not any(module._forward_hooks for module in asked.modules())


def test_keys_are_resampled_to_the_grid_with_the_tokens() -> None:
    torch.manual_seed(3)
    small = small_timm("vit_tiny_patch16_224", grid=2)
    torch.manual_seed(3)
    native = small_timm("vit_tiny_patch16_224", grid=GRID)
    images = random_images(1)
    found, own = small.outputs(images), native.outputs(images)
    assert small.resampled
    torch.testing.assert_close(found.keys, resample_tokens(own.keys, 2))  # type: ignore[arg-type]
    torch.testing.assert_close(found.class_token, own.class_token)


def test_attention_that_cannot_be_read_is_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ConfigError, match=r"Encoder 'vit_tiny_patch16_224' keeps the keys and values .* dinov2-vit-b"):
        small_timm("vit_tiny_patch16_224", block_fn=ParallelScalingBlock)


def test_the_cache_stores_what_the_encoder_was_loaded_for(tmp_path: Path, memory_rows: Any) -> None:
    torch.manual_seed(3)
    encoder = small_timm("vit_tiny_patch16_224")
    rows = memory_rows(random_images(5), None)
    cache = TokenCache(tmp_path, encoder, rows, flips=True).build(batch_size=2)
    order, flipped = np.array([4, 0, 2]), np.array([False, True, False])
    images = torch.where(
        torch.from_numpy(flipped)[:, None, None, None], rows.images[order].flip(-1), rows.images[order]
    )
    expected, found = encoder.outputs(images), cache.split(cache.read(order, flipped))
    for name in ("tokens", "keys", "values", "class_token"):
        torch.testing.assert_close(getattr(found, name).float(), getattr(expected, name), atol=1e-3, rtol=2e-3)
    encoder.class_token = False
    other = TokenCache(tmp_path, encoder, rows, flips=True)
    assert not other.complete
    assert other.folder != cache.folder
    assert set(other.identity["stored"]) == {"tokens", "keys", "values"}  # type: ignore[arg-type]


def test_what_is_made_of_the_tokens_is_not_stored_beside_them(tmp_path: Path, memory_rows: Any) -> None:
    encoder = load_encoder("mobilenetv2_050", weights="random", grid=2, keys_values=True, class_token=True)
    plain = load_encoder("mobilenetv2_050", weights="random", grid=2)
    rows = memory_rows(random_images(3, 16), None)
    cache = TokenCache(tmp_path, plain, rows, flips=False).build()
    assert cache.split(cache.read(np.arange(2)))[1:] == (None, None, None)
    whole = TokenCache(tmp_path, encoder, rows, flips=False)
    assert whole.complete
    found, online = whole.split(whole.read(np.arange(2))), encoder.outputs(rows.images[:2])
    assert found.keys is found.tokens
    assert found.values is found.tokens
    torch.testing.assert_close(found.class_token, online.class_token, atol=1e-3, rtol=1e-3)
