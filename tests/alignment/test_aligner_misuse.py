"""What the drop-in cannot do is told in one sentence, at construction or at the step."""

from __future__ import annotations

from typing import Any

import pytest
from loop import (
    Loop,
    Patches,
    make,
    noised,
    pictures,
    run,
    trunk,
)

from vrpo.alignment import Aligner
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError


def test_reentrant_checkpointing_is_refused() -> None:
    model = trunk()
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        run(model, make(model), forward=Loop(model, True))


# -- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "over", "sentence"),
    [
        ("block.1", {}, r"the model has no block 'block\.1': did you mean 'blocks\.1'\?"),
        ("", {}, "the model has no block ''"),
        ([], {}, "must name one block or several"),
        (["blocks.1", "blocks.1"], {}, "must name one block or several, each once"),
        ("blocks.1", {"objective": "vrpoo"}, r"no objective 'vrpoo': did you mean 'vrpo'\?"),
        ("blocks.1", {"objective": "haste"}, "'haste' reads queries and keys"),
        ("blocks.1", {"objective": AlignConfig(depth=(2,))}, "align.depth is set"),
        ("blocks.1", {"tokens": 17, "encoders": "resnet10t"}, "'resnet10t' needs a square grid"),
    ],
)
def test_construction_refuses_in_one_sentence(blocks: Any, over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(trunk(), blocks, **over)


@pytest.mark.parametrize(
    ("blocks", "over", "sentence"),
    [
        ("blocks", {}, "'blocks' did not run with gradients .* name a block rather than a list"),
        ("time_embedding", {}, r"'time_embedding' returns a tensor of shape \(8, 32\), not tokens"),
        ("blocks.1", {"hidden_size": 64}, r"shape \(8, 16, 32\), not tokens \(B, N, 64\)"),
        ("blocks.1", {"encoders": Patches(grid=2)}, "an encoder gives 4 tokens an image, and Aligner was built for 16"),
        ("blocks.1", {"tokens": 4, "encoders": Patches(grid=2)}, "gives 16 tokens an image, where tokens is 4"),
        ("blocks.1", {"select": slice(1, None)}, "gives 15 tokens an image, where tokens is 16"),
    ],
)
def test_a_step_refuses_in_one_sentence(blocks: str, over: dict[str, Any], sentence: str) -> None:
    model = trunk()
    with pytest.raises(ConfigError, match=sentence):
        run(model, make(model, blocks, **over), 1)


def test_misuse_is_told_in_one_sentence() -> None:
    model = trunk()
    aligner, (x, t) = make(model), noised()
    with pytest.raises(ConfigError, match="goes with a step"):
        aligner.loss()
    with pytest.raises(ConfigError, match=r"integer times.*t / 999"), aligner.step(pictures(0), (t * 999).long()):
        pass
    with pytest.raises(ConfigError, match="give uint8 pixels"), aligner.step(pictures(0).float(), t):
        pass
    with pytest.raises(ConfigError, match="no images"), aligner.step(None, t):
        pass
    with pytest.raises(ConfigError, match="4 times for 8 images"), aligner.step(pictures(0), t[:4]):
        pass
    with aligner.step(pictures(0), t):
        model(x, t)
    with pytest.raises(ConfigError, match=r"add aligner\.loss\(\)"):
        aligner.update()


@pytest.mark.parametrize(
    ("align", "sentence"),
    [
        ({"objective": "reg"}, "align.token is one more token"),
        ({"objective": "repi"}, "align.scaffold acts on keys and values"),
        ({"objective": "vrpo", "scaffold": {"supply": "advantage"}}, "align.scaffold acts on keys and values"),
    ],
)
def test_what_acts_inside_blocks_is_refused(align: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Aligner(
            trunk(), "blocks.1", hidden_size=32, tokens=16, encoders=Patches(), budget=8,
            objective=AlignConfig.model_validate(align),
        )  # fmt: skip
