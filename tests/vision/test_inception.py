"""The Inception network: torch-fidelity's features, sFID's layout, weights that are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError, ConfigError
from vrpo.evaluation.features import InceptionLike
from vrpo.vision import inception as module
from vrpo.vision.encoders import load_feature_network
from vrpo.vision.inception import InceptionNetwork, load_inception, spatial_features


def draw_images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.fixture(scope="module")
def network() -> InceptionNetwork:
    return load_inception(weights="random")


def test_spatial_features_are_seven_channels_in_nhwc_order() -> None:
    maps = torch.arange(2 * 9 * 3 * 4).reshape(2, 9, 3, 4)

    features = spatial_features(maps)

    assert features.shape == (2, 7 * 3 * 4)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                for channel in range(7):
                    assert features[image, (row * 4 + column) * 7 + channel] == maps[image, channel, row, column]


def test_features_are_those_of_torch_fidelity(network: InceptionNetwork) -> None:
    """Its own outputs, and its own modules run to Mixed_6d one by one."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = draw_images(2, 40)
    extractor = network.extractor
    pooled, spatial = network.pooled_and_spatial(images)

    assert pooled.shape == (2, 2048)
    assert spatial.shape == (2, 2023)
    assert pooled.dtype == spatial.dtype == torch.float32
    assert pooled.std() > 1e-3
    assert spatial.std() > 1e-3
    x = (interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    names = (
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c"
    )
    for name in f"{names} Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d".split():
        x = getattr(extractor, name)(x)
    # The first channels of the map are those of the 1 x 1 branch, which is what TensorFlow's graph calls mixed_6/conv.
    torch.testing.assert_close(spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2), x[:, :7])
    extractor.features_list = ["2048", "logits_unbiased"]
    try:
        expected, logits = extractor(images)
    finally:
        extractor.features_list = ["2048"]
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(network.logits(pooled), logits)
    torch.testing.assert_close(network.pooled(images), pooled)


def test_random_weights_are_seeded_and_never_called_inception(network: InceptionNetwork) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    other = load_feature_network("inception", weights="random")

    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(network, InceptionLike)
    assert other.name == network.name == "inception-random"
    assert other.weights_hash == network.weights_hash
    assert not other.train().training


def test_weights_file_is_checked_by_its_hash(
    network: InceptionNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"There are no Inception weights at .*6726825d\.pth: fetch https://.* \(91"
    ):
        load_inception()
    file = module.cached_weights()
    file.parent.mkdir(parents=True)
    torch.save(network.extractor.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"is not the Inception network of the published scores .* 6726825d"):
        load_inception()
    digest = module.sha256_file(file)
    monkeypatch.setattr(module, "WEIGHTS_DIGEST", digest[:8])

    loaded = load_inception()

    assert (loaded.name, loaded.weights_hash) == ("inception", digest)
    images = draw_images(1)
    assert torch.equal(loaded.pooled(images), network.pooled(images))


def test_other_files_and_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WEIGHTS_DIGEST", "")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of 'inception'"):
        load_inception(weights=tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="takes images at 299 px, not 256"):
        load_inception(weights="random", input_size=256)


def test_dinov2_alone_is_the_network_of_fd_dinov2(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, **options: object) -> None:
        asked.append(name)
        raise ConfigError("far enough")

    monkeypatch.setattr("vrpo.vision.encoders.load_backbone", load)
    for name in ("dinov2", "dinov2-vit-b"):
        with pytest.raises(ConfigError):
            load_feature_network(name)
    assert asked == ["dinov2-vit-l", "dinov2-vit-b"]
