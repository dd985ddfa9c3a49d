"""The whole evaluation, on a stub network and on real images with a real one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.errors import EvaluationError
from vrpo.evaluation.evaluate import evaluate_images
from vrpo.evaluation.features import extract_features
from vrpo.evaluation.frechet import FeatureStatistics, frechet_distance
from vrpo.evaluation.images import ImageSet, open_images
from vrpo.evaluation.kernel import kernel_distance
from vrpo.evaluation.precision_recall import precision_recall
from vrpo.evaluation.reference import load_reference

SAMPLING = {"sampler": "ode-euler", "steps": 20, "guidance_interval": [0.0, 1.0], "weights": "ema", "seed": 0}


def draw_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)


def test_metrics_are_those_of_the_features(network) -> None:
    samples, reference = draw_images(40) // 2, draw_images(60)

    result = evaluate_images(samples, reference, network)

    first, second = network.pooled(samples), network.pooled(reference)
    moments = [FeatureStatistics(), FeatureStatistics()]
    for statistics, features in zip(moments, (first, second), strict=True):
        statistics.update(features)
    kid = kernel_distance(first, second, subset_size=40)
    cover = precision_recall(first, second)
    assert result.metrics == {
        "fd": frechet_distance(*moments),
        "kid": kid.mean,
        "precision": cover.precision,
        "recall": cover.recall,
    }
    assert result.deviations == {"kid": kid.std}
    assert all(type(value) is float for value in result.metrics.values())


def test_protocol_states_samples_reference_and_network(network) -> None:
    reference = draw_images(60)

    result = evaluate_images(draw_images(40), reference, network, protocol_fields=SAMPLING)

    assert result.protocol["sample_count"] == 40
    assert result.protocol["sampler"] == "ode-euler"
    assert result.protocol["guidance_interval"] == [0.0, 1.0]
    assert result.protocol["reference"]["count"] == 60
    assert result.protocol["reference"]["fingerprint"] == open_images(reference).fingerprint
    assert result.protocol["features"] == {
        "name": "stub",
        "architecture": "stub",
        "weights_hash": "0" * 64,
        "input_size": 8,
        "precision": "float32",
    }
    assert result.protocol["kid"]["subset_size"] == 40
    assert result.protocol["kid"]["reference"] == 60
    assert "KID over 100 subsets of 40, seed 2020, from 60 reference images" in result.protocol_line
    assert "ode-euler, 20 steps" in result.protocol_line


def test_some_metrics_alone(network) -> None:
    result = evaluate_images(draw_images(9), draw_images(9), network, metrics=("recall",))

    assert set(result.metrics) == {"recall"}
    assert "KID" not in result.protocol_line
    assert "manifolds" in result.protocol_line


def test_batch_size_changes_nothing(network) -> None:
    samples, reference = draw_images(40), draw_images(60)

    assert evaluate_images(samples, reference, network, batch_size=7) == evaluate_images(samples, reference, network)


def test_samples_and_reference_may_be_drawn_and_ready(network) -> None:
    samples, reference = draw_images(20), draw_images(30)
    drawn = ImageSet("drawn", 20, lambda size: iter(samples.split(size)))
    ready = load_reference(reference, network)

    assert evaluate_images(drawn, ready, network).metrics == evaluate_images(samples, reference, network).metrics


def test_saved_result_is_json(tmp_path: Path, network) -> None:
    result = evaluate_images(draw_images(9), draw_images(9), network, protocol_fields=SAMPLING)
    result.save(tmp_path / "evaluations" / "one.json", step=12)

    content = json.loads((tmp_path / "evaluations" / "one.json").read_text())
    assert content == {
        "step": 12,
        "metrics": result.metrics,
        "deviations": result.deviations,
        "protocol": result.protocol,
    }
    assert [file.name for file in (tmp_path / "evaluations").iterdir()] == ["one.json"]


def test_table_prints_names_and_protocol(network) -> None:
    from rich.console import Console

    network.name = "mobilenetv2_100"
    result = evaluate_images(draw_images(9), draw_images(9), network)
    console = Console(file=io.StringIO(), width=400)
    console.print(result.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert "FD-MobileNetV2" in text
    assert "FID" not in text
    assert f"Protocol: {result.protocol_line}" in text


def test_misuse_is_one_sentence(tmp_path: Path, network) -> None:
    images = draw_images(9)
    with pytest.raises(EvaluationError, match="no metric 'precison': did you mean 'precision'"):
        evaluate_images(images, images, network, metrics=("precison",))
    with pytest.raises(EvaluationError, match=r"There are 3 samples .* need at least 4"):
        evaluate_images(images[:3], images, network)
    with pytest.raises(EvaluationError, match=r"There is 1 sample .* and fd needs at least 2"):
        evaluate_images(images[:1], images, network, metrics=("fd",))
    with pytest.raises(EvaluationError, match="holds 3 images, too few for"):
        evaluate_images(images, images[:3], network)


def test_moments_alone_give_only_the_distance(tmp_path: Path, network) -> None:
    images = draw_images(30)
    load_reference(images, network, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    with np.load(file) as archive:
        np.savez(file, **{name: archive[name] for name in archive.files if name != "vectors"})

    result = evaluate_images(images[:20], file, network, metrics=("fd",))

    expected = evaluate_images(images[:20], images, network, metrics=("fd",))
    assert result.metrics["fd"] == pytest.approx(expected.metrics["fd"], rel=1e-6)
    with pytest.raises(EvaluationError, match="holds only the mean and covariance"):
        evaluate_images(images, file, network)


def test_real_images_and_network(shared_data: Path) -> None:
    """CIFAR-10 test images against each other: real is closer than degraded, by every metric."""
    from vrpo.vision.encoders import load_feature_network

    network = load_feature_network(
        "mobilenetv2_100", weights=shared_data / "mobilenetv2_imagenet_timm.safetensors", input_size=64
    )
    source = open_images(shared_data / "cifar10-test.zip")
    batches = source.batches(10)
    # The archive is sorted by class, so alternate images are two draws from one.
    images = torch.cat([next(batches) for _ in range(60)])
    first, second = images[::2], images[1::2]
    coarse = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(first.float(), 4), scale_factor=4).byte()
    reference = load_reference(second, network)

    real = evaluate_images(first, reference, network)
    degraded = evaluate_images(coarse, reference, network)

    assert real.metrics["fd"] < 0.5 * degraded.metrics["fd"]
    assert abs(real.metrics["kid"]) < 0.2 * degraded.metrics["kid"]
    assert real.metrics["precision"] > degraded.metrics["precision"]
    assert real.metrics["recall"] > degraded.metrics["recall"]
    assert real.protocol["features"]["name"] == "MobileNetV2"
    # 300 samples in 1,280 dimensions: the small Gram matrix is an independent route to the singular distance.
    x, y = (extract_features(part, network).double() for part in (first, second))
    cross = (x - x.mean(0)) @ (y - y.mean(0)).T / (len(x) - 1)
    root = torch.linalg.eigvalsh(cross @ cross.T).clamp_min(0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * root
    assert real.metrics["fd"] == pytest.approx(expected.item(), rel=1e-6)
    own = [torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist") for part in (x, y)]
    between = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    radii = [distances.kthvalue(4, dim=1).values for distances in own]
    assert real.metrics["precision"] == (between <= radii[1]).any(1).double().mean().item()
    assert real.metrics["recall"] == (between <= radii[0][:, None]).any(0).double().mean().item()
