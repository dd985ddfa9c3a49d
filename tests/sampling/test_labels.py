"""The label of a sample is a function of its index, and classes have names."""

from __future__ import annotations

import pytest
import torch
from small import NAMES

from vrpo.errors import ConfigError
from vrpo.sampling import find_class, sample_labels


def test_label_policies() -> None:
    balanced = sample_labels(range(40), 4, "balanced", 0)
    assert balanced is not None
    assert balanced.bincount().tolist() == [10, 10, 10, 10]
    random = sample_labels(range(4000), 4, "random", 0)
    assert random is not None
    # Four standard deviations of a binomial around 1,000.
    assert (random.bincount() - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert torch.equal(random[100:200], sample_labels(range(100, 200), 4, "random", 0))  # type: ignore[arg-type]
    assert sample_labels(range(4), 0, "balanced", 0) is None


def test_labels_of_some_classes_alone() -> None:
    balanced = sample_labels(range(7), 10, "balanced", 0, (8, 3))
    assert balanced is not None
    assert balanced.tolist() == [8, 3, 8, 3, 8, 3, 8]
    drawn = sample_labels(range(200), 10, "random", 0, (8, 3))
    assert drawn is not None
    assert set(drawn.tolist()) == {3, 8}
    assert 60 < (drawn == 3).sum() < 140


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ("golden retriever", 1),
        ("Golden_Retriever", 1),
        ("tabby cat", 0),
        ("tabby, tabby cat", 0),
        ("tench", 2),
        ("2", 2),
        ("7", 3),
    ],
)
def test_classes_are_found_by_name_synonym_or_number(wanted: str, index: int) -> None:
    assert find_class(wanted, NAMES, 4) == index


@pytest.mark.parametrize(
    ("wanted", "names", "classes", "sentence"),
    [
        ("goldn retriever", NAMES, 4, "there is no class 'goldn retriever': did you mean 'golden retriever'?"),
        ("4", NAMES, 4, "there is no class '4': choose one of: tabby, tabby cat, golden retriever, tench, 7, or a "),
        ("4", NAMES, 4, "tench, 7, or a number from 0 to 3."),
        ("tench", (), 4, "knows no names: give a number from 0 to 3."),
        ("tench", (), 0, "--class 'tench' cannot be drawn, because the model has no classes: leave it out."),
    ],
)
def test_classes_that_are_not_there(wanted: str, names: tuple[str, ...], classes: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_class(wanted, names, classes)
    assert sentence in str(error.value)
