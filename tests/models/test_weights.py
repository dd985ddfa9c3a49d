"""Published weights give published outputs, checked against a second implementation and against diffusers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError
from vrpo.models.transformer import DiffusionTransformer
from vrpo.models.weights import (
    from_published,
    load_published,
    published_name,
    read_tensors,
    repa_projectors,
    save_published,
    to_published,
)

DEPTH, HEADS, WIDTH, PATCH, CLASSES, TOKEN = 3, 4, 32, 2, 5, 24


def build(source: str, **changes: Any) -> DiffusionTransformer:
    config: dict[str, Any] = {"input_size": 8, "patch_size": PATCH, "in_channels": 3, "hidden_size": WIDTH}
    config |= {"depth": DEPTH, "num_heads": HEADS}
    own = {"dit": ("DiT", True, False), "sit": ("SiT", True, False)}.get(source, ("SiT", False, True))
    config["token_width"] = TOKEN if source == "reg" else 0
    config |= dict(zip(("kind", "learn_sigma", "qk_norm"), own, strict=True)) | {"num_classes": CLASSES}
    return DiffusionTransformer(**(config | changes)).double()


def published_weights(source: str) -> dict[str, Tensor]:
    """Random float64 weights under the names and shapes of the published models, written down again."""
    repa = source in ("repa", "reg")
    channels = 3 if repa else 6
    layers = {
        "x_embedder.proj": (WIDTH, 3, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH * PATCH * channels, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
        if repa:
            layers |= {f"blocks.{i}.attn.{n}": (WIDTH // HEADS,) for n in ("q_norm", "k_norm")}
    if source == "reg":
        layers |= {"cls_projectors2": (WIDTH, TOKEN), "wg_norm": (WIDTH,), "final_layer.linear_cls": (TOKEN, WIDTH)}
    weights = {}
    for name, shape in layers.items():
        weights[f"{name}.weight"] = 0.2 * torch.randn(shape, dtype=torch.float64)
        weights[f"{name}.bias"] = 0.2 * torch.randn(shape[0], dtype=torch.float64)
    weights["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH, dtype=torch.float64)
    weights["pos_embed"] = sine_table(WIDTH, 4)[None].float().double()
    if source == "reg":
        weights["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH).double(), weights["pos_embed"]], 1)
    if repa:
        weights["projectors.0.0.weight"] = torch.randn(64, WIDTH, dtype=torch.float64)
        weights["projectors.0.0.bias"] = torch.randn(64, dtype=torch.float64)
    return weights


def sine_table(width: int, grid: int) -> Tensor:
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows = []
    for row in range(grid):
        for column in range(grid):
            parts = [(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()]
            rows.append(torch.cat(parts))
    return torch.stack(rows)


def published_forward(
    w: Mapping[str, Tensor], x: Tensor, t: Tensor, y: Tensor, token: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The DiT of arXiv 2212.09748 in explicit float64 arithmetic, on published parameter names.

    With REG's ``token`` (arXiv 2507.01467) in the first place, and its prediction beside the image's.
    """

    def linear(name: str, z: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", z, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def silu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    def normalise(z: Tensor, eps: float) -> Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)

    def gelu(z: Tensor) -> Tensor:
        return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))

    b, _, side, _ = x.shape
    grid, p = side // PATCH, PATCH
    kernel = w["x_embedder.proj.weight"]
    cells = x.reshape(b, -1, grid, p, grid, p)
    tokens = torch.einsum("bcipjq,dcpq->bijd", cells, kernel).reshape(b, grid * grid, WIDTH)
    tokens = tokens + w["x_embedder.proj.bias"]
    if token is not None:
        first = normalise(linear("cls_projectors2", token), 1e-6) * w["wg_norm.weight"] + w["wg_norm.bias"]
        tokens = torch.cat([first[:, None], tokens], dim=1)
    tokens = tokens + w["pos_embed"]
    # The published code takes its frequencies in float32.
    freqs = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128, dtype=torch.float32) / 128).double()
    phase = t[:, None] * freqs
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([phase.cos(), phase.sin()], 1))))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        mod = linear(f"{block}.adaLN_modulation.1", silu(c))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.split(WIDTH, dim=-1)
        qkv = linear(f"{block}.attn.qkv", normalise(tokens, 1e-6) * (1 + scale1) + shift1)
        heads = []
        for h in range(HEADS):
            d = WIDTH // HEADS
            q, k, v = (qkv[..., s * WIDTH + h * d : s * WIDTH + (h + 1) * d] for s in range(3))
            if f"{block}.attn.q_norm.weight" in w:
                q = normalise(q, 1e-5) * w[f"{block}.attn.q_norm.weight"] + w[f"{block}.attn.q_norm.bias"]
                k = normalise(k, 1e-5) * w[f"{block}.attn.k_norm.weight"] + w[f"{block}.attn.k_norm.bias"]
            scores = torch.exp(torch.einsum("bnd,bmd->bnm", q, k) / d**0.5)
            heads.append(torch.einsum("bnm,bmd->bnd", scores / scores.sum(-1, keepdim=True), v))
        tokens = tokens + gate1 * linear(f"{block}.attn.proj", torch.cat(heads, -1))
        z = normalise(tokens, 1e-6) * (1 + scale2) + shift2
        tokens = tokens + gate2 * linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", z)))
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].split(WIDTH, dim=-1)
    last = normalise(tokens, 1e-6) * (1 + scale) + shift
    predicted = None
    if token is not None:
        predicted, last = linear("final_layer.linear_cls", last[:, 0]), last[:, 1:]
    patches = linear("final_layer.linear", last)
    image = torch.einsum("bijpqc->bcipjq", patches.reshape(b, grid, grid, p, p, -1))
    return image.reshape(b, -1, side, side), predicted


def inputs(source: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    times = {"dit": [0.0, 1.0, 500.0, 999.0]}.get(source, [0.0, 0.3, 0.81, 1.0])
    return x, torch.tensor(times, dtype=torch.float64), torch.tensor([0, 3, CLASSES, 1])


@pytest.mark.parametrize("source", ["dit", "repa"])
def test_published_weights_give_the_published_output(source: str) -> None:
    weights, model = published_weights(source), build(source)
    model.load_state_dict(from_published(weights, model, source))
    x, t, y = inputs(source)
    expected = published_forward(weights, x, t, y)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-10)


def test_reg_s_weights_give_the_published_image_and_token() -> None:
    weights, model = published_weights("reg"), build("reg")
    model.load_state_dict(from_published(weights, model, "reg"))
    x, t, y = inputs("reg")
    token = torch.randn(4, TOKEN, dtype=torch.float64)
    for found, expected in zip(model(x, t, y, token=token), published_forward(weights, x, t, y, token), strict=True):
        assert expected is not None
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    again = to_published(model, "reg")
    assert all(torch.equal(again[name], value) for name, value in weights.items() if "projectors." not in name)


def test_original_sit_is_the_same_function_with_time_and_velocity_reversed() -> None:
    weights, model = published_weights("sit"), build("sit")
    model.load_state_dict(from_published(weights, model, "sit"))
    x, t, y = inputs("sit")
    published_velocity = published_forward(weights, x, 1 - t, y)[0][:, :3]
    torch.testing.assert_close(model(x, t, y), -published_velocity, rtol=0, atol=1e-10)
    assert not torch.allclose(model(x, t, y), -published_forward(weights, x, t, y)[0][:, :3], atol=1e-3)


def test_original_sit_samples_the_same_images() -> None:
    weights, model = published_weights("sit"), build("sit")
    model.load_state_dict(from_published(weights, model, "sit"))
    noise, _, y = inputs("sit")
    theirs, ours, steps = noise, noise, 8
    for step in range(steps):
        time = torch.full((4,), step / steps, dtype=torch.float64)
        theirs = theirs + published_forward(weights, theirs, time, y)[0][:, :3] / steps
        ours = ours - model(ours, 1 - time, y) / steps
    assert (ours - noise).std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_official_dit_equals_diffusers() -> None:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    theirs = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=3,
        out_channels=6,
        num_layers=DEPTH,
        sample_size=8,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    theirs = theirs.double().eval()
    w = published_weights("dit")
    state = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    state["proj_out_2"] = "final_layer.linear"
    for i in range(DEPTH):
        here, there = f"transformer_blocks.{i}", f"blocks.{i}"
        state |= {
            f"{here}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{here}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{here}.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
            f"{here}.norm1.linear": f"{there}.adaLN_modulation.1",
            f"{here}.attn1.to_out.0": f"{there}.attn.proj",
            f"{here}.ff.net.0.proj": f"{there}.mlp.fc1",
            f"{here}.ff.net.2": f"{there}.mlp.fc2",
        }
        for s, part in enumerate(("to_q", "to_k", "to_v")):
            for leaf in ("weight", "bias"):
                part_of_qkv = w[f"{there}.attn.qkv.{leaf}"].chunk(3)[s]
                theirs.get_parameter(f"{here}.attn1.{part}.{leaf}").data.copy_(part_of_qkv)
        # Diffusers spaces these frequencies over 127 steps, the official code over 128.
        embedder = theirs.get_submodule(f"{here}.norm1.emb")
        embedder.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    for here, there in state.items():
        for leaf, parameter in theirs.get_submodule(here).named_parameters():
            parameter.data.copy_(w[f"{there}.{leaf}"])

    model = build("dit")
    model.load_state_dict(from_published(w, model, "dit"))
    x, t, y = inputs("dit")
    # Diffusers computes the phases in float32, so it is compared at float32's rounding of them.
    with torch.no_grad():
        expected = theirs(x, timestep=t.float(), class_labels=y).sample
        torch.testing.assert_close(model(x, t.float(), y), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("source", ["dit", "sit", "repa", "reg"])
def test_round_trip_is_exact_in_names_and_near_exact_in_values(source: str) -> None:
    weights, model = published_weights(source), build(source)
    model.load_state_dict(from_published(weights, model, source))
    again = to_published(model, source, repa_projectors(weights))
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-13, msg=name)
    # Only the layers that carry time's direction may change at all.
    changed = {name for name, value in weights.items() if not torch.equal(again[name], value)}
    assert changed <= ({"t_embedder.mlp.0.weight"} if source == "sit" else set())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("source", ["dit", "sit", "repa", "reg"])
def test_files_round_trip(source: str, suffix: str, tmp_path: Path) -> None:
    model = build(source).float()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    path = tmp_path / f"weights{suffix}"
    save_published(model, path, source)
    again = build(source).float()
    load_published(again, path, source)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_every_parameter_has_its_own_published_name() -> None:
    names = list(build("repa").state_dict())
    assert {published_name(name) for name in names} == {
        name for name in published_weights("repa") if name != "pos_embed" and not name.startswith("projectors.")
    }
    assert len({published_name(name) for name in names}) == len(names)


def test_training_checkpoints_are_read_with_their_command_line(tmp_path: Path) -> None:
    weights = published_weights("repa")
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    arguments = argparse.Namespace(model="SiT-XL/2", steps=3, enc_type=["dinov2-vit-b"])
    torch.save({"model": zeros, "ema": weights, "opt": {}, "args": arguments, "steps": 3}, tmp_path / "a.pt")
    read = read_tensors(tmp_path / "a.pt")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_early_repa_files_with_decoder_blocks_are_read() -> None:
    weights = published_weights("repa")
    legacy = {}
    for name, value in weights.items():
        name = name.replace("blocks.1.", "decoder_blocks.0.").replace("blocks.2.", "decoder_blocks.1.")
        legacy[name] = value
    model = build("repa")
    state, expected = from_published(legacy, model, "repa"), from_published(weights, model, "repa")
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    torch.save({"model": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="never executed"):
        read_tensors(tmp_path / "bad.pt")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
def test_damaged_missing_and_empty_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="no weights file"):
        read_tensors(path)
    for content in (b"", b"not weights at all", b"PK\x03\x04 torn"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save({"steps": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="no named tensors"):
        read_tensors(tmp_path / "empty.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        save_published(build("dit"), path, "dit")
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"damaged|not a whole"):
            read_tensors(path)


def test_another_architecture_names_the_first_differing_shape() -> None:
    weights = published_weights("dit")
    with pytest.raises(CheckpointError, match=r"'x_embedder.proj.weight' has shape \(32, 3, 2, 2\) in the file"):
        from_published(weights, build("dit", hidden_size=64), "dit")
    with pytest.raises(CheckpointError, match=r"'pos_embed' has shape \(1, 16, 32\)"):
        from_published(weights, build("dit", input_size=16), "dit")
    with pytest.raises(CheckpointError, match=r"lack 10 of .* first 'blocks\.3\.attn"):
        from_published(weights, build("dit", depth=4), "dit")
    with pytest.raises(CheckpointError, match=r"have 10 tensors that the model has not, first 'blocks.2"):
        from_published(weights, build("dit", depth=2), "dit")
    with pytest.raises(CheckpointError, match=r"first 'y_embedder\.embedding_table\.weight'"):
        from_published(weights, build("dit", num_classes=0), "dit")


def test_a_learnt_or_foreign_position_table_is_refused() -> None:
    weights = published_weights("dit")
    rounded = weights | {"pos_embed": weights["pos_embed"].bfloat16()}
    from_published(rounded, build("dit"), "dit")
    swapped = weights["pos_embed"].reshape(1, 4, 4, WIDTH).transpose(1, 2).reshape(1, 16, WIDTH)
    with pytest.raises(CheckpointError, match="position table"):
        from_published(weights | {"pos_embed": swapped}, build("dit"), "dit")
    with pytest.raises(CheckpointError, match="position table"):
        from_published(weights | {"pos_embed": weights["pos_embed"] * torch.nan}, build("dit"), "dit")


def test_models_that_a_source_cannot_express_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="belong to a DiT model, and this is a SiT"):
        to_published(build("sit"), "dit")
    with pytest.raises(CheckpointError, match="did you mean 'repa'"):
        to_published(build("sit"), "repaa")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="unconditional"):
        to_published(build("sit", num_classes=0), "sit")
    with pytest.raises(CheckpointError, match="QK normalisation"):
        to_published(build("sit", qk_norm=True), "sit")
    with pytest.raises(CheckpointError, match="learned variance"):
        to_published(build("repa", learn_sigma=True), "repa")
    with pytest.raises(CheckpointError, match="has a representation token"):
        to_published(build("reg"), "repa")
    with pytest.raises(CheckpointError, match="has no representation token"):
        from_published(published_weights("reg"), build("repa"), "reg")
    with pytest.raises(CheckpointError, match="end its name in"):
        save_published(build("dit"), tmp_path / "weights.npz", "dit")
