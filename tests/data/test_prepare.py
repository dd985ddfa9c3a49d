"""Preparing: the same bytes however it is done or interrupted, and bad input that loses nothing."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, noise_image
from PIL import Image

import vrpo.data.shards as shards
from vrpo.data.journal import JOURNAL
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset, verify_dataset
from vrpo.data.sources import ArraySource
from vrpo.data.transforms import decode
from vrpo.errors import ConfigError, DataError

SIZE = 8
SHARD = 7 * 3 * SIZE * SIZE  # seven images to a shard


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def make(source: Path, out: Path, **options):
    return prepare(source, out, **({"size": SIZE, "shard_bytes": SHARD, "progress": False} | options))


@pytest.fixture
def folder(write_tree, image_files) -> Path:
    return write_tree("images", image_files)


@pytest.fixture
def reference(folder, tmp_path) -> Path:
    """The folder's images, prepared without interruption."""
    make(folder, tmp_path / "reference", workers=1)
    return tmp_path / "reference"


def test_every_image_is_there_in_order_with_its_label(folder, reference, image_files):
    dataset = ShardedDataset(reference)
    pixels, labels = dataset.read(np.arange(30))
    for i, key in enumerate(sorted(image_files)):
        assert dataset.key(i) == key
        np.testing.assert_array_equal(pixels[i].numpy(), decode(image_files[key], SIZE)[0])
        assert dataset.class_names[labels[i]] == key.split("/")[0]
    manifest = dataset.manifest
    assert manifest.class_counts == (10, 10, 10)
    assert (manifest.source.name, manifest.source.kind) == ("images", "folder")
    assert sorted(contents(reference)) == ["manifest.json", *(f"shard-{i:05d}.safetensors" for i in range(5))]
    assert str(folder.parent) not in (reference / "manifest.json").read_text()


def test_bytes_do_not_depend_on_workers_or_container(write_tree, image_files, folder, reference, tmp_path):
    make(folder, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(reference)
    make(write_tree("images.zip", image_files), tmp_path / "zip", workers=2)
    from_zip, from_folder = contents(tmp_path / "zip"), contents(reference)
    assert from_zip.pop("manifest.json") != from_folder.pop("manifest.json")
    assert from_zip == from_folder


def test_repeating_does_nothing(folder, reference):
    before = {file.name: file.stat().st_mtime_ns for file in reference.iterdir()}
    result = make(folder, reference)
    assert result.already_complete
    assert "nothing to do" in result.summary()
    assert {file.name: file.stat().st_mtime_ns for file in reference.iterdir()} == before


@pytest.mark.parametrize("done", [0, 6, 7, 20, 29])
def test_interrupted_it_continues_at_the_shard(folder, reference, tmp_path, done, monkeypatch):
    monkeypatch.setattr("vrpo.data.prepare._TASK_IMAGES", 1)

    def interrupt(images: int, total: int) -> None:
        assert total == 30
        if images > done:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(folder, out, workers=1, progress=interrupt)
    with pytest.raises(DataError, match="no prepared data set"):
        ShardedDataset(out)
    result = make(folder, out, workers=1)
    # The call that interrupts comes after image ``done + 1``, and after the shard that ends there.
    assert result.resumed_shards == (5 if done == 29 else (done + 1) // 7)
    assert result.images_decoded == max(0, 30 - 7 * result.resumed_shards)
    assert contents(out) == contents(reference)


def test_a_torn_journal_or_a_lost_shard_is_made_again(folder, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("vrpo.data.prepare._TASK_IMAGES", 1)
    out = tmp_path / "out"

    def interrupt(images: int, total: int) -> None:
        if images > 22:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, out, workers=1, progress=interrupt)
    (out / JOURNAL).write_bytes((out / JOURNAL).read_bytes()[:-40])
    (out / "shard-00001.safetensors").write_bytes(b"cut")
    (out / ".shard-00003.safetensors.1.tmp").write_bytes(b"half a shard")
    assert make(folder, out, workers=1).resumed_shards == 1
    assert contents(out) == contents(reference)


SCRIPT = """
import multiprocessing, signal, sys, time
import vrpo.data.prepare as module

def report(done, total):
    children = [child.pid for child in multiprocessing.active_children()]
    print(done, *children, flush=True)
    time.sleep(0.05)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    module._TASK_IMAGES = 2
    module.prepare(sys.argv[1], sys.argv[2], size=8, shard_bytes=7 * 192, workers=2, progress=report)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for worker processes in /proc")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_it_leaves_no_worker_and_continues_to_the_same_bytes(folder, reference, tmp_path, kill):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, folder, out],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    workers: list[int] = []
    for line in process.stdout:
        done, *workers = map(int, line.split())
        if done > 14:
            break
    if kill == signal.SIGKILL:
        os.kill(process.pid, kill)
    else:
        # Ctrl-C reaches the workers too, and wrappers pass it on a second time.
        os.killpg(process.pid, kill)
        time.sleep(0.02)
        os.killpg(process.pid, kill)
    process.stdout.close()
    process.wait(timeout=20)
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert not (out / "manifest.json").exists()
    assert make(folder, out).resumed_shards >= 2
    assert contents(out) == contents(reference)


def test_a_lost_worker_is_one_sentence(tmp_path):
    # Enough work that it cannot all be done when the first image is reported.
    folder = tmp_path / "large"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for index in range(120):
        Image.fromarray(np.roll(noise, index)).save(folder / f"{index:03d}.png", compress_level=0)

    def report(done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    named = (
        r"^decoding process \d+, one of 2, was killed by SIGKILL, as the system does where memory runs out, "
        r"at '\d{3}\.png' to '\d{3}\.png': repeat with fewer --workers than 2"
    )
    with pytest.raises(DataError, match=named):
        make(folder, tmp_path / "out", workers=2, progress=report)
    assert make(folder, tmp_path / "out", workers=2).manifest.counts.images == 120


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 16}, "prepared with size 8, not 16"),
        ({"flip": True}, "prepared with flip none, not random"),
        ({"max_pixels": 10**6}, "max_pixels 178000000, not 1000000"),
        ({"shard_bytes": 2 * SHARD}, "shards of 7 images, not 14"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_are_refused(folder, reference, tmp_path, options, words, finished):
    out = reference
    if not finished:
        out = tmp_path / "begun"
        with pytest.raises(ZeroDivisionError):
            make(folder, out, workers=1, progress=lambda done, total: 1 // 0)
    before = contents(out)
    with pytest.raises(DataError, match=words):
        make(folder, out, **options)
    assert contents(out) == before


def test_a_changed_source_is_noticed(folder, reference):
    (folder / "cat" / "new.png").write_bytes(encode(noise_image(0, 9, 9)))
    with pytest.raises(DataError, match="before its files changed"):
        make(folder, reference)


def test_changed_arrays_are_noticed(tmp_path):
    images = np.zeros((3, 8, 8, 1), np.uint8)
    prepare(ArraySource(images, None, [], "a"), tmp_path / "out", size=8, progress=False)
    with pytest.raises(DataError, match="before its files changed"):
        prepare(ArraySource(images + 1, None, [], "a"), tmp_path / "out", size=8, progress=False)


def test_a_folder_with_anything_else_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"not empty .* 'thesis.tex'"):
        make(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.tex": b"precious"}
    with pytest.raises(DataError, match="inside the source"):
        make(folder, folder / "out")
    with pytest.raises(ConfigError, match="at least 1"):
        make(folder, tmp_path / "new", size=0)


def spoil(files: dict[str, bytes]) -> dict[str, bytes]:
    """Add an empty file, text under an image's name and a cut JPEG; leave one tiny image as it is."""
    jpeg = encode(noise_image(0, 40, 40), "JPEG")
    return files | {
        "cat/05.png": b"",
        "dog/text.png": b"not an image",
        "eel/cut.jpg": jpeg[: len(jpeg) // 2],
        "eel/tiny.png": encode(noise_image(0, 1, 1)),
        "readme.txt": b"",
    }


@pytest.mark.parametrize("container", ["images", "images.zip"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_listed_and_the_others_kept(write_tree, image_files, tmp_path, container, workers):
    result = make(write_tree(container, spoil(image_files)), tmp_path / "out", workers=workers)
    manifest = result.manifest
    assert [image.key for image in manifest.bad] == ["cat/05.png", "dog/text.png", "eel/cut.jpg"]
    assert [image.reason.split()[0] for image in manifest.bad] == ["the", "its", "it"]
    assert manifest.counts.model_dump() == {"images": 31, "bad": 3, "ignored": 1, "upscaled": 1}
    assert manifest.upscaled == ("eel/tiny.png",)
    assert manifest.class_counts == (10, 10, 11)
    summary = result.summary()
    assert "3 could not be read" in summary
    assert "1 are smaller than 8 pixels" in summary
    assert "1 files that are not images" in summary
    dataset = ShardedDataset(tmp_path / "out")
    keys = [dataset.key(i) for i in range(len(dataset))]
    good = set(spoil(image_files)) - {image.key for image in manifest.bad} - {"readme.txt"}
    assert keys == sorted(good)


def test_fail_stops_at_the_first_bad_image_and_skip_continues(write_tree, image_files, tmp_path):
    source = write_tree("images", spoil(image_files))
    with pytest.raises(DataError, match=r"'cat/05.png' cannot be used: the file is empty; .*skip"):
        make(source, tmp_path / "out", on_bad_image="fail")
    make(source, tmp_path / "out")
    make(source, tmp_path / "reference")
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    with pytest.raises(DataError, match=r"'cat/05.png' cannot be used"):
        make(source, tmp_path / "out", on_bad_image="fail")


def test_a_source_of_bad_images_only(write_tree, tmp_path):
    source = write_tree("images", {"a.png": b"", "b.png": b"text"})
    with pytest.raises(DataError, match=r"none of the 2 images in .* 'a.png': the file is empty"):
        make(source, tmp_path / "out")


def test_a_shard_of_bad_images_only_is_passed_over(write_tree, image_files, tmp_path):
    bad = {f"cat/00 {i:02d}.png": b"" for i in range(20)}
    make(write_tree("images", image_files | bad), tmp_path / "out", workers=1)
    dataset = ShardedDataset(tmp_path / "out")
    assert len(dataset) == sum(shard.rows for shard in dataset.manifest.shards) == dataset.manifest.counts.images
    assert "shard-00001.safetensors" not in contents(tmp_path / "out")
    verify_dataset(tmp_path / "out")


def test_a_damaged_zip_member_is_one_bad_image(write_tree, image_files, tmp_path):
    path = write_tree("images.zip", image_files)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("dog/01.png")
    content = bytearray(path.read_bytes())
    content[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0xFF
    path.write_bytes(content)
    manifest = make(path, tmp_path / "out").manifest
    assert [image.key for image in manifest.bad] == ["dog/01.png"]
    assert "CRC" in manifest.bad[0].reason


class FullDisk(io.BytesIO):
    """A file on a disk with room for some bytes only."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__()
        path.touch()

    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full_at", ["shard-00002", "manifest.json"])
def test_a_full_disk_loses_nothing(folder, reference, tmp_path, monkeypatch, full_at):
    out = tmp_path / "out"

    def limited_open(path, mode):
        return FullDisk(path, mode) if full_at in path.name else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "open", limited_open, raising=False)
        with pytest.raises(DataError, match=r"disk of .* is full: free some space and repeat"):
            make(folder, out, workers=1)
    left = contents(out)
    assert not any(name.endswith(".tmp") for name in left)
    finished = [name for name in left if name.startswith("shard")]
    assert len(finished) == (2 if "shard" in full_at else 5)
    assert all(left[name] == contents(reference)[name] for name in finished)
    assert make(folder, out, workers=1).resumed_shards == len(finished)
    assert contents(out) == contents(reference)


def test_flip_is_noted_and_stores_nothing_more(folder, reference, tmp_path):
    make(folder, tmp_path / "flip", flip=True)
    flipped, plain = contents(tmp_path / "flip"), contents(reference)
    assert json.loads(flipped.pop("manifest.json"))["preprocessing"]["flip"] == "random"
    assert json.loads(plain.pop("manifest.json"))["preprocessing"]["flip"] == "none"
    assert flipped == plain


def test_progress_bar_is_drawn_on_the_console(folder, tmp_path):
    from rich.console import Console

    stream = io.StringIO()
    make(folder, tmp_path / "out", progress=True, console=Console(file=stream, width=100))
    assert "30/30" in stream.getvalue()
