from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from vrpo.errors import CheckpointError, ConfigError
from vrpo.vision.encoders import Encoder, load_encoder, load_feature_network, resample_tokens

LITE0 = ("tf_efficientnet_lite0", "efficientnet_lite0_imagenet_timm.safetensors")
MOBILENET = ("mobilenetv2_100", "mobilenetv2_imagenet_timm.safetensors")
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))


def random_images(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def cifar(folder: Path, name: str, per_class: int) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    with zipfile.ZipFile(folder / f"{name}.zip") as archive:
        names = sorted(entry for entry in archive.namelist() if entry.endswith((".jpg", ".jpeg")))
        classes = sorted({entry.split("/")[-2] for entry in names})
        for label, wanted in enumerate(classes):
            for entry in [entry for entry in names if entry.split("/")[-2] == wanted][:per_class]:
                images.append(np.asarray(Image.open(io.BytesIO(archive.read(entry))).convert("RGB")))
                labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def direct(name: str, path: Path) -> torch.nn.Module:
    import timm

    network = timm.create_model(name, pretrained=False)
    network.load_state_dict(load_file(path), strict=False)
    # The encoder's own memory format: another one sums in another order, which is 1.5e-5 after fifty layers.
    return network.eval().to(memory_format=torch.channels_last)


def lite_input(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float64) - 127) / 128


def imagenet_input(images: np.ndarray) -> np.ndarray:
    mean, std = IMAGENET
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize(
    ("network", "prepare", "channels"), [(LITE0, lite_input, 320), (MOBILENET, imagenet_input, 320)]
)
def test_tokens_are_those_of_a_direct_timm_call(shared_data, network, prepare, channels):
    name, file = network
    images = cifar(shared_data, "cifar10-test", 1)[0][:3].repeat_interleave(8, -1).repeat_interleave(8, -2)
    encoder = load_encoder(name, weights=shared_data / file, grid=8)
    tokens = encoder.tokens(images)
    reference = direct(name, shared_data / file)
    with torch.no_grad():
        prepared = torch.from_numpy(prepare(images.numpy())).float()
        prepared = prepared.contiguous(memory_format=torch.channels_last)
        maps = reference.forward_intermediates(prepared, intermediates_only=True)[-1]
    assert maps.shape == (3, channels, 8, 8)
    assert (encoder.grid, encoder.width, encoder.input_size, encoder.resampled) == (8, channels, 256, False)
    for row, column in [(0, 0), (2, 5), (7, 7)]:
        torch.testing.assert_close(tokens[:, 8 * row + column], maps[:, :, row, column], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens, maps.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-5, rtol=1e-5)


def test_pooled_features_are_timm_s_before_the_classifier(shared_data):
    name, file = MOBILENET
    images = random_images(2, 224)
    network = load_feature_network(name, weights=shared_data / file)
    assert network.input_size == 224
    reference = direct(name, shared_data / file)
    reference.reset_classifier(0)
    with torch.no_grad():
        expected = reference(torch.from_numpy(imagenet_input(images.numpy())).float())
    torch.testing.assert_close(network.pooled(images), expected, atol=1e-5, rtol=1e-5)


def test_another_feature_map_at_its_own_stride(shared_data):
    name, file = LITE0
    encoder = load_encoder(name, weights=shared_data / file, grid=16, feature=-2)
    assert (encoder.input_size, encoder.width, encoder.resampled) == (256, 112, False)
    same = load_encoder(name, weights=shared_data / file, grid=16, feature=3)
    images = random_images(1, 256)
    assert torch.equal(encoder.tokens(images), same.tokens(images))


def test_images_are_resized_as_pillow_does(shared_data):
    name, file = LITE0
    encoder = load_encoder(name, weights=shared_data / file, grid=4)  # input 128
    smooth = cifar(shared_data, "cifar10-test", 1)[0][:1].float()
    large = F.interpolate(smooth, size=(200, 200), mode="bilinear").round().to(torch.uint8)
    picture = Image.fromarray(large[0].permute(1, 2, 0).numpy())
    resized = np.asarray(picture.resize((128, 128), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    prepared = encoder._prepare(large)[0].numpy() * 128 + 127
    assert np.abs(np.clip(prepared, 0, 255) - resized).max() <= 1.01  # Pillow rounds after each axis


def test_knn_on_pooled_tokens_beats_pixels(shared_data, record_property):
    train, train_labels = cifar(shared_data, "cifar10-train", 50)
    test, test_labels = cifar(shared_data, "cifar10-test", 20)
    encoder = load_encoder(LITE0[0], weights=shared_data / LITE0[1], grid=4, input_size=112)

    def features(images: Tensor) -> Tensor:
        return torch.cat([encoder.tokens(part).mean(1) for part in images.split(50)])

    def accuracy(describe: Callable[[Tensor], Tensor]) -> float:
        known, asked = describe(train), describe(test)
        known, asked = known - known.mean(0), asked - known.mean(0)
        similarity = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
        votes = F.one_hot(train_labels[similarity.topk(10).indices], 10).sum(1)
        return float((votes.argmax(1) == test_labels).double().mean())

    pixels, tokens = accuracy(lambda images: images.flatten(1).float()), accuracy(features)
    record_property("accuracy", {"pixels": pixels, "tokens": tokens})
    print(f"k-nearest neighbours over CIFAR-10: pixels {pixels:.3f}, tokens {tokens:.3f}")
    assert tokens > pixels + 0.2


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, patch_size=14, image_size=70, layerscale_value=0.5
    )
    torch.manual_seed(1)
    Dinov2Model(config).save_pretrained(folder)
    settings = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "image_processor_type": "BitImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("prefix", ["", "transformers:"])
def test_transformers_model_from_a_folder(dinov2_folder, prefix):
    from transformers import Dinov2Model

    encoder = load_encoder(f"{prefix}{dinov2_folder}", grid=8)
    images = random_images(2, 112)
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    prepared = (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = model(torch.from_numpy(prepared).float()).last_hidden_state
    assert (encoder.family, encoder.input_size, encoder.width, encoder.resampled) == ("vit", 112, 48, False)
    torch.testing.assert_close(encoder.tokens(images), expected[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.pooled(images), expected[:, 0], atol=1e-5, rtol=1e-5)


def test_transformers_towers_and_maps(tmp_path):
    from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, SiglipVisionConfig, SiglipVisionModel

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    clip = CLIPConfig(
        text_config={**small, "vocab_size": 50, "eos_token_id": 2},
        vision_config={**small, "patch_size": 16, "image_size": 64},
    )
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    encoder = load_encoder(str(tmp_path / "clip"), grid=6)
    assert (encoder.input_size, encoder.resampled, encoder.tokens(random_images(1, 40)).shape) == (
        96,
        False,
        (1, 36, 32),
    )
    assert encoder.backbone.mean[0] == pytest.approx(0.48145466)

    siglip = SiglipVisionModel(SiglipVisionConfig(**small, patch_size=16, image_size=64))
    siglip.save_pretrained(tmp_path / "siglip")
    encoder = load_encoder(str(tmp_path / "siglip"), grid=4)
    assert (encoder.input_size, encoder.tokens(random_images(1, 40)).shape) == (64, (1, 16, 32))
    assert encoder.pooled(random_images(2, 40)).shape == (2, 32)

    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    resnet.save_pretrained(tmp_path / "resnet")
    encoder = load_encoder(str(tmp_path / "resnet"), grid=4)
    assert (encoder.family, encoder.native_grid, encoder.width) == ("conv", 4, 16)


@pytest.fixture(scope="module")
def tiny_vit() -> Encoder:
    return load_encoder("vit_tiny_patch16_224", weights="random", grid=8)


def test_patch_14_at_224_gives_256_tokens():
    import timm

    encoder = load_encoder("dinov2-vit-s-reg", weights="random", grid=16)
    assert (encoder.input_size, encoder.resampled, encoder.backbone.default_input) == (224, False, 224)
    images = random_images(1, 256)
    tokens = encoder.tokens(images)
    assert tokens.shape == (1, 256, 384)
    network = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True).eval()
    network.load_state_dict(encoder.backbone.network.state_dict())
    with torch.no_grad():
        states = network.forward_features(encoder._prepare(images))
    assert states.shape[1] == 256 + 5  # a class token and four registers come first
    torch.testing.assert_close(tokens, states[:, 5:], atol=1e-5, rtol=1e-5)


def test_tokens_of_a_block(tiny_vit):
    images = random_images(1, 128)
    first = load_encoder("vit_tiny_patch16_224", weights="random", grid=8, feature=0)
    last = load_encoder("vit_tiny_patch16_224", weights="random", grid=8, feature=-1)
    torch.testing.assert_close(last.tokens(images), tiny_vit.tokens(images))
    assert (first.tokens(images) - tiny_vit.tokens(images)).abs().max() > 0.1


QUADRANTS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("kind", ["tiny_vit", "dinov2", "lite0", "resampled"])
def test_a_quadrant_moves_its_own_tokens_most(kind, tiny_vit, dinov2_folder, shared_data):
    weights = shared_data / LITE0[1]
    encoder = {
        "tiny_vit": lambda: tiny_vit,
        "dinov2": lambda: load_encoder(str(dinov2_folder), grid=8),
        "lite0": lambda: load_encoder(LITE0[0], weights=weights, grid=8),
        "resampled": lambda: load_encoder(LITE0[0], weights=weights, grid=6, input_size=256),
    }[kind]()
    images = random_images(1, 64)
    before = encoder.tokens(images)
    half, grid = 32, encoder.grid
    for row, column in QUADRANTS:
        changed = images.clone()
        place = (..., slice(half * row, half * row + half), slice(half * column, half * column + half))
        changed[place] = 255 - changed[place]
        moved = (encoder.tokens(changed) - before).norm(dim=-1).view(2, grid // 2, 2, grid // 2).mean(dim=(1, 3))
        assert moved.argmax().item() == 2 * row + column


def test_resampling_is_said_or_refused(tiny_vit):
    encoder = load_encoder("vit_tiny_patch16_224", weights="random", grid=8, input_size=224)
    assert (encoder.native_grid, encoder.grid, encoder.resampled) == (14, 8, True)
    assert encoder.tokens(random_images(2, 32)).shape == (2, 64, 192)
    with pytest.raises(ConfigError, match=r"at 224 px gives 14x14 tokens, and the trunk has 8x8: .* size to 128"):
        load_encoder("vit_tiny_patch16_224", weights="random", grid=8, input_size=224, allow_resample=False)


def test_resampling_keeps_a_linear_ramp_and_the_mean():
    ramp = torch.arange(12.0)[:, None].expand(12, 12).reshape(1, 144, 1)
    down = resample_tokens(ramp, 6).view(6, 6)
    expected = torch.arange(6.0) * 2 + 0.5
    torch.testing.assert_close(down[2:4], expected[2:4, None].expand(2, 6), atol=1e-3, rtol=0)
    assert down.mean() == pytest.approx(5.5, abs=1e-3)
    assert torch.equal(resample_tokens(ramp, 12), ramp)


def test_a_network_of_one_size_is_resampled():
    encoder = load_encoder("swin_tiny_patch4_window7_224", weights="random", grid=8)
    assert (encoder.input_size, encoder.native_grid, encoder.resampled) == (224, 7, True)
    with pytest.raises(ConfigError, match="takes no other size"):
        load_encoder("swin_tiny_patch4_window7_224", weights="random", grid=8, allow_resample=False)
    with pytest.raises(ConfigError, match="takes images of 224 px only"):
        load_encoder("swin_tiny_patch4_window7_224", weights="random", grid=8, input_size=256)


def test_tokens_serve_a_backward_pass_and_the_encoder_stays_frozen(tiny_vit):
    tiny_vit.train()
    assert not tiny_vit.training
    assert not any(parameter.requires_grad for parameter in tiny_vit.parameters())
    tokens = tiny_vit.tokens(random_images(1, 32))
    assert tokens.dtype == torch.float32
    assert not tokens.requires_grad
    learned = torch.randn_like(tokens, requires_grad=True)
    (learned * tokens).sum().backward()
    torch.testing.assert_close(learned.grad, tokens)


def test_precision_is_the_encoder_s_own_whatever_the_caller_uses(tiny_vit):
    images = random_images(1, 32)
    expected = tiny_vit.tokens(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_vit.tokens(images), expected)
    reduced = load_encoder("vit_tiny_patch16_224", weights="random", grid=8, dtype=torch.bfloat16).tokens(images)
    assert not torch.equal(reduced, expected)
    assert F.cosine_similarity(reduced, expected, dim=-1).min() > 0.99


def test_fingerprint_tells_weights_size_feature_and_grid_apart(tmp_path, tiny_vit):
    def fingerprint(**settings) -> str:
        return load_encoder("vit_tiny_patch16_224", **{"weights": "random", "grid": 8, **settings}).fingerprint

    state = {name: value.clone() for name, value in tiny_vit.backbone.network.state_dict().items()}
    state["norm.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    variants = [
        {},
        {"grid": 7},
        {"input_size": 224},
        {"feature": 2},
        {"weights": tmp_path / "other.safetensors"},
    ]
    assert len({fingerprint(**settings) for settings in variants}) == len(variants)
    assert fingerprint() == tiny_vit.fingerprint


def test_pickled_weights_equal_safetensors_and_resize_positions(tmp_path, tiny_vit):
    state = {name: value.clone() for name, value in tiny_vit.backbone.network.state_dict().items()}
    state["head.weight"] = torch.zeros(1000, 192)  # a classifier may be left over
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "vit.pth")
    images = random_images(1, 128)
    loaded = load_encoder("vit_tiny_patch16_224", weights=tmp_path / "vit.pth", grid=8)
    assert torch.equal(loaded.tokens(images), tiny_vit.tokens(images))


def test_original_dinov2_keys_are_understood(tmp_path):
    small = load_encoder("dinov2-vit-s", weights="random", grid=4)
    state = {name: value.clone() for name, value in small.backbone.network.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 384)  # in the original release, unused here
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    loaded = load_encoder("dinov2-vit-s", weights=tmp_path / "dinov2_vits14_pretrain.pth", grid=4)
    images = random_images(1, 56)
    assert torch.equal(loaded.tokens(images), small.tokens(images))


def test_weights_that_do_not_fit(tmp_path, tiny_vit, shared_data):
    with pytest.raises(CheckpointError, match=r"no weights file at .*none\.safetensors"):
        load_encoder("vit_tiny_patch16_224", weights=tmp_path / "none.safetensors", grid=8)
    (tmp_path / "half.safetensors").write_bytes((shared_data / LITE0[1]).read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_encoder(LITE0[0], weights=tmp_path / "half.safetensors", grid=8)
    with pytest.raises(
        CheckpointError, match=r"not hold the weights of 'mobilenetv2_100': 'blocks\.2\.0\.conv_dw\.weight' is"
    ):
        load_encoder("mobilenetv2_100", weights=shared_data / LITE0[1], grid=8)
    with pytest.raises(CheckpointError, match=r"not hold the weights of 'resnet18': it has no 'conv1\.weight'"):
        load_encoder("resnet18", weights=shared_data / LITE0[1], grid=8)
    state = {name: value.clone() for name, value in tiny_vit.backbone.network.state_dict().items()}
    save_file({**state, "blocks.12.norm1.weight": torch.ones(192)}, tmp_path / "deeper.safetensors")
    with pytest.raises(CheckpointError, match=r"'blocks\.12\.norm1\.weight' has no place"):
        load_encoder("vit_tiny_patch16_224", weights=tmp_path / "deeper.safetensors", grid=8)
    torch.save({"conv": torch.nn.Conv2d(1, 1, 1)}, tmp_path / "object.pth")
    with pytest.raises(CheckpointError, match="is damaged or"):
        load_encoder("resnet18", weights=tmp_path / "object.pth", grid=8)
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(CheckpointError, match=r"give \.safetensors"):
        load_encoder("resnet18", weights=tmp_path / "notes.txt", grid=8)


def test_names_and_sizes_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'dinov2-vit-b'"):
        load_encoder("dinov2-vitb", weights="random", grid=8)
    with pytest.raises(ConfigError, match="did you mean 'tf_efficientnet_lite0'"):
        load_encoder("tf_eficientnet_lite0", weights="random", grid=8)
    with pytest.raises(ConfigError, match="name its architecture"):
        load_encoder("file.safetensors", grid=8)
    with pytest.raises(ConfigError, match="no multiple of its stride of 16: the nearest that fits is 128"):
        load_encoder("vit_tiny_patch16_224", weights="random", grid=8, input_size=130)
    with pytest.raises(ConfigError, match="has 12 blocks, so feature 12 does not exist: the nearest is 11"):
        load_encoder("vit_tiny_patch16_224", weights="random", grid=8, feature=12)
    with pytest.raises(ConfigError, match="has 5 feature maps, so feature -6 does not exist: the nearest is -5"):
        load_encoder("mobilenetv2_100", weights="random", grid=8, feature=-6)


def test_no_network_and_no_file(monkeypatch):
    import timm
    from transformers import AutoConfig

    def offline(*args, **kwargs):
        if kwargs.get("pretrained", True):
            raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"weights of 'dinov2-vit-b' could not be had .* give a local file"):
        load_encoder("dinov2-vit-b", grid=16)
    with pytest.raises(CheckpointError, match=r"model 'some/model' could not be had .* give a local folder"):
        load_encoder("transformers:some/model", grid=16)
