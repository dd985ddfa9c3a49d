"""The Inception Score against its definition and torch-fidelity's function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vrpo.errors import EvaluationError
from vrpo.evaluation.inception_score import InceptionScore


def score_of(logits: Tensor, chunk: int, batch: int) -> InceptionScore:
    score = InceptionScore(chunk)
    for start in range(0, len(logits), batch):
        score.update(logits[start : start + batch], start)
    return score


def definition(logits: Tensor, chunk: int) -> list[float]:
    probabilities = logits.double().softmax(dim=1).numpy()
    scores = []
    for start in range(0, len(probabilities), chunk):
        p = probabilities[start : start + chunk]
        divergence = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
        scores.append(float(np.exp(divergence.mean())))
    return scores


@pytest.mark.parametrize("batch", [1, 7, 25, 1000])
def test_chunks_are_contiguous_and_the_last_may_be_short(batch: int) -> None:
    logits = torch.randn(103, 11) * 3

    score = score_of(logits, 25, batch)

    assert score.scores == pytest.approx(definition(logits, 25), rel=1e-12)
    assert len(score.scores) == 5
    assert score.mean == pytest.approx(np.mean(definition(logits, 25)), rel=1e-12)
    assert score.std == pytest.approx(np.std(definition(logits, 25)), rel=1e-9)


def test_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(200, 30) * 2
    expected = isc_features_to_metric(logits, splits=4, shuffle=False)

    score = score_of(logits, 50, 64)

    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_merges_over_processes() -> None:
    logits = torch.randn(103, 11) * 3
    whole, merged = score_of(logits, 25, 103), InceptionScore(25)
    # Two processes that take turns, as samples are dealt out to ranks.
    for rank in range(2):
        share = InceptionScore(25)
        for index in range(rank, 103, 2):
            share.update(logits[index : index + 1], index)
        merged.merge(share)

    np.testing.assert_allclose(merged.scores, whole.scores, rtol=0, atol=1e-10)
    with pytest.raises(EvaluationError, match="chunks of 25 and 30 cannot be merged"):
        merged.merge(InceptionScore(30))


def test_bounds_of_the_score() -> None:
    sure = torch.eye(10).repeat(20, 1) * 1e4
    assert score_of(sure, 200, 64).mean == pytest.approx(10, rel=1e-12)
    assert score_of(torch.ones(50, 10), 50, 64).mean == pytest.approx(1, rel=1e-12)


def test_misuse_is_one_sentence() -> None:
    with pytest.raises(EvaluationError, match="NaN"):
        InceptionScore().update(torch.full((2, 3), torch.nan), 0)
    with pytest.raises(EvaluationError, match="there are none"):
        _ = InceptionScore().mean
