"""Tar, parquet, and the folders of REPA and LightningDiT: matched by key, and one sentence where they do not match."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, noise_image
from safetensors.torch import save_file

from autoencoder_files import save_autoencoder
from latent_sources import write_lightning, write_repa
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import open_source
from vrpo.data.transforms import decode
from vrpo.errors import ConfigError, DataError
from vrpo.vision.autoencoders import load_autoencoder

COUNT = 12


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [encode(noise_image(seed, 16, 16)) for seed in range(COUNT)]


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make(source: Path | str, out: Path, **options) -> ShardedDataset:
    prepare(source, out, **({"size": 16, "workers": 1, "progress": False} | options))
    return ShardedDataset(out)


def assert_rows(dataset: ShardedDataset, files: list[bytes], order: list[int], labels: list[int]) -> None:
    pixels, told = dataset.read(np.arange(len(order)))
    assert told is not None
    assert told.tolist() == [labels[i] for i in order]
    for row, i in enumerate(order):
        np.testing.assert_array_equal(pixels[row].numpy(), decode(files[i], 16)[0])


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


def table(files: list[bytes], start: int, stop: int, features: bool = True, **columns):
    pa = pytest.importorskip("pyarrow")
    content = {
        "image": [{"bytes": files[i], "path": f"{i}.png"} for i in range(start, stop)],
        "label": [i % 3 for i in range(start, stop)],
    } | columns
    made = pa.table({name: values for name, values in content.items() if values is not None})
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(names)}) if features else made


def write_table(path: Path, made, group: int = 4) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(made, path, row_group_size=group)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_of_the_hub(files: list[bytes], tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "set" / "data"
    folder.parent.mkdir()
    write_table(folder / "train-00000-of-00002.parquet", table(files, 0, 7))
    write_table(folder / "train-00001-of-00002.parquet", table(files, 7, COUNT))
    dataset = make(folder.parent, tmp_path / "out", workers=workers)
    assert_rows(dataset, files, list(range(COUNT)), [i % 3 for i in range(COUNT)])
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.key(8) == "train-00001-of-00002.parquet/00000001"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that is away: what it holds of the set owner/name has been fetched before."""
    import huggingface_hub

    root = tmp_path / "snapshots" / "0123"
    root.mkdir(parents=True)

    def download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("owner/name", "dataset")
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("vrpo.vision.hub._reachable", lambda endpoint: False)
    return root


def test_a_split_of_the_hub_is_told_from_others_in_one_snapshot(files: list[bytes], hub: Path, tmp_path: Path) -> None:
    write_table(hub / "data" / "train-00000-of-00002.parquet", table(files, 0, 4))
    write_table(hub / "data" / "train-00001-of-00002.parquet", table(files, 4, 8))
    write_table(hub / "data" / "test-00000-of-00001-0a1b2c.parquet", table(files, 8, 11))
    write_table(hub / "data" / "mytest-00000-of-00001.parquet", table(files, 11, COUNT))
    for name, split, rows in (("hf:owner/name", "train", range(8)), ("hf:owner/name/test", "test", range(8, 11))):
        dataset = make(name, tmp_path / split)
        assert len(dataset) == len(rows)
        assert_rows(dataset, files[rows.start :], list(range(len(rows))), [i % 3 for i in rows])
        assert dataset.manifest.source.name == f"owner/name/{split}"


def test_a_split_of_the_hub_that_is_ambiguous_or_incomplete_is_refused(files: list[bytes], hub: Path) -> None:
    for name in ("hf:owner/name/*", "hf:owner/name/../x", "hf:owner"):
        with pytest.raises(ConfigError, match="hf:OWNER/NAME"):
            open_source(name)
    write_table(hub / "small" / "train-00000-of-00002.parquet", table(files, 0, 4))
    with pytest.raises(DataError, match="no parquet files of a split 'test'"):
        open_source("hf:owner/name/test")
    with pytest.raises(DataError, match="1 files of 2 are here"):
        open_source("hf:owner/name")
    write_table(hub / "large" / "train-00000-of-00001.parquet", table(files, 4, 8))
    with pytest.raises(DataError, match=r"'train' in several folders \(large, small\)"):
        open_source("hf:owner/name")


def test_parquet_that_cannot_be_used_is_one_sentence(files: list[bytes], tmp_path: Path, monkeypatch) -> None:
    plain = write_table(tmp_path / "plain.parquet", table(files, 0, 3, imag=["a", "b", "c"], image=None))
    with pytest.raises(DataError, match=r"has no image column, .*; did you mean 'imag'"):
        open_source(plain)
    with pytest.raises(DataError, match="label 7, which is no class number"):
        open_source(write_table(tmp_path / "label.parquet", table(files, 0, 3, label=[0, 7, 1])))
    cut = write_table(tmp_path / "cut.parquet", table(files, 0, 3))
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or incomplete parquet file"):
        open_source(cut)
    for split in ("train", "test"):
        write_table(tmp_path / "splits" / f"{split}-00000-of-00001.parquet", table(files, 0, 3))
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        open_source(tmp_path / "splits")
    claim = table(files, 0, 0, image=[{"bytes": None, "path": None}] * 10_000, label=[0] * 10_000)
    with pytest.raises(DataError, match="claims 10,000 rows, which it cannot hold"):
        open_source(write_table(tmp_path / "claim.parquet", claim, 10_000))
    with pytest.raises(ConfigError, match="hf:OWNER/NAME"):
        open_source("hf:nonsense")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'vrpo\[parquet\]'"):
        open_source(plain)


def write_bomb(path: Path, image: bytes, rows: int) -> Path:
    """Write a file in which all rows are one image, which the file holds once."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    same = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([image]))
    paths = pa.array([hashlib.sha256(bytes([row])).hexdigest() for row in range(rows)])
    made = pa.table({"image": pa.StructArray.from_arrays([same, paths], ["bytes", "path"])})
    parquet.write_table(made, path, compression="zstd", store_schema=False)
    return path


BOMB = """
import sys
from pathlib import Path
from vrpo.data.prepare import prepare

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

import pyarrow.parquet
before = peak()
prepare(sys.argv[1], sys.argv[2], size=16, workers=1, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory in /proc")
def test_a_parquet_bomb_takes_the_memory_of_one_row(files: list[bytes], tmp_path: Path) -> None:
    """Ten kilobytes on disk, and a gigabyte in memory if the rows were read together."""
    rows, image = 60, files[0] + bytes(16 << 20)
    file = write_bomb(tmp_path / "bomb.parquet", image, rows)
    assert file.stat().st_size < 20_000
    command = [sys.executable, "-c", BOMB, str(file), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 15 * len(image) / 1024  # kilobytes; all rows take 60 images and more
    dataset = ShardedDataset(tmp_path / "out")
    assert len(dataset) == rows
    for row in dataset.read(np.arange(rows))[0]:
        np.testing.assert_array_equal(row.numpy(), decode(files[0], 16)[0])


def test_a_parquet_page_that_would_fill_the_memory_is_refused(files: list[bytes], tmp_path: Path) -> None:
    file = write_bomb(tmp_path / "bomb.parquet", files[0] + bytes(80 << 20), 20)
    with pytest.raises(DataError, match=r"bomb.parquet' would grow from [\d,]+ to 83,8[\d,]+ bytes, as none do: fetch"):
        open_source(file)


def test_a_damaged_parquet_page_costs_the_rest_of_its_group(files: list[bytes], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "train.parquet"
    options = {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1, "compression": "zstd"}
    parquet.write_table(table(files, 0, COUNT), file, row_group_size=6, **options)
    content = bytearray(file.read_bytes())
    place = content.rindex(b"\x28\xb5\x2f\xfd", 0, content.index(files[3][-200:]))  # where its compressed page begins
    content[place] ^= 1
    file.write_bytes(content)
    manifest = make(file, tmp_path / "out").manifest
    lost = [int(image.key.removeprefix("train.parquet/")) for image in manifest.bad]
    assert lost in ([3, 4, 5], [2, 3, 4, 5])  # the reader looks a page ahead
    assert manifest.bad[0].reason.startswith("it cannot be read (")
    kept = [row for row in range(COUNT) if row not in lost]
    assert_rows(ShardedDataset(tmp_path / "out"), files, kept, [i % 3 for i in range(COUNT)])


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "kl", shift_factor=0.0)


def test_repa_folder(files: list[bytes], autoencoder: Path, tmp_path: Path) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    dataset = make(source, tmp_path / "out", workers=2)
    assert_rows(dataset, files, list(range(COUNT)), [i % 3 for i in range(COUNT)])
    assert dataset.latents is not None
    assert (dataset.latents.autoencoder, dataset.latents.weights) == ("sd-vae-ft-mse", None)
    again = prepare(source, tmp_path / "again", size=16, workers=1, progress=False).summary()
    assert (
        "Which autoencoder made the latents is taken to be 'sd-vae-ft-mse': to say it, prepare with --latents." in again
    )
    assert dataset.manifest.normaliser is not None
    assert dataset.manifest.normaliser.scale == (0.18215,) * 4
    network = load_autoencoder(str(autoencoder))
    expected = network.encode(torch.from_numpy(np.stack([decode(content, 16)[0] for content in files])))
    torch.testing.assert_close(dataset.read_latents(np.arange(COUNT)).float(), expected, rtol=2**-10, atol=1e-4)
    bare = make(write_repa(tmp_path / "bare", files, autoencoder, images=False), tmp_path / "bare-out")
    assert not bare.holds_pixels
    assert torch.equal(bare.read_latents(np.arange(COUNT)), dataset.read_latents(np.arange(COUNT)))


def test_repa_latents_are_held_against_the_named_autoencoder(
    files: list[bytes], autoencoder: Path, tmp_path: Path
) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    told = make(source, tmp_path / "out", latents=LatentOptions(str(autoencoder)))
    assert told.latents is not None
    assert told.latents.weights == load_autoencoder(str(autoencoder)).fingerprint
    assert told.manifest.normaliser is not None
    assert told.manifest.normaliser.scale == (0.5,) * 4
    other = save_autoencoder(tmp_path / "other", seed=3)
    with pytest.raises(DataError, match=r"of another autoencoder than .*other': those of '00000/img00000000' differ"):
        make(source, tmp_path / "new", latents=LatentOptions(str(other)))
    with pytest.raises(ConfigError, match="no latents of mirror images"):
        make(source, tmp_path / "new", flip=True)
    with pytest.raises(ConfigError, match="8 x 8, and --size 20 is no multiple"):
        make(source, tmp_path / "new", size=20)
    with pytest.raises(ConfigError, match="were made from, 16 x 16 pixels, and not 32 x 32: give --size 16"):
        make(source, tmp_path / "new", size=32)
    assert not (tmp_path / "new").exists()
    (source / "images" / "00000" / "img00000002.png").write_bytes(encode(noise_image(0, 32, 32)))
    bad = make(source, tmp_path / "mixed").manifest.bad
    assert [(image.key, image.reason) for image in bad] == [
        ("00000/img00000002", "it is 32 x 32 pixels and not 16 x 16")
    ]


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("images/00000/img00000003.png", "has the latent '00000/img00000003' and no image of that name"),
        ("vae-sd/00000/img-mean-std-00000003.npy", "has the image '00000/img00000003' and no latent of that name"),
    ],
)
def test_repa_mismatches_are_named(
    files: list[bytes], autoencoder: Path, tmp_path: Path, lost: str, words: str
) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    (source / lost).unlink()
    with pytest.raises(DataError, match=words):
        open_source(source)


def test_names_in_json_may_hold_half_a_character(files: list[bytes], autoencoder: Path, tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        members |= {f"{i}.png": files[i], f"{i}.json": json.dumps({"label": f"{i % 2} \ud800"}).encode()}
    dataset = make(write_tar(tmp_path / "images.tar", members), tmp_path / "out")
    assert dataset.class_names == (r"0 \xed\xa0\x80", r"1 \xed\xa0\x80")
    source = write_repa(tmp_path / "repa", files, autoencoder)
    (source / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [["00000/\ud800.npy", 0]]}))
    with pytest.raises(DataError, match=r"has the label '00000/\\xed\\xa0\\x80' and no latent of that name"):
        open_source(source)


def test_repa_damage_is_named(files: list[bytes], autoencoder: Path, tmp_path: Path) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    cut = source / "vae-sd" / "00000" / "img-mean-std-00000003.npy"
    cut.write_bytes(cut.read_bytes()[:-40])
    np.save(cut.with_name("img-mean-std-00000004.npy"), np.array([{}], dtype=object), allow_pickle=True)
    bad = make(source, tmp_path / "out").manifest.bad
    assert [(image.key, image.reason) for image in bad] == [
        ("00000/img00000003", "its latents are cut off"),
        ("00000/img00000004", "its latents are object and not rows of floats"),
    ]
    labels = json.loads((source / "vae-sd" / "dataset.json").read_text())
    (source / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels["labels"][1:]}))
    with pytest.raises(DataError, match="has the latent '00001/img00000011' and no label"):
        open_source(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightningdit_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    latents, flips = write_lightning(tmp_path / "latents", dtype)
    dataset = make(tmp_path / "latents", tmp_path / "out", size=64, flip=True, workers=2)
    rows = np.arange(10)
    assert torch.equal(dataset.read_latents(rows), latents.half())
    assert torch.equal(dataset.read_latents(rows, np.ones(10, dtype=bool)), flips.half())
    assert dataset.labels() is not None
    assert list(dataset.labels()) == [i % 5 for i in range(10)]  # type: ignore[arg-type]
    assert (dataset.in_channels, dataset.input_size, dataset.image_size) == (6, 4, 64)
    assert dataset.manifest.normaliser is not None
    both = torch.cat([latents, flips]).half().double()
    torch.testing.assert_close(
        torch.tensor(dataset.manifest.normaliser.scale, dtype=torch.float64),
        1 / both.std((0, 2, 3), correction=0),
    )
    assert dataset.key(5) == "latents_rank00_shard001.safetensors/000001"


def test_lightningdit_statistics_and_damage(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    write_lightning(folder)
    statistics = {"mean": torch.full((1, 6, 1, 1), 0.5), "std": torch.full((1, 6, 1, 1), 4.0)}
    torch.save(statistics, folder / "latents_stats.pt")
    normaliser = make(folder, tmp_path / "out", size=64).manifest.normaliser
    assert normaliser is not None
    assert (normaliser.shift, normaliser.scale) == ((0.5,) * 6, (0.25,) * 6)
    torch.save({"mean": print}, folder / "latents_stats.pt")
    with pytest.raises(DataError, match="holds no mean and std of 6 channels"):
        open_source(folder)
    (folder / "latents_stats.pt").unlink()
    with pytest.raises(ConfigError, match="does not say how its latents are scaled"):
        make(folder, tmp_path / "new", size=64, latents=LatentOptions(normalise="autoencoder"))
    shard = folder / "latents_rank00_shard001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"shard001.safetensors' is a damaged or incomplete"):
        open_source(folder)
    save_file({"latents": torch.zeros(4, 6, 4, 4), "labels": torch.arange(4)}, shard)
    with pytest.raises(DataError, match=r"shard001.safetensors' holds no 'latents_flip'"):
        open_source(folder)
