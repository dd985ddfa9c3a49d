"""Patch descriptors, the encoder distance and LPIPS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vrpo.errors import CheckpointError, ConfigError
from vrpo.vision.encoders import load_encoder, resample_tokens
from vrpo.vision.perceptual import DESCRIPTORS, EncoderDistance, Lpips, patch_descriptors, token_features

CONTRAST, DIRECTIONS, LAPLACIAN = 0, slice(1, 5), 5


def plain_descriptors(image: np.ndarray, side: int) -> np.ndarray:
    """The definition, pixel by pixel, for one image (C, H, W)."""
    channels, height, width = image.shape
    patch = height // side
    result = np.zeros((side * side, 6))

    def at(channel: int, row: int, column: int) -> float:
        return image[channel, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]

    for index in range(side * side):
        top, left = index // side * patch, index % side * patch
        for c in range(channels):
            result[index, 0] += image[c, top : top + patch, left : left + patch].var() / channels
            for i in range(top, top + patch):
                for j in range(left, left + patch):
                    share = 1 / (channels * patch * patch)
                    for d, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (-1, 1)]):
                        change = at(c, i + down, j + right) - at(c, i - down, j - right)
                        result[index, 1 + d] += share * (change / (2 * np.hypot(down, right))) ** 2
                    around = at(c, i, j + 1) + at(c, i, j - 1) + at(c, i + 1, j) + at(c, i - 1, j)
                    result[index, 5] += share * (around - 4 * at(c, i, j)) ** 2
    return np.sqrt(result)


def test_descriptors_are_their_definition() -> None:
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = np.stack([plain_descriptors(image, 2) for image in images.numpy()])
    np.testing.assert_allclose(patch_descriptors(images, 4).numpy(), expected, rtol=1e-5)


def ramp(down: float, right: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    return (down * rows + right * columns)[None, None]


@pytest.mark.parametrize(
    ("image", "direction", "slope", "blind"),
    [
        (ramp(0, 1), "horizontal", 1.0, "vertical"),
        (ramp(1, 0), "vertical", 1.0, "horizontal"),
        (ramp(1, 1), "falling", 2**0.5, "rising"),
        (ramp(-1, 1), "rising", 2**0.5, "falling"),
    ],
)
def test_a_slope_is_seen_in_its_direction(image: Tensor, direction: str, slope: float, blind: str) -> None:
    inner = dict(zip(DESCRIPTORS, patch_descriptors(image, 16)[0, 5].tolist(), strict=True))
    assert max(DESCRIPTORS[DIRECTIONS], key=inner.__getitem__) == direction
    assert inner[direction] == pytest.approx(slope)
    assert inner[blind] == pytest.approx(0, abs=1e-6)
    assert inner["laplacian"] == pytest.approx(0, abs=1e-5)


def test_vertical_edge_by_hand() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 6:] = 2.0
    left, right = patch_descriptors(image, 4)[0, :2]
    assert left.abs().max() == 0
    # Half of the 16 pixels are bright; at the edge, in two columns, the change is 2 over 2 pixels, the
    # Laplacian +-2.
    assert right[CONTRAST] == pytest.approx(1.0)
    assert right[DIRECTIONS].tolist() == pytest.approx([0.5**0.5, 0.5, 0.0, 0.5])
    assert right[LAPLACIAN] == pytest.approx(2**0.5)


def test_descriptors_ignore_the_mean_and_are_finite_in_half_precision() -> None:
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(patch_descriptors(image + 100, 4), patch_descriptors(image, 4), atol=1e-4, rtol=1e-3)
    flat = patch_descriptors(torch.full((1, 4, 8, 8), 0.3, dtype=torch.float16), 4)
    assert flat.dtype == torch.float32
    assert flat.abs().max() < 1e-6


def test_encoder_distance_is_differentiable_in_the_prediction_only() -> None:
    mixing = torch.randn(12, 7)

    def features(images: Tensor) -> Tensor:
        return F.unfold(images, 2, stride=2).mT @ mixing

    distance = EncoderDistance(features)
    images = torch.rand(3, 3, 8, 8).requires_grad_()
    predicted = torch.rand(3, 3, 8, 8, requires_grad=True)
    value = distance(predicted, images)
    expected = 1 - F.cosine_similarity(features(predicted), features(images), dim=-1).mean(1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(distance(images, images), torch.zeros(3), atol=1e-6, rtol=0)
    value.sum().backward()
    assert predicted.grad.abs().sum() > 0
    assert images.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differentiable_tokens_are_the_encoder_s_own(dtype: torch.dtype) -> None:
    encoder = load_encoder("resnet10t", weights="random", grid=4, feature=1, input_size=24, dtype=dtype)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    floats = (pixels / 127.5 - 1).requires_grad_()
    tokens = token_features(encoder)(floats)
    own = tokens if encoder.native_grid == 4 else resample_tokens(tokens, 4)
    precision = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(own.float(), encoder.tokens(pixels), **precision)
    tokens.float().square().sum().backward()
    assert floats.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from safetensors.torch import save_file
    from torchvision.models import alexnet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    backbone, linear = folder / "alexnet.safetensors", folder / "alex.pth"
    state = alexnet(weights=None).state_dict()
    save_file({k: v for k, v in state.items() if k.startswith(("features", "classifier.6"))}, backbone)
    widths = (64, 192, 384, 256, 256)
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}, linear)
    return backbone, linear


def test_lpips_is_its_definition(lpips_files: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    network = Lpips(*lpips_files, network="alex")
    predicted = (2 * torch.rand(2, 3, 64, 64) - 1).requires_grad_()
    images = 2 * torch.rand(2, 3, 64, 64) - 1

    reference = alexnet(weights=None)
    reference.load_state_dict(load_file(lpips_files[0]), strict=False)
    linear = torch.load(lpips_files[1], weights_only=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    # LPIPS' shift and scale are ImageNet's mean and deviation on [-1, 1], rounded to 3 digits.
    x, y = (((image + 1) / 2 - mean) / std for image in (predicted.detach(), images))
    expected, index = torch.zeros(2), 0
    with torch.no_grad():
        for layer in reference.features:
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
                weighted = difference * linear[f"lin{index}.model.1.weight"]
                expected, index = expected + weighted.sum(1).mean((1, 2)), index + 1
    assert index == 5
    torch.testing.assert_close(network(predicted, images), expected, rtol=2e-2, atol=1e-5)

    network(predicted, images).sum().backward()
    assert predicted.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_lpips_where_no_channel_fires_is_zero_with_finite_gradient(lpips_files: tuple[Path, Path]) -> None:
    network = Lpips(*lpips_files, network="alex")
    for stage in network.stages:
        stage[-2].bias.fill_(-100.0)
    black = torch.zeros(1, 3, 64, 64, requires_grad=True)
    value = network(black, torch.zeros(1, 3, 64, 64))
    value.sum().backward()
    assert value.item() == 0
    assert torch.isfinite(black.grad).all()


def test_lpips_has_a_smallest_size_and_may_resize(lpips_files: tuple[Path, Path]) -> None:
    network = Lpips(*lpips_files, network="alex")
    x, y = torch.rand(2, 1, 3, network.smallest, network.smallest)
    assert network(x, y) > 0
    with pytest.raises(RuntimeError):
        network(x[..., 1:, 1:], y[..., 1:, 1:])
    larger = Lpips(*lpips_files, network="alex", input_size=48)
    x48, y48 = (F.interpolate(image, size=(48, 48), mode="bicubic", antialias=True) for image in (x, y))
    torch.testing.assert_close(larger(x, y), network(x48, y48))
    with pytest.raises(ConfigError, match="LPIPS has no network 'alexnet': did you mean 'alex'"):
        Lpips(*lpips_files, network="alexnet")


def test_lpips_names_the_file_that_is_missing_or_wrong(lpips_files: tuple[Path, Path], tmp_path: Path) -> None:
    backbone, linear = lpips_files
    with pytest.raises(CheckpointError, match=r"no weights file at .*absent\.pth"):
        Lpips(backbone, tmp_path / "absent.pth", network="alex")
    with pytest.raises(CheckpointError, match="does not hold the weights of 'torchvision's VGG-16'"):
        Lpips(backbone, linear, network="vgg")
    with pytest.raises(CheckpointError, match="does not hold the weights of 'LPIPS on torchvision's AlexNet'"):
        Lpips(backbone, backbone, network="alex")
