"""Files of images hold the pixels, whole or not at all, and never replace what is not theirs."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vrpo.errors import ConfigError
from vrpo.sampling.files import (
    RECORD,
    check_png_folder,
    grid_image,
    image_format,
    remove_pngs,
    write_grid,
    write_npz,
    write_pngs,
)


def pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)


def test_grid_holds_the_pixels_row_by_row(tmp_path: Path) -> None:
    images = torch.from_numpy(pictures(5)).permute(0, 3, 1, 2)
    sheet = grid_image(images, columns=2)
    assert sheet.shape == (14, 13, 3)
    assert (sheet[5:9, 7:13] == pictures(5)[3]).all()
    assert (sheet[4] == 255).all()
    write_grid(images, tmp_path / "grid.png", 2)
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == sheet).all()


@pytest.mark.parametrize("workers", [1, 3])
def test_pngs_hold_the_pixels_of_their_number(workers: int, tmp_path: Path) -> None:
    write_pngs(zip(range(3, 14), pictures(11), strict=True), tmp_path, workers)
    assert len(list(tmp_path.iterdir())) == 11
    for index, image in zip(range(3, 14), pictures(11), strict=True):
        assert (np.asarray(Image.open(tmp_path / f"{index:06d}.png")) == image).all()
    remove_pngs(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003.png", "000004.png"]


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 1, 2, 0, 5])])
def test_npz_is_what_numpy_reads_and_what_the_evaluation_reads(labels: torch.Tensor | None, tmp_path: Path) -> None:
    from vrpo.evaluation.images import open_images

    out = tmp_path / "images.npz"
    write_npz(iter([pictures(5)[:2], pictures(5)[2:]]), (5, 4, 6, 3), labels, out, "drawn so")
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == pictures(5)).all()
        assert ("arr_1" in arrays) == (labels is not None)
        if labels is not None:
            assert arrays["arr_1"].dtype == np.int64
            assert arrays["arr_1"].tolist() == labels.tolist()
        assert str(arrays["sampling"]) == "drawn so"
    read = torch.cat(list(open_images(out).batches(2)))
    assert (read.permute(0, 2, 3, 1).numpy() == pictures(5)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


def test_npz_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    out.write_bytes(b"earlier")

    def batches() -> Iterator[NDArray[np.uint8]]:
        yield pictures(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_npz(batches(), (5, 4, 6, 3), None, out, "")
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
    assert out.read_bytes() == b"earlier"


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ((), None),
        (("000000.png", "1000000.png", RECORD), None),
        ((RECORD,), None),
        (("000000.png", "000001.png"), "000000.png"),
        (("000000.png", RECORD, "notes.txt"), "notes.txt"),
        (("holiday.png", RECORD), "holiday.png"),
    ],
)
def test_only_images_of_ours_are_replaced(names: tuple[str, ...], named: str | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    if named is None:
        check_png_folder(tmp_path)
    else:
        with pytest.raises(ConfigError, match=f"holds '{named}', which vrpo sample did not write"):
            check_png_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("grid.png", "png"), ("images.npz", "npz"), ("new", "folder"), ("there.v2", "folder")]
)
def test_path_decides_the_format(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "there.v2").mkdir()
    assert image_format(tmp_path / name) == kind


def test_no_jpeg(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor"):
        image_format(tmp_path / "images.jpg")
