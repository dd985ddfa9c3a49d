"""The page of samples: right images and names, all text escaped, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pictures import noise_image
from PIL import Image

from autoencoder_files import save_autoencoder
from vrpo.cli import main
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import ArraySource

HOSTILE = "<script>alert('&')</script>"


def shown(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in found]


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "browse", *words])
    assert stop.value.code == 0


def test_pixels_names_and_latents(tmp_path: Path) -> None:
    images = np.stack([np.asarray(noise_image(seed, 16, 16)) for seed in range(20)])
    source = ArraySource(images, [i % 2 for i in range(20)], ["plain", HOSTILE], HOSTILE)
    autoencoder = save_autoencoder(tmp_path / "kl")
    for name, options in (("both", {}), ("bare", {"keep_pixels": False})):
        told = LatentOptions(str(autoencoder), **options)
        prepare(source, tmp_path / name, size=16, workers=1, progress=False, latents=told)
    out = tmp_path / "pages" / "page.html"
    run(str(tmp_path / "both"), "--html", str(out), "--count", "7", "--seed", "3")
    page = out.read_text()
    assert "<script" not in page
    assert "http" not in page.replace("<!doctype html>", "")
    assert "&lt;script&gt;" in page
    rows = np.sort(np.random.default_rng(3).choice(20, 7, replace=False))
    keys = re.findall(r"(\d+)</span></figcaption>", page)
    assert [int(key) for key in keys] == rows.tolist()
    pixels = ShardedDataset(tmp_path / "both").read(rows)[0]
    for image, expected in zip(shown(page), pixels, strict=True):
        np.testing.assert_array_equal(image, expected.permute(1, 2, 0).numpy())
    run(str(tmp_path / "both"), "--html", str(out), "--count", "7", "--seed", "3", "--decode")
    pages = [out.read_text()]
    beside = shown(pages[0])
    run(str(tmp_path / "bare"), "--html", str(out), "--count", "7", "--seed", "3", "--device", "cpu")
    pages.append(out.read_text())
    decoded = shown(pages[1])
    assert "Above the stored pixels, below the decoded latents." in pages[0]
    assert "The images are decoded from the latents." in pages[1]
    assert len(beside) == 14
    for image, expected in zip(beside[1::2], decoded, strict=True):
        np.testing.assert_array_equal(image, expected)


def test_names_of_any_content_are_shown_and_do_nothing(tmp_path: Path) -> None:
    names = [
        'a"><img src=x onerror=alert(1)>',
        "</b></figcaption><script>",
        "turned \u202egnp.exe",
        "line\n\x1b[31mred\x00",
        "half \ud800 a pair",
        "n" * 300,
        "&lt;b&gt;",
    ]
    images = np.stack([np.asarray(noise_image(seed, 16, 16)) for seed in range(len(names))])
    source = ArraySource(images, range(len(names)), names, names[0])
    prepare(source, tmp_path / "set", size=16, workers=1, progress=False)
    out = tmp_path / "page.html"
    run(str(tmp_path / "set"), "--html", str(out))

    elements: list[str] = []
    told: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            elements.append(tag)
            assert not any(name.startswith("on") for name, _ in attributes)
            told.extend(value or "" for name, value in attributes if tag == "b" and name == "title")

    page = out.read_text(encoding="utf-8")
    Reader().feed(page)
    assert elements.count("img") == elements.count("figure") == len(names)
    assert "script" not in elements
    assert told == [
        names[0],
        names[1],
        "turned \\u202egnp.exe",
        "line\\n\\x1b[31mred\\x00",
        "half \\ud800 a pair",
        names[5],
        names[6],
    ]
    assert all(character.isprintable() or character == "\n" for character in page)
