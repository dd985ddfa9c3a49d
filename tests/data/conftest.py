"""Small image sources that the data tests share."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pictures import encode, noise_image
from source_files import COUNT


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[[str, Mapping[str, bytes]], Path]:
    """Write files into a new folder, or into a zip where the name ends in .zip."""

    def write(name: str, files: Mapping[str, bytes]) -> Path:
        path = tmp_path / name
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w") as archive:
                for key, content in files.items():
                    archive.writestr(key, content)
        else:
            path.mkdir()
            for key, content in files.items():
                (path / key).parent.mkdir(parents=True, exist_ok=True)
                (path / key).write_bytes(content)
        return path

    return write


@pytest.fixture(scope="session")
def image_files() -> dict[str, bytes]:
    """Thirty images of three classes in odd shapes and both formats."""
    files = {}
    for i in range(30):
        kind = "PNG" if i % 2 else "JPEG"
        image = noise_image(i, 9 + 3 * (i % 7), 11 + 5 * (i % 4))
        files[f"{['cat', 'dog', 'eel'][i % 3]}/{i:02d}.{'png' if i % 2 else 'jpg'}"] = encode(image, kind)
    return files


@pytest.fixture(scope="session")
def files() -> list[bytes]:
    """The PNG files of COUNT images."""
    return [encode(noise_image(seed, 16, 16)) for seed in range(COUNT)]
