"""Objectives by name, their default depth, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from vrpo.alignment.build import TrunkShape, build_objective, default_depth
from vrpo.alignment.haste import Haste
from vrpo.alignment.objective import AlignmentBatch, Objective
from vrpo.alignment.static import Contrastive, Irepa, Repa
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError

SIZES = {"Ti": (192, 8, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def build(config: AlignConfig, size: str = "S", encoder_widths: tuple[int, ...] = (320,), tokens: int = 64):
    hidden, depth, heads = SIZES[size]
    return build_objective(config, TrunkShape(hidden, depth, heads, tokens, size), encoder_widths)


@pytest.mark.parametrize(
    ("size", "blocks", "depth"),
    [
        ("XL", 28, 8),
        ("L", 24, 8),
        ("B", 12, 4),
        ("S", 12, 4),
        ("Ti", 8, 3),
        ("N", 4, 1),
        ("N", 2, 1),
        ("N", 1, 1),
        ("L", 6, 5),
        ("S", 3, 2),
    ],
)
def test_default_depth(size: str, blocks: int, depth: int) -> None:
    assert default_depth(size, blocks) == depth


@pytest.mark.parametrize("size", ["Ti", "S", "B"])
@pytest.mark.parametrize(
    ("name", "kind"), [("repa", Repa), ("irepa", Irepa), ("contrastive", Contrastive), ("haste", Haste)]
)
def test_every_size_aligns(size: str, name: str, kind: type[Repa]) -> None:
    objective = build(AlignConfig(objective=name, projector_width=16), size)
    hidden, blocks, heads = SIZES[size]
    assert type(objective) is kind
    assert objective.name == name
    assert objective.depths == (default_depth(size, blocks),)
    batch = AlignmentBatch(
        targets=(torch.randn(2, 64, 320),),
        time=torch.rand(2),
        clean=torch.randn(2, 3, 32, 32),
        images=None,
        images_seen=0,
        budget=1000,
        sample_weight=0.5,
    )
    taps = objective.taps(batch)
    h = torch.randn(2, 64, hidden, requires_grad=True)
    for tap in taps.attention.values():
        tap(*torch.randn(3, 2, heads, 64, hidden // heads))
    taps.tokens[objective.depths[0]](h)
    objective.loss(lambda: pytest.fail("not called")).backward()
    assert h.grad.abs().sum() > 0


def test_published_projector_size() -> None:
    objective = build(AlignConfig(), "XL", encoder_widths=(768,), tokens=256)
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    assert parameters == 1153 * 2048 + 2049 * 2048 + 2049 * 768


def test_one_head_for_each_depth_and_encoder() -> None:
    objective = build(AlignConfig(depth=(2, 5)), encoder_widths=(320, 40))
    assert objective.heads == ((2, 0), (2, 1), (5, 0), (5, 1))
    assert [projector.last.out_features for projector in objective.projectors] == [320, 40, 320, 40]


def test_none_has_no_parameters_and_needs_no_encoder() -> None:
    objective = build(AlignConfig(objective="none"), encoder_widths=())
    assert type(objective) is Objective
    assert list(objective.parameters()) == []


def test_vrpo_is_imported_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vrpo.alignment.vrpo")
    module.Vrpo = lambda config, **shape: shape
    monkeypatch.setitem(sys.modules, "vrpo.alignment.vrpo", module)
    assert build(AlignConfig(objective="vrpo", depth=(2, 3))) == {
        "hidden_size": 384,
        "depths": (2, 3),
        "encoder_widths": (320,),
        "tokens": 64,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 13}, "align.depth 13 is not a block of this model, which has 12: use 12, the deepest."),
        ({"depth": 0}, "align.depth 0 is not a block of this model, which has 12: use 1, the first."),
        ({"depth": (3, 3)}, "align.depth 3, 3 names a block twice: name each once."),
        (
            {"haste": {"attention_depths": (2, 0)}},
            "align.haste.attention_depths 0 is not a block of this model, which has 12: use 1, the first.",
        ),
    ],
)
def test_depths_that_do_not_exist_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(AlignConfig(**config))
    assert str(caught.value) == message


def test_missing_encoder_and_oblong_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'repa' needs an encoder: set encoder\.name"):
        build(AlignConfig(), encoder_widths=())
    with pytest.raises(ConfigError, match="square grid but the model has 32 tokens"):
        build(AlignConfig(objective="irepa"), tokens=32)
    assert isinstance(build(AlignConfig(objective="repa"), tokens=32), Repa)
