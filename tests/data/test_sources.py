"""Listing images: layouts, order, and sources that must be refused."""

from __future__ import annotations

import lzma
import os
import pickle
import stat
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, noise_image
from PIL import Image

from vrpo.data.sources import ArraySource, open_source
from vrpo.errors import DataError

PNG = encode(noise_image(0, 4, 4))


def listed(source):
    return [(entry.key, entry.label) for entry in source.entries]


@pytest.mark.parametrize("container", ["images", "images.zip"])
def test_classes_are_sorted_folders_and_other_files_are_counted(write_tree, container):
    files = {
        "b/2.png": PNG,
        "b/10.PNG": PNG,
        "Z/x.png": PNG,
        "a-b/x.jpeg": PNG,
        "a/sub/x.png": PNG,
        "a/notes.txt": b"no image",
        "a/.hidden.png": PNG,
        ".git/x.png": PNG,
        "__MACOSX/a/x.png": PNG,
        "labels": b"",
    }
    source = open_source(write_tree(container, files))
    assert source.kind == ("zip" if container.endswith(".zip") else "folder")
    assert source.class_names == ("Z", "a", "a-b", "b")
    # Byte-wise: capitals first, '-' before '/', '10' before '2'.
    assert listed(source) == [
        ("Z/x.png", 0),
        ("a-b/x.jpeg", 2),
        ("a/sub/x.png", 1),
        ("b/10.PNG", 3),
        ("b/2.png", 3),
    ]
    assert source.ignored == 2
    with source.open(source.entries[0]) as stream:
        assert stream.read() == PNG


@pytest.mark.parametrize("container", ["images", "images.zip"])
@pytest.mark.parametrize(
    ("keys", "class_names"),
    [
        (["b.png", "a.png"], ()),
        (["train/cat/1.png", "train/dog/2.png"], ("cat", "dog")),
        (["root/train/cat/1.png", "root/train/dog/x/2.png"], ("cat", "dog")),
        (["cat/1.png", "cat/2.png"], ("cat",)),
        (["train/cat/1.png"], ("cat",)),
        (["train/1.png", "cat/2.png"], ("cat", "train")),
    ],
)
def test_layouts(write_tree, container, keys, class_names):
    source = open_source(write_tree(container, dict.fromkeys(keys, PNG)))
    assert source.class_names == class_names
    assert [entry.key for entry in source.entries] == sorted(keys)
    for entry in source.entries:
        assert entry.label is None if not class_names else class_names[entry.label] in entry.key.split("/")


def test_order_does_not_depend_on_the_order_of_the_archive(write_tree):
    keys = [f"{c}/{i}.png" for c in "xy" for i in range(5)]
    first = open_source(write_tree("a.zip", dict.fromkeys(keys, PNG)))
    second = open_source(write_tree("b.zip", dict.fromkeys(reversed(keys), PNG)))
    assert listed(first) == listed(second)


def test_folder_with_linked_classes_and_a_cycle(write_tree, tmp_path):
    elsewhere = write_tree("elsewhere", {"1.png": PNG})
    folder = write_tree("images", {"cat/1.png": PNG})
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat" / "loop").symlink_to(folder)
    assert listed(open_source(folder)) == [("cat/1.png", 0), ("dog/1.png", 1)]


@pytest.mark.skipif(os.name != "posix", reason="needs file names that are bytes")
def test_file_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(path)).write_bytes(PNG)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    source = open_source(tmp_path)
    assert source.entries[0].key == "caf\\xe9.png"
    assert source.open(source.entries[0]).read() == PNG


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is empty"),
        ({"a.txt": b"a", "b.txt": b"b", "c.csv": b"c"}, "3 files are of other kinds (.txt, .csv)"),
        ({"a.png": PNG, "cat/b.png": PNG}, "both beside and inside its sub-folders (such as 'a.png')"),
        ({"root/a.png": PNG, "root/cat/b.png": PNG}, "such as 'root/a.png'"),
        ({"train/cat/1.png": PNG, "val/cat/1.png": PNG}, "are splits (train, val), not classes"),
    ],
)
@pytest.mark.parametrize("container", ["images", "images.zip"])
def test_nothing_or_an_ambiguous_layout_is_one_sentence(write_tree, container, files, words):
    path = write_tree(container, files)
    with pytest.raises(DataError) as caught:
        open_source(path)
    message = str(caught.value)
    assert words in message
    assert container in message
    assert "\n" not in message


def test_missing_and_unknown_sources(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match="give a folder or zip"):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="damaged or incomplete zip"):
        open_source(tmp_path / "broken.zip")


@pytest.mark.parametrize("name", ["../evil.png", "cat/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png"])
def test_zip_member_outside_its_folder_is_refused_by_name(write_tree, name):
    path = write_tree("evil.zip", {"cat/1.png": PNG, name: PNG})
    with pytest.raises(DataError, match=r"evil\.png"):
        open_source(path)


def test_zip_with_a_link_is_refused(tmp_path):
    path = tmp_path / "links.zip"
    link = zipfile.ZipInfo("cat/link.png")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", PNG)
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"symbolic link \('cat/link\.png'\)"):
        open_source(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_members_are_read_without_the_archive_s_directory(tmp_path, method):
    # In every worker the directory of a million members would take a gigabyte.
    path = tmp_path / "images.zip"
    images = {f"cat/{number}.png": encode(noise_image(number, 5, 4)) for number in range(3)}
    with path.open("wb") as file:
        file.write(b"a program that unpacks itself")
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in images.items():
                with archive.open(zipfile.ZipInfo(name) if name.endswith("1.png") else name, "w") as member:
                    member.write(content)
            start = archive.start_dir
    source = open_source(path)
    os.truncate(path, start)
    opener = pickle.loads(pickle.dumps(source.opener))
    for entry in reversed(source.entries):
        with opener.open(entry) as stream:
            assert stream.read() == images[entry.key]
    content = bytearray(path.read_bytes())
    content[start - 20] ^= 1
    path.write_bytes(content)
    with pytest.raises((zipfile.BadZipFile, OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)):
        pickle.loads(pickle.dumps(opener)).open(source.entries[-1]).read()


def test_zip_with_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", PNG)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("1.png", PNG)
    with pytest.raises(DataError, match=r"two members named '1\.png'"):
        open_source(path)


def test_opener_travels_to_another_process(write_tree):
    source = open_source(write_tree("a.zip", {"1.png": PNG}))
    source.open(source.entries[0]).close()  # the open handle must stay behind
    opener = pickle.loads(pickle.dumps(source.opener))
    opener.connect()
    assert opener.open(source.entries[0]).read() == PNG


@pytest.mark.parametrize("channels", [1, 3])
def test_array_source_serves_its_pixels_in_order(channels):
    images = np.random.default_rng(0).integers(0, 256, size=(12, 5, 7, channels), dtype=np.uint8)
    labels = np.arange(12) % 3
    source = ArraySource(images, labels, ["a", "b", "c"], "digits")
    assert [entry.label for entry in source.entries] == labels.tolist()
    assert [entry.key for entry in source.entries] == sorted(entry.key for entry in source.entries)
    for row, entry in enumerate(source.entries):
        pixels = np.asarray(Image.open(source.open(entry)).convert("RGB"))
        np.testing.assert_array_equal(pixels, np.broadcast_to(images[row], (5, 7, 3)))


def test_array_source_refuses_wrong_arrays():
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="give uint8"):
        ArraySource(images.astype(np.float32), None, [], "x")
    with pytest.raises(DataError, match=r"one of 0\.\.0"):
        ArraySource(images, [0, 1], ["only"], "x")
