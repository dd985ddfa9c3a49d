"""The prepared format: an ordinary safetensors file, rows read back as written, damage noticed and named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset, verify_dataset, write_atomically
from vrpo.data.sources import ArraySource
from vrpo.data.transforms import decode
from vrpo.errors import DataError
from vrpo.untrusted import unseal


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(23, 6, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory) -> Path:
    """23 images in shards of 10, 10 and 3."""
    source = ArraySource(images, np.arange(23) % 3, ["a", "b", "c"], "squares")
    out = tmp_path_factory.mktemp("shards") / "out"
    prepare(source, out, size=6, shard_bytes=10 * 3 * 36, progress=False)
    return out


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_rows_are_read_as_written(prepared, images):
    dataset = ShardedDataset(prepared)
    assert len(dataset) == 23
    assert (dataset.image_size, dataset.channels, dataset.num_classes) == (6, 3, 3)
    assert dataset.class_names == ("a", "b", "c")
    assert [shard.rows for shard in dataset.manifest.shards] == [10, 10, 3]
    indices = np.random.default_rng(1).integers(0, 23, size=200)
    pixels, labels = dataset.read(indices)
    np.testing.assert_array_equal(pixels.numpy(), images[indices].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels.numpy(), indices % 3)
    np.testing.assert_array_equal(dataset.labels(), np.arange(23) % 3)
    assert [dataset.key(i) for i in range(23)] == [f"{i:02d}" for i in range(23)]
    for outside in (-1, 23):
        with pytest.raises(IndexError):
            dataset.read(np.array([outside]))


def test_unlabelled(images, tmp_path):
    prepare(ArraySource(images, None, [], "squares"), tmp_path / "out", size=6, progress=False)
    dataset = ShardedDataset(tmp_path / "out")
    assert not dataset.labelled
    assert dataset.num_classes == 0
    assert dataset.labels() is None
    assert dataset.read(np.array([3]))[1] is None


def test_a_shard_is_an_ordinary_safetensors_file(prepared, images):
    tensors = safetensors.numpy.load_file(prepared / "shard-00001.safetensors")
    np.testing.assert_array_equal(tensors["pixels"], images[10:20].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(tensors["labels"], np.arange(10, 20) % 3)
    assert tensors["key_bytes"].tobytes() == "".join(map(str, range(10, 20))).encode()
    assert tensors["key_offsets"].tolist() == list(range(0, 21, 2))


def test_a_dataset_travels_to_another_process_by_its_path(prepared):
    dataset = ShardedDataset(prepared)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert pickle.loads(data).fingerprint == dataset.fingerprint


def test_fingerprint_follows_the_data(prepared, images, tmp_path):
    def fingerprint_of(name: str, pixels: np.ndarray, labels: np.ndarray, **options) -> str:
        source = ArraySource(pixels, labels, ["a", "b", "c"], "another name")
        result = prepare(source, tmp_path / name, size=6, shard_bytes=1080, progress=False, **options)
        return result.manifest.fingerprint

    labels = np.arange(23) % 3
    changed = images.copy()
    changed[22, 5, 5, 2] ^= 1
    original = ShardedDataset(prepared).fingerprint
    assert fingerprint_of("same", images, labels) == original
    others = {
        fingerprint_of("pixels", changed, labels),
        fingerprint_of("labels", images, (labels + 1) % 3),
        fingerprint_of("flip", images, labels, flip=True),
    }
    assert len(others | {original}) == 4


def test_verify_finds_every_flipped_bit(copy):
    progress = []
    assert verify_dataset(copy, lambda done, total: progress.append((done, total))).counts.images == 23
    assert progress[-1][0] == progress[-1][1] == sum(f.stat().st_size for f in copy.glob("*.safetensors"))
    for name in ("shard-00000.safetensors", "shard-00002.safetensors"):
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000.safetensors, shard-00002.safetensors in .*SHA-256"):
        verify_dataset(copy)


def test_a_damaged_shard_is_named_on_opening(copy):
    file = copy / "shard-00001.safetensors"
    content = file.read_bytes()

    def message() -> str:
        with pytest.raises(DataError) as caught:
            ShardedDataset(copy)
        assert file.name in str(caught.value)
        return str(caught.value)

    file.write_bytes(content[:-7])
    assert f"truncated to {len(content) - 7:,} of {len(content):,} bytes" in message()
    file.write_bytes(b"\xff" + content[1:])
    assert "damaged header" in message()
    file.write_bytes(content.replace(b"[10,3,6,6]", b"[10,3,9,4]"))
    assert "does not hold what manifest.json says" in message()
    file.unlink()
    assert "is missing" in message()


def test_a_shard_that_is_cut_while_it_is_read_is_named(copy, images):
    dataset = ShardedDataset(copy)
    dataset.read(np.arange(23))
    file = copy / "shard-00001.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 7)  # within a page, which then reads as zeros
    pixels, _ = dataset.read(np.array([0, 9, 22]))
    np.testing.assert_array_equal(pixels.numpy(), images[[0, 9, 22]].transpose(0, 3, 1, 2))
    with pytest.raises(DataError, match=rf"shard-00001.safetensors' was cut to {size - 7:,} of {size:,} bytes while"):
        dataset.read(np.array([0, 10]))
    with pytest.raises(DataError, match=r"shard-00001.safetensors' was cut"):
        dataset.read(np.array([19]))


def test_a_shard_that_is_moved_while_it_is_read_stays_as_it_was(copy, images):
    dataset = ShardedDataset(copy)
    dataset.read(np.arange(1))
    (copy / "shard-00001.safetensors").unlink()
    (copy / "shard-00002.safetensors").replace(copy / "elsewhere")
    pixels, _ = dataset.read(np.arange(23))
    np.testing.assert_array_equal(pixels.numpy(), images.transpose(0, 3, 1, 2))


def test_a_bad_manifest_is_one_sentence(copy):
    file = copy / "manifest.json"
    sealed = json.loads(file.read_text())
    manifest = unseal(sealed)

    def message(content: str) -> str:
        file.write_text(content)
        with pytest.raises(DataError) as caught:
            ShardedDataset(copy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is damaged" in message("{")
    assert "is damaged" in message("[]")
    assert "content differs from its seal" in message(json.dumps(sealed | {"class_names": ["a", "b", "d"]}))
    assert "prepared in format 99" in message(json.dumps(manifest | {"version": 99, "new": 1}))
    assert "source" in message(json.dumps({k: v for k, v in manifest.items() if k != "source"}))
    outside = json.loads(json.dumps(manifest))
    outside["shards"][0]["file"] = "../shard-00000.safetensors"
    assert "shards.0.file" in message(json.dumps(outside))
    flipped = json.loads(json.dumps(manifest))
    flipped["preprocessing"]["flip"] = "random"
    assert "fingerprint" in message(json.dumps(flipped))
    file.unlink()
    with pytest.raises(DataError, match="vrpo prepare"):
        ShardedDataset(copy)


def test_an_atomic_write_leaves_the_old_file_or_the_new(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, [b"old"])

    def parts():
        yield b"ne"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, parts())
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_real_images_survive_the_way_through_the_shards(shared_data, tmp_path):
    import zipfile

    with zipfile.ZipFile(shared_data / "cifar10-test.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith("00.jpg")]
        for name in names:
            archive.extract(name, tmp_path / "images")
        expected = {name: decode(archive.read(name), 32)[0] for name in names}
        sample = np.asarray(Image.open(archive.open(names[0])).convert("RGB"))
    np.testing.assert_array_equal(expected[names[0]].transpose(1, 2, 0), sample)
    prepare(tmp_path / "images", tmp_path / "out", size=32, progress=False)
    dataset = ShardedDataset(tmp_path / "out")
    pixels, labels = dataset.read(np.arange(len(names)))
    for i in range(len(names)):
        key = dataset.key(i)
        np.testing.assert_array_equal(pixels[i].numpy(), expected[key])
        assert dataset.class_names[labels[i]] == key.split("/")[0]
