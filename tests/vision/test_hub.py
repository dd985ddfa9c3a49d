"""Published weights without a network are refused after one look, and leave no trace."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from vrpo.errors import CheckpointError
from vrpo.vision.encoders import load_encoder
from vrpo.vision.hub import asking_hub


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that were tried, on a machine without a network or proxy."""
    tried: list[Any] = []

    def refuse(address: Any, *arguments: Any, **options: Any) -> socket.socket:
        tried.append(address)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tried


@pytest.mark.parametrize("name", ["dinov2-vit-s", "transformers:nobody/has-this"])
def test_one_look_and_a_sentence(name: str, looks: list[Any]) -> None:
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(CheckpointError, match="could not be had"):
        load_encoder(name, grid=4)
    assert len(looks) == 1
    assert before == constants.HF_HUB_OFFLINE


def test_the_hub_is_off_only_inside_and_only_when_away(
    looks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail() -> None:
        with asking_hub("name"):
            assert constants.HF_HUB_OFFLINE
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not constants.HF_HUB_OFFLINE
    with asking_hub(tmp_path):
        assert not constants.HF_HUB_OFFLINE
    assert len(looks) == 1
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")
    with asking_hub("name"):
        assert not constants.HF_HUB_OFFLINE
    assert len(looks) == 1
