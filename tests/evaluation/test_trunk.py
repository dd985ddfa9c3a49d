"""What is read out of a trunk: tokens by depth and time, linear probes, and both commands on a trained run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.diffusion.losses import FlowMatching, NoisePrediction
from vrpo.diffusion.paths import get_path
from vrpo.errors import EvaluationError
from vrpo.evaluation.probe import DECAY, fit_probe, linear_probe
from vrpo.evaluation.trunk import Trunk, cknna_by_depth, probe_by_depth, spread_rows
from vrpo.models.taps import Taps
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.pixels import to_float


class Images:
    """Rows of a tensor as a data set."""

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images, self._labels = images, labels

    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        return self.images[indices], None if self._labels is None else self._labels[indices]


def draw_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)


def build(kind: str) -> DiffusionTransformer:
    network = build_transformer(f"{kind}-N/4", input_size=8, in_channels=3, num_classes=2).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # as built, blocks are the identity
    return network


@pytest.fixture
def trunk() -> Trunk:
    return Trunk(build("SiT"), FlowMatching(get_path("linear")), torch.device("cpu"))


def test_features_are_mean_tokens_of_the_noised_images_with_the_null_class(trunk: Trunk) -> None:
    images = draw_images(6)
    seen = {}

    features = trunk.features(Images(images), np.arange(6), (1, 3), 0.0, seed=0, batch_size=4)

    def keep(tokens: Tensor) -> Tensor:
        seen[3] = tokens
        return tokens

    trunk.network(to_float(images), torch.zeros(6), torch.full((6,), 2), Taps(tokens={3: keep}))
    torch.testing.assert_close(features[3], seen[3].detach().mean(dim=1))
    assert set(features) == {1, 3}
    assert not torch.allclose(features[1], features[3])


def test_noise_follows_seed_and_place_not_the_batch(trunk: Trunk) -> None:
    data, rows = Images(draw_images(6)), np.arange(6)

    def features(**options: int) -> Tensor:
        return trunk.features(data, rows, (2,), 0.6, **{"seed": 0, "batch_size": 6, **options})[2]

    torch.testing.assert_close(features(), features(batch_size=4))
    assert not torch.allclose(features(), features(seed=1))
    assert not torch.allclose(features(), trunk.features(data, rows, (2,), 0.2, seed=0, batch_size=6)[2])


def test_dit_is_given_step_numbers() -> None:
    trunk = Trunk(build("DiT"), NoisePrediction(), torch.device("cpu"))
    times = []
    trunk.network.register_forward_pre_hook(lambda module, arguments: times.append(arguments[1]))

    for time in (0.0, 0.5, 1.0):
        trunk.features(Images(draw_images(2)), np.arange(2), (1,), time, seed=0, batch_size=2)

    assert [float(t[0]) for t in times] == [0, 500, 999]


def test_a_trunk_agrees_with_an_encoder_that_is_itself(trunk: Trunk) -> None:
    class Own:
        def tokens(self, images: Tensor) -> Tensor:
            rows = np.arange(len(images))
            return trunk.features(Images(images), rows, (2,), 0.0, seed=0, batch_size=64)[2][:, None]

    data = Images(draw_images(40))

    result = cknna_by_depth(trunk, Own(), data, depths=(1, 2), times=(0.0, 0.9), count=40)

    assert result.values[1][0] == pytest.approx(1, abs=1e-5)
    assert all(value < 0.999 for value in (result.values[0][0], result.values[1][1]))
    assert json.loads(json.dumps(result.record()))["protocol"]["neighbours"] == 10


def test_probe_is_at_the_minimum_of_its_convex_loss() -> None:
    labels = torch.arange(90) % 3
    features = torch.randn(90, 6) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 5
    features[:, 0] += labels
    constant = torch.cat([features, torch.ones(90, 1)], dim=1)

    weight, bias, _, _ = (part.numpy() for part in fit_probe(constant, labels, num_classes=3))

    x = features.double().numpy()
    x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    logits = x @ weight[:, :6].T + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    excess = (p - np.eye(3)[labels.numpy()]) / 90
    np.testing.assert_allclose(excess.T @ x + DECAY * weight[:, :6], 0, atol=1e-5)
    np.testing.assert_allclose(excess.sum(axis=0), 0, atol=1e-5)
    assert not weight[:, 6].any()
    accuracy = linear_probe(constant, labels, constant, labels, num_classes=3)
    assert accuracy == (p.argmax(axis=1) == labels.numpy()).mean() > 0.5


def test_probe_reads_what_the_tokens_hold(trunk: Trunk) -> None:
    labels = torch.arange(80) % 2
    images = draw_images(80) // 4 + (labels * 120).to(torch.uint8)[:, None, None, None]
    data = Images(images, labels)
    rows = (np.arange(60), np.arange(60, 80))

    result = probe_by_depth(trunk, data, data, depths=(1, 2), times=(0.0, 1.0), rows=rows, num_classes=2)

    assert [row[0] for row in result.values] == [1.0, 1.0]
    assert all(row[1] < 0.85 for row in result.values), "pure noise holds no class"
    with pytest.raises(EvaluationError, match="needs labels"):
        probe_by_depth(trunk, Images(images), data, depths=(1,), times=(0.0,), rows=rows, num_classes=2)
    one = (np.arange(0, 60, 2), rows[1])
    with pytest.raises(EvaluationError, match="at least two classes"):
        probe_by_depth(trunk, data, data, depths=(1,), times=(0.0,), rows=one, num_classes=2)


def test_rows_are_spread_over_the_data() -> None:
    assert spread_rows(10, 3).tolist() == [0, 4, 9]
    assert spread_rows(5, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(EvaluationError, match="There are 3 images and 4 were asked for"):
        spread_rows(3, 4)


def test_nan_weights_are_refused(trunk: Trunk) -> None:
    torch.nn.init.constant_(next(trunk.network.blocks.parameters()), torch.nan)
    data = Images(draw_images(20), torch.arange(20) % 2)

    with pytest.raises(EvaluationError, match=r"tokens after block 1 are NaN or infinite at t = 0\.5"):
        probe_by_depth(
            trunk, data, data, depths=(1,), times=(0.5,), rows=(np.arange(10), np.arange(10, 20)), num_classes=2
        )
