"""Who may import whom: a table of the house's rooms, from the ground up, and the imports as they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# A room (a package or a module right below `vrpo`) may import the rooms of lines above its own, and no others.
LAYERS = (
    ("vrpo", "errors", "presets", "randomness", "wording"),
    ("devices", "files", "free_keys", "mapped", "pixels", "processes", "untrusted"),
    ("config",),
    ("checkpoints", "config_load", "runs"),
    ("diffusion", "models", "vision"),
    ("alignment", "data"),
    ("decoding",),
    ("evaluation", "sampling"),
    ("report", "training"),
    ("display", "planning", "publish"),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def modules(source: Path) -> dict[str, str]:
    """Return the text of every module of the package in ``source``, by dotted name."""
    found = {}
    for file in (source / "vrpo").rglob("*.py"):
        name = ".".join(file.relative_to(source).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file.read_text("utf-8")
    return found


def imported(text: str) -> Iterator[str]:
    """Yield what a module imports of ``vrpo`` by dotted name, for types alone and within functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are imported by their whole names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "vrpo")


def room(name: str) -> str:
    """Return the room of a module, or of a name in one: ``sampling`` of ``vrpo.sampling.draw.Order``."""
    return f"{name}.vrpo".split(".")[1]


def offences(texts: Mapping[str, str]) -> list[str]:
    """Return each import of a room that is not on a line above that of the importing module."""
    floor = {name: level for level, names in enumerate(LAYERS) for name in names}
    rooms = {room(name) for name in texts} | {"vrpo"}
    found = []
    for importer, text in sorted(texts.items()):
        for name in sorted(set(imported(text))):
            other = room(name) if room(name) in rooms else "vrpo"  # a name in the package itself, such as its version
            if other != room(importer) and floor[other] >= floor[room(importer)]:
                found.append(f"{importer} imports {name}")
    return found


def test_every_room_has_one_place() -> None:
    placed = [name for names in LAYERS for name in names]
    assert len(placed) == len(set(placed))
    assert set(placed) == {room(name) for name in modules(SOURCE)}


def test_no_room_imports_one_beside_or_above_it() -> None:
    assert offences(modules(SOURCE)) == []


@pytest.mark.parametrize(
    "text",
    [
        "from vrpo.training.trainer import train",
        "import vrpo.training.trainer",
        "from vrpo import training",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vrpo.training.step import DenoisingStep",
        "def draw():\n    from vrpo.training.step import DenoisingStep",
        "from vrpo.evaluation.evaluate import METRICS",
    ],
    ids=["from", "import", "package", "types", "function", "beside"],
)
def test_an_import_upwards_or_sideways_is_found(text: str) -> None:
    texts = {"vrpo": "", "vrpo.training": "", "vrpo.evaluation": "", "vrpo.sampling": ""}
    assert offences({**texts, "vrpo.sampling.draw": "from vrpo.models.taps import Taps"}) == []
    assert len(offences({**texts, "vrpo.sampling.draw": text})) == 1
