"""Frechet distance and its statistics against independent definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vrpo.errors import EvaluationError
from vrpo.evaluation.frechet import FeatureStatistics, frechet_distance

Array = NDArray[np.float64]


def statistics_of(features: NDArray | torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics


def definition(first: Array, second: Array) -> float:
    """Dowson and Landau's formula with a general matrix square root, for well-conditioned covariances."""
    from scipy.linalg import sqrtm

    left, right = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shift = first.mean(axis=0) - second.mean(axis=0)
    return float(shift @ shift + np.trace(left + right) - 2 * np.trace(sqrtm(left @ right).real))


def precise(first: Array, second: Array) -> float:
    """The same for any rank, by the Gram matrix of the samples in 60 digits.

    Non-zero eigenvalues of C1 C2 are those of K K^T / ((n - 1) (m - 1)) with K = X Y^T of centred rows.
    """
    import mpmath

    with mpmath.workdps(60):
        # Arrays of 60-digit numbers: numpy's operators then work in that precision.
        x, y = (np.vectorize(mpmath.mpf, otypes=[object])(rows) for rows in (first, second))
        shift = x.sum(axis=0) / len(x) - y.sum(axis=0) / len(y)
        x, y = ((rows - rows.sum(axis=0) / len(rows)) / mpmath.sqrt(len(rows) - 1) for rows in (x, y))
        cross = x @ y.T
        values = mpmath.eigsy(mpmath.matrix((cross @ cross.T).tolist()), eigvals_only=True)
        root = mpmath.fsum(mpmath.sqrt(abs(value)) for value in values)
        return float((shift**2).sum() + (x**2).sum() + (y**2).sum() - 2 * root)


def test_matches_the_definition_on_correlated_features(random: np.random.Generator) -> None:
    mix = random.standard_normal((2, 24, 24))
    first = random.standard_normal((400, 24)) @ mix[0] + 3
    second = random.standard_normal((300, 24)) @ mix[1]

    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(
        definition(first, second), rel=1e-10
    )


@pytest.mark.parametrize(
    ("samples", "reference", "rank"),
    [(9, 12, None), (9, 200, None), (200, 12, None), (60, 50, 4), (9, 200, 4)],
    ids=["both few", "few against many", "many against few", "rank-deficient", "few and rank-deficient"],
)
def test_singular_covariances_match_sixty_digits(
    random: np.random.Generator, samples: int, reference: int, rank: int | None
) -> None:
    width = 16

    def draw(count: int) -> Array:
        if rank is None:
            return random.standard_normal((count, width)) * np.geomspace(1, 1e-3, width) + 1
        basis = random.standard_normal((rank, width))
        return random.standard_normal((count, rank)) @ basis

    # The smaller set goes first into the Gram product, which keeps the high-precision eigenvalues few.
    first, second = draw(samples), draw(reference)
    expected = precise(*sorted((first, second), key=len))

    measured = frechet_distance(statistics_of(first), statistics_of(second))

    assert measured == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_against_full_rank_matches_sixty_digits(random: np.random.Generator) -> None:
    # Rounding makes zero eigenvalues 1e-16 of the largest: their square roots against a full-rank covariance would
    # add 1e-8 for each of them.
    first = random.standard_normal((40, 3)) @ random.standard_normal((3, 32)) * 3
    second = random.standard_normal((100, 32))

    measured = frechet_distance(statistics_of(first), statistics_of(second))

    assert measured == pytest.approx(precise(first, second), rel=1e-11)


def test_statistics_without_rows_serve_singular_covariances(random: np.random.Generator, tmp_path) -> None:
    # Saved moments have lost the rows: the rank has to be found again from the eigenvalues and the count.
    first, second = random.standard_normal((9, 16)), random.standard_normal((200, 16)) + 0.1
    statistics_of(first).save(tmp_path / "first.npz")

    measured = frechet_distance(FeatureStatistics.load(tmp_path / "first.npz"), statistics_of(second))

    assert measured == pytest.approx(precise(first, second), rel=1e-6)


@pytest.mark.parametrize(("count", "smallest"), [(14, 1e-5), (9, 1e-9)])
def test_nearly_singular_covariance_matches_sixty_digits(
    random: np.random.Generator, count: int, smallest: float
) -> None:
    scales = np.geomspace(1, smallest, 10)
    # Rotated, small scales stand in no coordinate of their own.
    rotation = np.linalg.qr(random.standard_normal((10, 10)))[0]
    first = random.standard_normal((count, 10)) * scales @ rotation
    second = random.standard_normal((count + 1, 10)) * scales[::-1] @ rotation

    measured = frechet_distance(statistics_of(first), statistics_of(second))

    assert measured == pytest.approx(precise(first, second), rel=1e-11)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    means, deviations = np.array([[0.0, 1, 5], [1.0, -1, 5]]), np.array([[1.0, 2, 0], [3.0, 0.5, 0]])
    first, second = (FeatureStatistics.from_moments(m, np.diag(s**2)) for m, s in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()

    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [5, 40, 5000])
def test_zero_for_identical_sets_and_symmetric(random: np.random.Generator, count: int) -> None:
    first = random.standard_normal((count, 20)) @ random.standard_normal((20, 20)) * 10 + 100
    second = random.standard_normal((30, 20))
    scale = first.var(axis=0).sum()

    assert frechet_distance(statistics_of(first), statistics_of(first.copy())) <= 1e-12 * scale
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(
        frechet_distance(statistics_of(second), statistics_of(first)), rel=1e-12
    )


def test_constant_features_have_distance_of_their_means() -> None:
    first, second = np.full((6, 3), 2.0), np.full((9, 3), 1.0)

    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(3.0, rel=1e-14)


@pytest.mark.parametrize("sizes", [[1] * 50 + [4046, 4096, 809], [4096, 4096, 809], [37] * 243 + [10]])
def test_any_batching_gives_the_same_bits(random: np.random.Generator, sizes: list[int]) -> None:
    features = (random.standard_normal((9001, 6)) * [1, 1e-3, 10, 1, 1, 1] + 1e4).astype(np.float32)
    whole, parts = statistics_of(features), FeatureStatistics()
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        parts.update(torch.from_numpy(part))

    assert parts.count == 9001
    assert np.array_equal(parts.mean, whole.mean)
    assert np.array_equal(parts.covariance, whole.covariance)


def test_moments_keep_their_digits_under_a_large_offset(random: np.random.Generator) -> None:
    # The textbook sum of squares would keep four digits here: 1e6 squared is 1e12.
    centred = random.standard_normal((5000, 3))
    centred = np.round(centred * 64) / 64

    measured = statistics_of(centred + 1e6)

    np.testing.assert_allclose(measured.covariance, np.cov(centred, rowvar=False), rtol=0, atol=1e-10)


def test_merge_equals_one_stream(random: np.random.Generator) -> None:
    features = random.standard_normal((10_000, 5)) + np.array([0, 10, 100, 1000, 1e4])
    merged = FeatureStatistics()
    for part in np.split(features, [300, 5000, 9100]):
        merged.merge(statistics_of(part))

    assert merged.count == 10_000
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-10)


def test_merge_leaves_the_other_unchanged(random: np.random.Generator) -> None:
    other = statistics_of(random.standard_normal((5000, 3)))
    covariance = other.covariance.copy()
    merged = statistics_of(random.standard_normal((5000, 3)) + 5)

    merged.merge(other)
    merged.update(np.ones((5000, 3)))

    assert np.array_equal(other.covariance, covariance)
    assert other.count == 5000


def test_saved_statistics_return(random: np.random.Generator, tmp_path) -> None:
    statistics = statistics_of(random.standard_normal((50, 4)))
    statistics.save(tmp_path / "statistics.npz", note="digits")

    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"mu", "sigma", "count", "note"}
    loaded = FeatureStatistics.load(tmp_path / "statistics.npz")

    assert loaded.count == 50
    np.testing.assert_allclose(loaded.covariance, statistics.covariance, rtol=1e-15)


def test_adm_statistics_without_count_are_read(random: np.random.Generator, tmp_path) -> None:
    features = random.standard_normal((50, 4))
    np.savez(tmp_path / "adm.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))

    loaded = FeatureStatistics.load(tmp_path / "adm.npz")

    assert loaded.count is None
    assert frechet_distance(loaded, statistics_of(features)) < 1e-12
    with pytest.raises(EvaluationError, match="without a sample count"):
        loaded.update(features)


def test_misuse_is_one_sentence(random: np.random.Generator, tmp_path) -> None:
    statistics = statistics_of(random.standard_normal((5, 4)))
    with pytest.raises(EvaluationError, match="4 and 3 dimensions"):
        frechet_distance(statistics, statistics_of(random.standard_normal((5, 3))))
    with pytest.raises(EvaluationError, match="4 dimensions"):
        statistics.update(np.ones((2, 3)))
    with pytest.raises(EvaluationError, match="NaN"):
        statistics.update(np.array([[1.0, np.nan, 0, 0]]))
    with pytest.raises(EvaluationError, match="at least 2 images, and 1 was given; give more images"):
        frechet_distance(statistics, statistics_of(np.ones((1, 4))))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(EvaluationError, match=r"text\.npz is no readable"):
        FeatureStatistics.load(tmp_path / "text.npz")
