"""Every family of encoders end to end, on small networks of the real classes built from files on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vrpo.alignment.projector import unit
from vrpo.errors import CheckpointError
from vrpo.files import tensors_hash
from vrpo.vision.encoders import Encoder, load_encoder

GRID, WIDTH = 6, 48
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALF = ([0.5] * 3, [0.5] * 3)

# Architecture in timm, patch, tokens before the patches, statistics. The networks are small, their classes real.
TIMM = {
    "dinov2": ("vit_base_patch14_dinov2", 14, 1, IMAGENET),
    "dinov2-reg": ("vit_base_patch14_reg4_dinov2", 14, 5, IMAGENET),
    "dinov3": ("vit_base_patch16_dinov3", 16, 5, IMAGENET),
    "clip": ("vit_base_patch16_clip_quickgelu_224", 16, 1, OPENAI),
    "siglip2": ("vit_base_patch16_siglip_256", 16, 0, HALF),
    "mae": ("vit_base_patch16_224", 16, 1, IMAGENET),
    "ijepa": ("vit_huge_patch14_gap_224", 14, 0, IMAGENET),
}
# Classes in transformers: model, configuration, image processor; then as above. The statistics are the processors'.
TRANSFORMERS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", "BitImageProcessor", 14, 1, IMAGENET),
    "dinov2-reg": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "BitImageProcessor", 14, 5, IMAGENET),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", "DINOv3ViTImageProcessor", 16, 5, IMAGENET),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", "CLIPImageProcessor", 16, 1, OPENAI),
    "siglip2": ("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessor", 16, 0, HALF),
    "siglip2-naflex": ("Siglip2VisionModel", "Siglip2VisionConfig", "Siglip2ImageProcessor", 16, 0, HALF),
    "mae": ("ViTMAEModel", "ViTMAEConfig", "ViTImageProcessor", 16, 1, IMAGENET),
    "ijepa": ("IJepaModel", "IJepaConfig", "ViTImageProcessor", 14, 0, IMAGENET),
}


def images(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def normalised(pixels: Tensor, statistics: tuple[list[float], list[float]]) -> Tensor:
    mean, std = (np.array(values)[:, None, None] for values in statistics)
    return torch.from_numpy((pixels.numpy() / 255 - mean) / std).float()


def timm_folder(folder: Path, family: str) -> Path:
    import timm

    architecture, patch, _, (mean, std) = TIMM[family]
    arguments = {"embed_dim": WIDTH, "depth": 2, "num_heads": 3, "img_size": 4 * patch}
    torch.manual_seed(3)
    network = timm.create_model(architecture, num_classes=0, **arguments)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    settings = {"input_size": [3, 4 * patch, 4 * patch], "mean": mean, "std": std, "classifier": "head"}
    text = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def transformers_folder(folder: Path, family: str) -> Path:
    import transformers

    model, config, processor, patch, prefix, (mean, std) = TRANSFORMERS[family]
    sizes: dict[str, Any] = {"num_patches": 16} if family == "siglip2-naflex" else {"image_size": 4 * patch}
    registers = {"num_register_tokens": 4} if prefix == 5 else {}
    settings = getattr(transformers, config)(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        patch_size=patch,
        **sizes,
        **registers,
    )
    torch.manual_seed(3)
    getattr(transformers, model)(settings).save_pretrained(folder)
    getattr(transformers, processor)(image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


KINDS = [("timm", family) for family in TIMM] + [("transformers", family) for family in TRANSFORMERS]
every_family = pytest.mark.parametrize("kind", KINDS, ids="-".join)
# Of MoCo-v3 there are only its training's checkpoints, of one size.
CONVERTED = ("checkpoint", "mocov3-vit-s")


@pytest.fixture(scope="module")
def load(
    tmp_path_factory: pytest.TempPathFactory, mocov3: tuple[Path, torch.nn.Module]
) -> Callable[[tuple[str, str]], tuple[Encoder, Path]]:
    """The encoder of a library's family and its folder, each made once."""
    made: dict[tuple[str, str], tuple[Encoder, Path]] = {}

    def loaded(kind: tuple[str, str]) -> tuple[Encoder, Path]:
        if kind == CONVERTED:
            made[kind] = load_encoder(kind[1], weights=mocov3[0], grid=GRID), mocov3[0]
        if kind not in made:
            library, family = kind
            folder = tmp_path_factory.mktemp("encoders") / "-".join(kind)
            make = timm_folder if library == "timm" else transformers_folder
            made[kind] = load_encoder(str(make(folder, family)), grid=GRID), folder
        return made[kind]

    return loaded


def described(kind: tuple[str, str]) -> tuple[int, int, tuple[list[float], list[float]]]:
    """Return patch, tokens before the patches, and statistics."""
    library, family = kind
    return (TIMM if library == "timm" else TRANSFORMERS)[family][-3:]


@every_family
def test_tokens_are_the_library_s_own(kind, load) -> None:
    encoder, folder = load(kind)
    patch, prefix, statistics = described(kind)
    assert (encoder.family, encoder.width, encoder.resampled) == ("vit", WIDTH, False)
    assert encoder.input_size == patch * GRID
    pixels = images(2, patch * GRID)
    tokens = encoder.tokens(pixels)
    expected = library_tokens(kind, folder, normalised(pixels, statistics))[:, prefix:]
    assert tokens.shape == (2, GRID * GRID, WIDTH)
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=1e-5)
    norms = unit(tokens).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert torch.equal(encoder.tokens(pixels), tokens)


@torch.no_grad()
def library_tokens(kind: tuple[str, str], folder: Path, prepared: Tensor) -> Tensor:
    """Return every token of the library's own network, called as its documentation says."""
    library, family = kind
    if library == "timm":
        import timm

        network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True)
        return network.eval().forward_features(prepared)
    import transformers

    model = getattr(transformers, TRANSFORMERS[family][0])
    if family == "mae":
        noise = torch.linspace(0, 1, GRID * GRID).expand(len(prepared), -1)
        network = model.from_pretrained(folder, mask_ratio=0.0).eval()
        return network(prepared, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    network = model.from_pretrained(folder).eval()
    if family == "siglip2-naflex":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        patches = torch.stack([convert_image_to_patches(image, 16) for image in prepared])
        mask = torch.ones(patches.shape[:2], dtype=torch.int64)
        return network(patches, mask, torch.tensor([[GRID, GRID]] * len(prepared))).last_hidden_state
    own = {} if family.startswith("dino") else {"interpolate_pos_encoding": True}
    states = network(prepared, **own).last_hidden_state
    # The library normalises CLIP's class token alone.
    return getattr(network, "vision_model", network).post_layernorm(states) if family == "clip" else states


@pytest.mark.parametrize("kind", [*KINDS, CONVERTED], ids="-".join)
def test_a_quadrant_moves_its_own_tokens_most(kind, load) -> None:
    encoder, _ = load(kind)
    pixels = images(1, 64)
    before = encoder.tokens(pixels)
    for row in (0, 1):
        for column in (0, 1):
            changed = pixels.clone()
            place = (..., slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
            changed[place] = 255 - changed[place]
            moved = (encoder.tokens(changed) - before).norm(dim=-1)
            by_quadrant = moved.view(2, GRID // 2, 2, GRID // 2).mean(dim=(1, 3))
            assert by_quadrant.argmax().item() == 2 * row + column


@pytest.mark.parametrize("family", [family for family in TRANSFORMERS if family != "siglip2-naflex"])
def test_normalisation_is_that_of_the_processor(family, load) -> None:
    from transformers import AutoImageProcessor

    encoder, folder = load(("transformers", family))
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = images(2, encoder.input_size)
    prepared = processor(list(pixels), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder._prepare(pixels), prepared, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", TIMM)
def test_normalisation_is_that_of_timm_s_transform(family, load) -> None:
    import timm
    from PIL import Image

    encoder, _ = load(("timm", family))
    settings = timm.data.resolve_model_data_config(encoder.backbone.network)
    side = encoder.input_size
    transform = timm.data.create_transform(**{**settings, "input_size": (3, side, side), "crop_pct": 1.0})
    pixels = images(1, side)
    expected = transform(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))
    torch.testing.assert_close(encoder._prepare(pixels)[0], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 127.5, 127.5),
        ({"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3}, 100.0, 50.0),
        ({"do_normalize": False, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}, 0.0, 255.0),
    ],
)
def test_a_processor_s_own_scale_is_followed(tmp_path, settings, mean, std) -> None:
    folder = transformers_folder(tmp_path / "clip", "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = load_encoder(str(folder), grid=4)
    pixels = images(1, encoder.input_size)
    torch.testing.assert_close(encoder._prepare(pixels), (pixels.float() - mean) / std)


def without(folder: Path, part: str) -> None:
    """Take all weights whose names contain ``part`` out of a folder."""
    file = folder / "model.safetensors"
    state = load_file(file)
    kept = {name: value for name, value in state.items() if part not in name}
    assert len(kept) < len(state)
    save_file(kept, file, metadata={"format": "pt"})


def test_a_pooler_that_the_file_lacks_changes_neither_tokens_nor_fingerprint(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
    )
    torch.manual_seed(3)
    ViTModel(config).save_pretrained(tmp_path)
    whole, pixels = load_encoder(str(tmp_path), grid=4), images(2, 32)
    without(tmp_path, "pooler")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(load_encoder(str(tmp_path), grid=4))
        assert torch.initial_seed() == seed
        assert torch.equal(found[-1].tokens(pixels), whole.tokens(pixels))
    assert found[0].fingerprint == found[1].fingerprint != whole.fingerprint
    assert torch.equal(found[0].pooled(pixels), found[1].pooled(pixels))
    own = {name: value for name, value in found[0].backbone.network.state_dict().items() if "pooler" not in name}
    assert found[0].weights_hash == tensors_hash(own)


@pytest.mark.parametrize("part", ["1.attention.", "layernorm."])
def test_a_transformers_model_that_is_partly_random_is_refused(tmp_path: Path, part: str) -> None:
    folder = transformers_folder(tmp_path / "dinov2", "dinov2")
    without(folder, part)
    with pytest.raises(CheckpointError, match=rf"model '.*' lack '.*{part}.*': get its model.safetensors again"):
        load_encoder(str(folder), grid=4)


DAMAGES = [("model.safetensors", b"half of it"), ("config.json", b"[" * 100_000), ("config.json", b"{")]
STATISTICS = [("preprocessor_config.json", content) for content in (b"{", b"[1, 2]", b'{"rescale_factor": 0}')]


@pytest.mark.parametrize(
    ("make", "name", "content"),
    [(timm_folder, *damage) for damage in DAMAGES]
    + [(transformers_folder, *damage) for damage in DAMAGES + STATISTICS],
)
def test_a_damaged_folder_is_one_sentence(make: Any, name: str, content: bytes, tmp_path: Path) -> None:
    folder = make(tmp_path / "clip", "clip")
    assert (folder / name).is_file()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(str(folder), grid=4)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def mocov3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A checkpoint as MoCo-v3's training writes it, and the encoder that is in it."""
    import timm

    torch.manual_seed(4)
    network = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, dynamic_img_size=True).eval()
    own = {name: value.half() for name, value in network.state_dict().items()}
    network.load_state_dict({name: value.float() for name, value in own.items()})
    state = {f"module.base_encoder.{name}": value for name, value in own.items()}
    state |= {f"module.momentum_encoder.{name}": torch.zeros(1) for name in own}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(2), "module.predictor.0.weight": torch.zeros(2)}
    path = tmp_path_factory.mktemp("moco") / "vit-s-300ep.pth.tar.pth"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {"state": {}}}, path)
    return path, network


def test_a_training_checkpoint_of_mocov3_is_converted(mocov3) -> None:
    path, network = mocov3
    encoder = load_encoder("mocov3-vit-s", weights=path, grid=4)
    pixels = images(1, 64)
    with torch.no_grad():
        expected = network.forward_features(normalised(pixels, IMAGENET))[:, 1:]
    torch.testing.assert_close(encoder.tokens(pixels), expected, atol=2e-5, rtol=1e-5)
    assert encoder.backbone.network.blocks[0].attn.num_heads == 12  # its weights also fit six heads, and mean other


def test_a_training_checkpoint_of_mae_is_converted(tmp_path, load) -> None:
    encoder, folder = load(("timm", "mae"))
    state = dict(encoder.backbone.network.state_dict())
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    state |= {"decoder_blocks.0.norm1.weight": torch.zeros(8)}
    torch.save({"model": state, "epoch": 800}, tmp_path / "mae_pretrain.pth")
    again = load_encoder(str(folder), weights=tmp_path / "mae_pretrain.pth", grid=GRID)
    pixels = images(1, 32)
    assert torch.equal(again.tokens(pixels), encoder.tokens(pixels))


def test_a_training_checkpoint_of_ijepa_is_converted(tmp_path, load) -> None:
    encoder, folder = load(("timm", "ijepa"))
    own = {f"module.{name}": value for name, value in encoder.backbone.network.state_dict().items()}
    torch.save({"encoder": own, "predictor": {"module.x": torch.zeros(1)}, "epoch": 1}, tmp_path / "IN1K.pth")
    again = load_encoder(str(folder), weights=tmp_path / "IN1K.pth", grid=GRID)
    pixels = images(1, 32)
    assert torch.equal(again.tokens(pixels), encoder.tokens(pixels))


def test_a_file_of_another_architecture_is_named(tmp_path, mocov3) -> None:
    path, network = mocov3
    with pytest.raises(CheckpointError) as caught:
        load_encoder("mae-vit-b", weights=path, grid=4)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} does not hold the weights of 'mae-vit-b': 'cls_token' is (1, 1, 384)")
    assert sentence.endswith("the file fits mocov3-vit-s.")
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("blocks.11.")}
    save_file(state, tmp_path / "shallow.safetensors")
    with pytest.raises(CheckpointError, match="it is a ViT of width 384, patch 16 and 11 blocks: name that"):
        load_encoder("mae-vit-b", weights=tmp_path / "shallow.safetensors", grid=4)


def test_patches_of_another_size_are_not_resized_in_silence(mocov3) -> None:
    path, _ = mocov3
    with pytest.raises(CheckpointError, match=r"not hold the weights of 'vit_small_patch8_224': .*fits mocov3-vit-s"):
        load_encoder("vit_small_patch8_224", weights=path, grid=4)


def test_a_folder_that_is_no_network(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_of_nothing", "pretrained_cfg": {}}))
    with pytest.raises(CheckpointError, match="does not describe a network that timm can build"):
        load_encoder(str(tmp_path), grid=4)


def test_mocov3_needs_a_file() -> None:
    with pytest.raises(CheckpointError, match="timm has no weights of 'mocov3-vit-b': give its published file"):
        load_encoder("mocov3-vit-b", grid=16)
