"""The projectors of an alignment under REPA's names and under ours, where they have REPA's form."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vrpo.config import AlignConfig
from vrpo.models.weights import repa_projectors

# Within whatever is wrapped around the objective that has them; copies of an old policy bear other names.
_OURS = re.compile(r"(?:objective\.)*projectors\.(\d{1,4})\.(.+)", re.DOTALL)
_THEIRS = re.compile(r"(\d{1,4})\.([024])\.(weight|bias)")
# Linear-SiLU-Linear-SiLU-Linear: REPA numbers the activations too.
_LAYERS = {"first": "0", "second": "2", "last": "4"}
_MLP = {f"{layer}.{leaf}" for layer in _LAYERS for leaf in ("weight", "bias")}


def to_repa(objective: Mapping[str, Tensor], align: AlignConfig) -> tuple[dict[str, Tensor], str | None]:
    """Return the projectors among an objective's tensors as REPA names them ("0.2.weight"), or why there are none."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in objective.items():
        match = _OURS.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[match[2]] = value
    if not found:
        return {}, f"align.objective {align.objective} trained none"
    if any(set(parts) != _MLP for parts in found.values()):
        return {}, "those of the run are convolutions"
    if len(align.depth) > 1:
        return {}, f"the run has some after each of {len(align.depth)} blocks, and REPA after one"
    projectors = {}
    for index, parts in found.items():
        for name, value in parts.items():
            layer, _, leaf = name.partition(".")
            projectors[f"{index}.{_LAYERS[layer]}.{leaf}"] = value
    return projectors, None


def from_repa(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published checkpoint's projectors as an objective names them; of another form than REPA's, none."""
    layers = {index: name for name, index in _LAYERS.items()}
    found = {}
    for name, value in repa_projectors(published).items():
        match = _THEIRS.fullmatch(name)
        if match is None:
            return {}
        found[f"projectors.{match[1]}.{layers[match[2]]}.{match[3]}"] = value
    return found


def count(projectors: Mapping[str, Tensor]) -> int:
    """Return how many projectors these tensors are."""
    return len(projectors) // len(_MLP)
