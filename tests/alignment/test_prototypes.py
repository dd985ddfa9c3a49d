"""Class prototypes against a plain loop in float64."""

from __future__ import annotations

import numpy as np
import torch

from vrpo.alignment.projector import unit
from vrpo.alignment.prototypes import ROWS, Prototypes

CLASSES, WIDTHS = 5, (6, 3)


def test_means_are_those_of_all_images_counted() -> None:
    prototypes = Prototypes(CLASSES, WIDTHS)
    sums = [np.zeros((CLASSES, width)) for width in WIDTHS]
    counts = np.zeros(CLASSES)
    for step in range(6):
        labels = torch.randint(0, CLASSES - 1, (ROWS + step,))  # the last class is never met
        targets = [3 * torch.randn(len(labels), 4, width) + 1 for width in WIDTHS]
        prototypes.add(targets, labels, unit)
        for row in range(ROWS):
            counts[labels[row]] += 1
            for total, tokens in zip(sums, targets, strict=True):
                vectors = tokens[row].double().numpy()
                total[labels[row]] += (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    assert prototypes.counts.tolist() == counts.tolist()
    for mean, total in zip(prototypes.means, sums, strict=True):
        np.testing.assert_allclose(mean.numpy(), total / np.maximum(counts, 1)[:, None], atol=1e-6)


def test_state_goes_through_a_checkpoint_and_may_be_absent() -> None:
    prototypes = Prototypes(CLASSES, WIDTHS)
    prototypes.add([torch.randn(2, 4, width) for width in WIDTHS], torch.tensor([1, 3]), unit)
    state = {name: value.clone() for name, value in prototypes.state().items()}
    other = torch.zeros(1)
    again = Prototypes(CLASSES, WIDTHS)
    assert again.load({**state, "projectors.0.first.weight": other}) == {"projectors.0.first.weight": other}
    assert all(torch.equal(value, state[name]) for name, value in again.state().items())
    assert Prototypes(CLASSES, WIDTHS).load({"kept": other}) == {"kept": other}
    assert Prototypes(0, WIDTHS).state() == {}
    assert Prototypes(CLASSES, ()).state() == {}
