"""The table of encoders against the libraries and the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vrpo.vision.catalogue import ENCODERS, table

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
LICENCES = {"apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC-BY-NC-4.0", "dinov3-license": "DINOv3 License"}
LARGE = ("-l", "-g", "-g-reg", "-l-reg", "-h", "-7b", "-so400m")


def test_the_documented_table_is_the_catalogue() -> None:
    assert table() in PAGE.read_text("utf-8")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name.endswith(LARGE) else ()) for name in ENCODERS]
)
def test_an_entry_is_what_timm_builds(name: str) -> None:
    import timm

    entry = ENCODERS[name]
    with torch.device("meta"):
        network = timm.create_model(entry.timm, num_classes=0)
    assert (network.embed_dim, len(network.blocks)) == (entry.width, entry.depth)
    assert network.patch_embed.patch_size == (entry.patch, entry.patch)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_entry_is_published_as_it_says(name: str) -> None:
    import timm

    entry = ENCODERS[name]
    assert timm.is_model(entry.timm.split(".")[0])
    if not entry.published:
        return
    config = timm.get_pretrained_cfg(entry.timm)
    assert entry.timm in timm.list_pretrained()
    if not name.startswith("clip"):  # timm gives its conversion of OpenAI's files its own licence
        assert LICENCES[config.license] == entry.licence


def test_tokens_fit_the_usual_trunks() -> None:
    sizes = {name: (entry.input_size(16), entry.input_size(32)) for name, entry in ENCODERS.items()}
    assert sizes["dinov2-vit-b"] == (224, 448)
    assert sizes["siglip2-vit-b"] == (256, 512)
