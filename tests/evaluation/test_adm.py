"""The ADM suite as a whole: its table of metrics, its reference files, and files of published values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.errors import ConfigError, EvaluationError
from vrpo.evaluation.evaluate import evaluate_images, results_table
from vrpo.evaluation.features import extract_features
from vrpo.evaluation.frechet import FeatureStatistics, frechet_distance
from vrpo.evaluation.images import first_images, open_images
from vrpo.evaluation.inception_score import InceptionScore
from vrpo.evaluation.parity import compare_published, parse_expected
from vrpo.evaluation.precision_recall import precision_recall
from vrpo.evaluation.reference import load_reference


def draw_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics


def write_adm(path: Path, images: Tensor | None, all_images: Tensor, network, spatial: bool = True) -> Path:
    """Write a reference file: moments of ``all_images``, and ``images``, which are fewer."""
    arrays = {} if images is None else {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    pooled, places = (part.double().numpy() for part in network.pooled_and_spatial(all_images))
    arrays |= {"mu": pooled.mean(axis=0), "sigma": np.cov(pooled, rowvar=False)}
    if spatial:
        arrays |= {"mu_s": places.mean(axis=0), "sigma_s": np.cov(places, rowvar=False)}
    np.savez(path, **arrays)
    return path


def test_metrics_are_those_of_the_features(inception) -> None:
    samples, reference = draw_images(40) // 2, draw_images(60)

    result = evaluate_images(samples, reference, inception, batch_size=7)

    (first, places), (second, others) = (inception.pooled_and_spatial(images) for images in (samples, reference))
    score = InceptionScore()
    score.update(inception.logits(first), 0)
    cover = precision_recall(first, second)
    expected = {
        "fd": frechet_distance(statistics_of(first), statistics_of(second)),
        "sfid": frechet_distance(statistics_of(places), statistics_of(others)),
        "is": score.mean,
        "precision": cover.precision,
        "recall": cover.recall,
    }
    assert list(result.metrics) == list(expected)
    assert result.metrics == pytest.approx(expected, rel=1e-12)
    assert list(result.labels().values()) == ["FID", "sFID", "IS", "Precision", "Recall"]
    assert "IS over 1 contiguous chunks of 5,000" in result.protocol_line


def test_a_reference_file_gives_its_moments_and_its_images(tmp_path: Path, inception, network) -> None:
    everything = draw_images(90)
    file = write_adm(tmp_path / "adm.npz", everything[:30], everything, inception)
    samples = draw_images(40) // 2

    given = evaluate_images(samples, file, inception)
    whole, part = (evaluate_images(samples, images, inception) for images in (everything, everything[:30]))

    for metric in ("fd", "sfid"):
        assert given.metrics[metric] == pytest.approx(whole.metrics[metric], rel=1e-9)
        assert given.metrics[metric] != pytest.approx(part.metrics[metric], rel=1e-3)
    for metric in ("precision", "recall"):
        assert given.metrics[metric] == part.metrics[metric]
    assert given.protocol["manifold"]["reference"] == 30
    assert given.protocol["reference"]["count"] is None
    # Another network has nothing to do with those moments.
    other = evaluate_images(samples, file, network, metrics=("fd",))
    assert other.metrics["fd"] == pytest.approx(part.metrics["fd"], rel=1e-9)
    assert other.protocol["reference"]["count"] == 30
    kept = sorted(path.name for path in (tmp_path / "adm.npz.features").iterdir())
    assert [name.split("-")[:2] for name in kept] == [["inception", "00000000"], ["stub", "00000000"]]


def test_moments_alone(tmp_path: Path, inception, network) -> None:
    everything, samples = draw_images(90), draw_images(40)
    file = write_adm(tmp_path / "adm.npz", None, everything, inception)
    plain = write_adm(tmp_path / "plain.npz", None, everything, inception, spatial=False)

    assert set(evaluate_images(samples, file, inception, metrics=("sfid", "fd", "is")).metrics) == {"fd", "sfid", "is"}
    with pytest.raises(EvaluationError, match="precision, recall need images"):
        evaluate_images(samples, file, inception)
    with pytest.raises(EvaluationError, match="holds no spatial moments"):
        evaluate_images(samples, plain, inception, metrics=("fd", "sfid"))
    with pytest.raises(EvaluationError, match="does not say which feature network"):
        evaluate_images(samples, file, network, metrics=("fd",))


def test_moments_of_another_width_are_refused(tmp_path: Path, inception) -> None:
    images = draw_images(20).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(4), sigma=np.eye(4))

    with pytest.raises(EvaluationError, match=r"'mu' of adm\.npz has 4 entries where Inception has"):
        load_reference(tmp_path / "adm.npz", inception)


def test_saved_statistics_stand_for_their_images(tmp_path: Path, inception) -> None:
    images, samples = draw_images(60), draw_images(30)
    load_reference(images, inception).save(tmp_path / "stats.npz")

    saved, live = (evaluate_images(samples, source, inception) for source in (tmp_path / "stats.npz", images))

    assert saved.metrics == pytest.approx(live.metrics, rel=1e-9)
    assert saved.protocol == live.protocol


def test_the_first_images_of_a_set() -> None:
    images = open_images(draw_images(20))

    for count in (1, 7, 20):
        batches = list(first_images(images, count).batches(6))
        assert torch.equal(torch.cat(batches), torch.cat(list(images.batches(20)))[:count])
    with pytest.raises(EvaluationError, match="There are 20 images in images in memory and 21 were asked for"):
        first_images(images, 21)


def test_published_values_are_compared_relatively(inception) -> None:
    images = draw_images(30)
    result = evaluate_images(images, images // 2, inception, metrics=("fd", "precision"))
    fd = result.metrics["fd"]

    assert parse_expected(["FID=2.27", "is=278.2"]) == {"fd": 2.27, "is": 278.2}
    assert compare_published(result, {"fd": fd * 1.009, "precision": 0.0}, 0.01).agrees
    assert not compare_published(result, {"fd": fd * 1.02}, 0.01).agrees
    assert compare_published(result, {"fd": fd * 1.02}, 0.1).record()["relative_differences"]["fd"] < 0
    with pytest.raises(ConfigError, match="gives no number"):
        parse_expected(["fd=nan"])


def test_several_results_share_one_table(inception) -> None:
    import io

    from rich.console import Console

    images = draw_images(30)
    results = {
        name: evaluate_images(images[:count], images, inception) for name, count in (("a", 20), ("b", 20), ("c", 25))
    }
    console = Console(file=io.StringIO(), width=400)
    console.print(results_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert "sFID" in text
    assert "Protocol of a, b: 20 samples" in text
    assert "Protocol of c: 25 samples" in text


def test_each_metric_on_real_images(shared_data: Path) -> None:
    """All in MobileNetV2's features of CIFAR-10, against scipy, torch-fidelity and all distances in float64."""
    import timm
    from safetensors.torch import load_file
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import cdist
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    from vrpo.evaluation.kernel import kernel_distance
    from vrpo.vision.encoders import load_feature_network
    from vrpo.vision.inception import spatial_features

    weights = shared_data / "mobilenetv2_imagenet_timm.safetensors"
    network = load_feature_network("mobilenetv2_100", weights=weights, input_size=64)
    maps = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=0).eval()
    maps.load_state_dict(load_file(weights), strict=False)
    batches = open_images(shared_data / "cifar10-test.zip").batches(10)
    images = torch.cat([next(batches) for _ in range(40)])
    halves = (images[::2], images[1::2])
    pooled = [extract_features(half, network) for half in halves]
    with torch.inference_mode():
        # A map of 2 x 2 positions, as Mixed_6d is one of 17 x 17.
        tops = [maps.forward_intermediates(half.float() / 255, intermediates_only=True)[3] for half in halves]
    spatial = [spatial_features(top).clone() for top in tops]

    for first, second in ((pooled[0][:, :64], pooled[1][:, :64]), spatial):
        x, y = first.double().numpy(), second.double().numpy()
        left, right, shift = np.cov(x, rowvar=False), np.cov(y, rowvar=False), x.mean(axis=0) - y.mean(axis=0)
        expected = shift @ shift + np.trace(left + right) - 2 * np.trace(sqrtm(left @ right).real)
        assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-6)
    score = InceptionScore(50)
    score.update(pooled[0], 0)
    expected_score = isc_features_to_metric(pooled[0], splits=4, shuffle=False)
    assert score.mean == pytest.approx(expected_score["inception_score_mean"], rel=1e-10)
    options = {"kid_subsets": 5, "kid_subset_size": 100, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 2020, "verbose": False}
    distance = kid_features_to_metric(pooled[0].double(), pooled[1].double(), **options)
    measured = kernel_distance(*pooled, subsets=5, subset_size=100)
    assert measured == pytest.approx(tuple(distance.values()), rel=1e-9)
    own = [cdist(half.double(), half.double()) for half in pooled]
    # The smallest distance of each row is the one to itself.
    radii = [np.sort(distances, axis=1)[:, 3] for distances in own]
    between = cdist(pooled[0].double(), pooled[1].double())
    expected_cover = (between <= radii[1]).any(1).mean(), (between <= radii[0][:, None]).any(0).mean()
    assert precision_recall(*pooled) == expected_cover
    assert all(0 < value < 1 for value in expected_cover)
