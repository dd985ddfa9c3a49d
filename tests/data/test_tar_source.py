"""Tar and WebDataset shards: matched by key, and one sentence where they do not match."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from source_files import COUNT, assert_rows, make, write_tar

from vrpo.data.sources import open_source
from vrpo.errors import DataError


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("workers", [1, 2])
def test_webdataset_shards(files: list[bytes], tmp_path: Path, kind: str, workers: int) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = {}
        for i in range(shard, COUNT, 2):
            label = str(i % 3) if kind == "cls" else json.dumps({"label": i % 3, "caption": "a.b"})
            # Labels come before or after their image, images in no order of names.
            pair = {f"{COUNT - i:03d}.png": files[i], f"{COUNT - i:03d}.{kind}": label.encode()}
            members |= dict(sorted(pair.items(), reverse=i % 4 < 2))
        write_tar(folder / f"train-{shard}.tar", members)
    dataset = make(folder, tmp_path / "out", workers=workers)
    order = [i for shard in range(2) for i in sorted(range(shard, COUNT, 2), reverse=True)]
    assert_rows(dataset, files, order, [i % 3 for i in range(COUNT)])
    assert dataset.key(0) == f"train-0/{COUNT - order[0]:03d}.png"
    assert dataset.class_names == ("0", "1", "2")


def test_a_plain_tar_has_class_folders(files: list[bytes], tmp_path: Path) -> None:
    members = {f"set/{'ba'[i % 2]}/{i:02d}.png": files[i] for i in range(COUNT)} | {"set/readme.txt": b""}
    dataset = make(write_tar(tmp_path / "images.tar", members), tmp_path / "out")
    order = [*range(1, COUNT, 2), *range(0, COUNT, 2)]
    assert_rows(dataset, files, order, [1 - i % 2 for i in range(COUNT)])
    assert dataset.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("archives", "classes"),
    [
        ({"n01440764": ["1.png", "2.png"], "n01443537": ["1.png"], "n02102040": ["3.png"]}, [0, 0, 1, 2]),
        ({"cat": ["images/1.png"], "dog": ["images/1.png", "images/2.png"]}, [0, 1, 1]),
        ({"train-00007": ["1.png", "2.png"], "train-00008": ["1.png"], "train-00009": ["2.png"]}, None),
        ({"set-8": ["1.png"], "set-9": ["1.png"], "set-10": ["1.png"]}, None),
        ({"set-0": ["cat/1.png", "dog/1.png"], "set-1": ["cat/2.png", "dog/2.png"]}, [0, 1, 0, 1]),
        ({"set-0": ["cat/1.png"], "set-1": ["dog/1.png"]}, [0, 1]),
        ({"a": ["set/cat/1.png", "set/dog/1.png"], "b": ["set/dog/2.png"]}, [0, 1, 1]),
    ],
)
def test_archives_are_classes_or_shards(
    files: list[bytes], tmp_path: Path, archives: dict[str, list[str]], classes: list[int] | None
) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    for name, members in archives.items():
        write_tar(folder / f"{name}.tar", dict.fromkeys(members, files[0]))
    source = open_source(folder)
    assert len(source.entries) == sum(map(len, archives.values()))
    assert [entry.label for entry in source.entries] == (classes or [None] * len(source.entries))
    assert bool(source.class_names) is (classes is not None)
    assert not any(name.startswith(("set", "train")) for name in source.class_names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"02.cls": None}, "has an image '02.png' without a label '02.cls'"),
        ({"02.png": None}, "has a label '02.cls' without an image '02'"),
        ({"02.cls": b"two"}, "'02.cls' of .* holds no class"),
        ({"02.cls": b"-1"}, "label -1 of '02'"),
        ({"02.jpg": b"again"}, "two images of the key '02'"),
        ({"../02.png": b"out"}, r"a name with '\.\.'"),
    ],
)
def test_a_tar_that_does_not_match_is_named(files: list[bytes], tmp_path: Path, change, words: str) -> None:
    members = {}
    for i in range(4):
        members |= {f"{i:02d}.png": files[i], f"{i:02d}.cls": str(i).encode()}
    members = {name: content for name, content in (members | change).items() if content is not None}
    with pytest.raises(DataError, match=words):
        open_source(write_tar(tmp_path / "images.tar", members))


@pytest.mark.parametrize("swap", [False, True])
def test_a_class_number_goes_before_what_json_says_beside_it(files: list[bytes], tmp_path: Path, swap: bool) -> None:
    members = {}
    for i, told in enumerate(({"label": "cat"}, {"caption": "a cat"}, {"label": 2}, {"label": None}, ["a cat"])):
        pair = {f"{i}.cls": str(i).encode(), f"{i}.json": json.dumps(told).encode()}
        members |= {f"{i}.png": files[i]} | dict(sorted(pair.items(), reverse=swap))
    source = open_source(write_tar(tmp_path / "images.tar", members))
    assert [entry.label for entry in source.entries] == [0, 1, 2, 3, 4]
    assert source.class_names == ("0", "1", "2", "3", "4")
    members["3.json"] = b'{"label": 4}'
    with pytest.raises(DataError, match=r"'3.(cls|json)' and '3.(json|cls)' of .* hold different classes \((3|4) and"):
        open_source(write_tar(tmp_path / "images.tar", members))


def test_metadata_beside_every_image_are_no_labels(files: list[bytes], tmp_path: Path) -> None:
    """As img2dataset writes them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            told = {"caption": "a cat", "status": "success", "similarity": float("nan")}
            parts = {"png": files[i], "txt": b"a cat", "json": json.dumps(told).encode()}
            members |= {f"{shard:05d}{i:04d}.{kind}": content for kind, content in parts.items()}
        write_tar(folder / f"{shard:05d}.tar", members)
    source = open_source(folder)
    assert (len(source.entries), source.class_names, source.ignored) == (6, (), 12)
    (folder / "00001.tar").rename(folder / "00002.tar")
    with pytest.raises(DataError, match="number 1 of its parts is missing"):
        open_source(folder)


def test_metadata_without_a_label_among_labels_are_named(files: list[bytes], tmp_path: Path) -> None:
    members = {"0.png": files[0], "0.json": b'{"label": 0}', "1.png": files[1], "1.json": b'{"caption": "a cat"}'}
    with pytest.raises(DataError, match=r"has an image '1.png' without a label '1.cls' or '.json', which others"):
        open_source(write_tar(tmp_path / "images.tar", members))


def test_class_folders_have_names_as_in_a_folder(files: list[bytes], tmp_path: Path) -> None:
    members = dict.fromkeys(["cat/v1.5.a.png", "cat/v1.5.b.png", "dog/a.jpg", "dog/a.png"], files[0])
    source = open_source(write_tar(tmp_path / "images.tar", members | {"meta.json": b'{"made": "today"}'}))
    assert [entry.key for entry in source.entries] == sorted(members)
    assert source.class_names == ("cat", "dog")
    assert source.ignored == 1


def test_a_tar_with_a_name_twice_is_refused(files: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(write_tar(path, {"cat/1.png": files[0]}), "a") as archive:
        archive.addfile(tarfile.TarInfo("./cat/1.png"))
    with pytest.raises(DataError, match=r"two members named 'cat/1\.png'"):
        open_source(path)


def with_header(path: Path, member: tarfile.TarInfo, **fields: object) -> Path:
    """Write an archive of one good image and one member whose header says what no writer says."""
    for name, value in fields.items():
        setattr(member, name, value)
    good = tarfile.TarInfo("00.png")
    blocks = [good.tobuf(), member.tobuf(tarfile.GNU_FORMAT), bytes(10_240)]
    path.write_bytes(b"".join(blocks))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("/etc/cron.d/01.png", tarfile.REGTYPE, r"an absolute name \('/etc/cron.d/01.png'\)"),
        ("cat/../../01.png", tarfile.REGTYPE, r"a name with '\.\.' .*"),
        ("cat/01.png", tarfile.SYMTYPE, r"a link \('cat/01.png'\)"),
        ("cat/01.png", tarfile.LNKTYPE, r"a link \('cat/01.png'\)"),
    ],
)
def test_a_tar_member_cannot_name_a_place_outside(tmp_path: Path, name: str, kind: bytes, words: str) -> None:
    file = with_header(tmp_path / "images.tar", tarfile.TarInfo(name), type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match=f"has a member that is {words}: pack it again with plain files only"):
        open_source(file)


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        (tarfile.REGTYPE, -1024, "a member"),  # which would lead back to its own header for ever
        (tarfile.REGTYPE, 1 << 70, "a member lies beyond its end"),
        (tarfile.GNUTYPE_LONGNAME, 1 << 40, "a header is too large"),
        (tarfile.XHDTYPE, 1 << 40, "a header is too large"),
        (tarfile.GNUTYPE_LONGNAME, -512, "a header is too large"),
    ],
)
def test_a_tar_header_of_absurd_size_is_refused(tmp_path: Path, kind: bytes, size: int, words: str) -> None:
    file = with_header(tmp_path / "images.tar", tarfile.TarInfo("01.png"), type=kind, size=size)
    with pytest.raises(DataError, match=rf"damaged, incomplete or compressed tar archive \({words}"):
        open_source(file)


def test_headers_of_a_tar_that_are_nested_without_end_are_refused(tmp_path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "images.tar").write_bytes(tarfile.TarInfo("00.png").tobuf() + name.tobuf() * 1500 + bytes(1024))
    with pytest.raises(DataError, match="its headers are nested"):
        open_source(tmp_path / "images.tar")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_tar_cut_off_is_refused(files: list[bytes], tmp_path: Path, share: float) -> None:
    path = write_tar(tmp_path / "images.tar", {f"{i:02d}.png": content for i, content in enumerate(files)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="damaged, incomplete or compressed tar archive"):
        open_source(path)
