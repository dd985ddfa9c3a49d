"""Tokens are normalised by the network's last layer, through both libraries and of every block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_encoder_families import GRID, TRANSFORMERS, images, timm_folder, transformers_folder
from torch import Tensor

from vrpo.vision.encoders import Encoder, load_encoder

NORMS = {"clip": "post_layernorm", "siglip2": "post_layernorm", "siglip2-naflex": "post_layernorm", "dinov3": "norm"}


def folder_of(path: Path, family: str) -> Path:
    """Write a small network whose last normalisation does what no other does."""
    folder = transformers_folder(path, family)
    file = folder / "model.safetensors"
    state = load_file(file)
    norm = NORMS.get(family, "layernorm")
    names = [name for name in state if name.removeprefix("vision_model.").rsplit(".", 1)[0] == norm]
    assert len(names) == 2
    state |= {name: torch.linspace(0.5, 2, len(state[name])) for name in names}
    save_file(state, file, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def blocks_of(encoder: Encoder, pixels: Tensor) -> list[Tensor]:
    """Return what each block gives, caught at the block itself."""
    network: Any = encoder.backbone.network
    stacks = [module for module in network.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = next(stack for stack in stacks if len(stack) == network.config.num_hidden_layers)
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    encoder.tokens(pixels)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_tokens_of_every_block_are_normalised(family: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "network", family)
    last = load_encoder(str(folder), grid=GRID)
    pixels = images(2, last.input_size)
    network: Any = last.backbone.network
    norm = getattr(network, NORMS.get(family, "layernorm"))
    prefix = last.backbone.prefix
    states = blocks_of(last, pixels)
    with torch.no_grad():
        expected = [norm(block)[:, prefix:] for block in states]
    torch.testing.assert_close(last.tokens(pixels), expected[-1], atol=2e-5, rtol=1e-5)
    for feature, wanted in ((0, expected[0]), (-1, expected[1]), (1, expected[1])):
        encoder = load_encoder(str(folder), grid=GRID, feature=feature, class_token=True)
        found = encoder.outputs(pixels)
        torch.testing.assert_close(found.tokens, wanted, atol=2e-5, rtol=1e-5)
        if prefix:
            with torch.no_grad():
                own = norm(states[feature])[:, 0]
            torch.testing.assert_close(found.class_token, own, atol=2e-5, rtol=1e-5)
    assert last.pooled(pixels).shape == (2, last.width)


def test_clip_is_one_network_through_both_libraries(tmp_path: Path) -> None:
    theirs = folder_of(tmp_path / "transformers", "clip")
    held = load_file(theirs / "model.safetensors")
    state = {name.removeprefix("vision_model."): value for name, value in held.items()}
    config = (theirs / "config.json").read_text()
    assert '"quick_gelu"' in config
    names = {
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        **{f"pre_layrnorm.{kind}": f"norm_pre.{kind}" for kind in ("weight", "bias")},
        **{f"post_layernorm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")},
    }
    parts = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    parts["self_attn.out_proj"] = "attn.proj"
    made = {
        "cls_token": state["embeddings.class_embedding"][None, None],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
    }
    for block in range(2):
        for kind in ("weight", "bias"):
            for one, other in parts.items():
                names[f"encoder.layers.{block}.{one}.{kind}"] = f"blocks.{block}.{other}.{kind}"
            three = [state[f"encoder.layers.{block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(three)
    made |= {other: state[one] for one, other in names.items()}
    ours = timm_folder(tmp_path / "timm", "clip")
    assert set(made) == set(load_file(ours / "model.safetensors"))
    settings = json.loads((ours / "config.json").read_text())
    settings["model_args"]["mlp_ratio"] = 2.0
    (ours / "config.json").write_text(json.dumps(settings))
    save_file({name: value.contiguous() for name, value in made.items()}, ours / "model.safetensors")
    pixels = images(2, 64)
    for feature in (None, 0, -1):
        one, other = (
            load_encoder(str(folder), grid=4, feature=feature, class_token=True).outputs(pixels)
            for folder in (ours, theirs)
        )
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.class_token, other.class_token, atol=1e-4, rtol=1e-4)
    pooled = [load_encoder(str(folder), grid=4).pooled(pixels) for folder in (ours, theirs)]
    torch.testing.assert_close(*pooled, atol=1e-4, rtol=1e-4)
