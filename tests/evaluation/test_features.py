"""Reading images of every kind, extracting features, and the reference cache."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import Entry, Source
from vrpo.data.transforms import decode_whole
from vrpo.errors import DataError, EvaluationError
from vrpo.evaluation import reference as module
from vrpo.evaluation.features import extract_features
from vrpo.evaluation.frechet import frechet_distance
from vrpo.evaluation.images import ImageSet, open_images
from vrpo.evaluation.reference import load_reference


def draw_images(count: int, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def write_folder(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:04d}.png")
    return folder


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def read_all(source: object, size: int) -> Tensor:
    return torch.cat(list(open_images(source).batches(size)))  # type: ignore[arg-type]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardedDataset:
    from vrpo.data.prepare import prepare

    prepare(write_folder(tmp_path / "source", draw_images(30)), tmp_path / "prepared", size=8)
    return ShardedDataset(tmp_path / "prepared")


@pytest.mark.parametrize("size", [4, 10, 64])
def test_every_source_yields_the_same_images(tmp_path: Path, size: int) -> None:
    images = draw_images(10)
    folder = write_folder(tmp_path / "images", images)
    np.savez(tmp_path / "plain.npz", images.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=np.arange(10))
    sources = (
        images,
        folder,
        str(folder),
        write_zip(tmp_path / "i.zip", folder),
        tmp_path / "plain.npz",
        tmp_path / "packed.npz",
    )

    for source in sources:
        assert torch.equal(read_all(source, size), images)
        assert open_images(source).count == 10


def test_prepared_data_is_read_in_order(dataset: ShardedDataset) -> None:
    expected, _ = dataset.read(np.arange(30))

    assert torch.equal(read_all(dataset, 7), expected)
    assert torch.equal(read_all(dataset.path, 7), expected)
    assert open_images(dataset).fingerprint == dataset.fingerprint


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    images = draw_images(5)
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    folder, other = write_folder(tmp_path / "a", images), write_folder(tmp_path / "b", changed)

    assert open_images(folder).fingerprint == open_images(write_zip(tmp_path / "a.zip", folder)).fingerprint
    assert open_images(folder).fingerprint != open_images(other).fingerprint
    assert open_images(images).fingerprint == open_images(images.clone()).fingerprint
    assert open_images(images).fingerprint != open_images(changed).fingerprint


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "grey" / "0.png")

    assert torch.equal(read_all(tmp_path / "grey", 1), torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))


def test_features_do_not_depend_on_the_batch_size(network) -> None:
    images = draw_images(23)

    whole = extract_features(images, network, batch_size=64)

    assert whole.dtype == torch.float32
    assert torch.equal(whole, network.pooled(images))
    assert torch.equal(whole, extract_features(images, network, batch_size=5, progress=True))


def test_reference_is_cached_beside_prepared_data(dataset: ShardedDataset, network) -> None:
    first = load_reference(dataset, network)
    second = load_reference(dataset, network)

    assert network.images_seen == 30
    assert [file.parent.name for file in dataset.path.rglob("*.npz")] == ["features"]
    assert second.record == first.record
    assert torch.equal(second.vectors, first.vectors)
    assert frechet_distance(first.statistics, second.statistics) == pytest.approx(0, abs=1e-9)


def test_cache_key_holds_network_input_size_and_data(tmp_path: Path, network) -> None:
    images = draw_images(12)
    load_reference(images, network, cache=tmp_path)
    network.weights_hash = "1" * 64
    load_reference(images, network, cache=tmp_path)
    network.input_size = 16
    load_reference(images, network, cache=tmp_path)
    load_reference(images[:11], network, cache=tmp_path)

    assert network.images_seen == 3 * 12 + 11
    assert len(list(tmp_path.iterdir())) == 4


def test_features_of_another_preprocessing_are_computed_anew(
    tmp_path: Path, network, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_images(12)
    load_reference(images, network, cache=tmp_path)
    monkeypatch.setattr("vrpo.evaluation.reference.PREPROCESSING", 0)
    load_reference(images, network, cache=tmp_path)
    load_reference(images, network, cache=tmp_path)

    assert network.images_seen == 2 * 12


def test_damaged_cache_is_replaced(tmp_path: Path, network) -> None:
    images = draw_images(12)
    first = load_reference(images, network, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])

    assert torch.equal(load_reference(images, network, cache=tmp_path).vectors, first.vectors)
    assert torch.equal(load_reference(file, network).vectors, first.vectors)


def test_unwritable_cache_costs_no_result(tmp_path: Path, network) -> None:
    (tmp_path / "file").write_text("in the way")

    assert load_reference(draw_images(12), network, cache=tmp_path / "file").vectors is not None


def test_large_reference_keeps_a_fixed_subset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network) -> None:
    monkeypatch.setattr(module, "MANIFOLD_IMAGES", 10)
    images = draw_images(40)

    one = load_reference(images, network, batch_size=40)
    many = load_reference(images, network, batch_size=3, cache=tmp_path)
    again = load_reference(images, network, cache=tmp_path)

    features = network.pooled(images)
    assert one.vectors.shape == (10, features.shape[1])
    assert all((features == row).all(dim=1).any() for row in one.vectors)
    assert len(one.vectors.unique(dim=0)) == 10
    assert torch.equal(one.vectors, many.vectors)
    assert torch.equal(one.vectors, again.vectors)
    assert again.statistics.count == 40
    np.testing.assert_allclose(again.statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-6)


def test_reference_of_another_network_is_refused(tmp_path: Path, network) -> None:
    reference = load_reference(draw_images(12), network, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert load_reference(reference, network) is reference
    network.weights_hash = "1" * 64

    for source in (reference, file):
        with pytest.raises(EvaluationError, match="features of stub with other weights"):
            load_reference(source, network)


def test_statistics_of_an_unknown_network_are_refused(tmp_path: Path, network) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4), sigma=np.eye(4))

    with pytest.raises(EvaluationError, match=r"adm\.npz does not say which feature network"):
        load_reference(tmp_path / "adm.npz", network)


def test_large_images_come_in_smaller_batches(
    tmp_path: Path, dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds a bounded number of pixels, however many images of whatever size are asked for at once."""
    images = draw_images(10)
    folder = write_folder(tmp_path / "images", images)
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    for limit, largest in ((4 * 192, 4), (191, 1)):
        monkeypatch.setattr("vrpo.evaluation.images._BATCH_BYTES", limit)
        for source in (folder, tmp_path / "images.npz"):
            batches = list(open_images(source).batches(64))
            assert max(map(len, batches)) == largest
            assert torch.equal(torch.cat(batches), images)
        assert max(map(len, open_images(dataset).batches(64))) == largest


def test_few_files_are_held_beside_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be much larger than their pixels, so they are read as decoding goes on."""
    read, decoded = [], []
    folder = write_folder(tmp_path / "images", draw_images(40))

    def decode(content: bytes) -> np.ndarray:
        decoded.append(len(read) - len(decoded))
        return decode_whole(content)

    def contents(source: Source, entries: Sequence[Entry]) -> Iterator[bytes]:
        for entry in entries:
            read.append(entry.key)
            with source.open(entry) as stream:
                yield stream.read()

    monkeypatch.setattr("vrpo.evaluation.images.decode_whole", decode)
    monkeypatch.setattr("vrpo.evaluation.images._contents", contents)
    assert [len(batch) for batch in open_images(folder).batches(32)] == [32, 8]
    assert max(decoded) < 12


def test_nan_features_are_refused(network) -> None:
    network.pooled = lambda images: torch.full((len(images), 4), torch.nan)

    with pytest.raises(EvaluationError, match="stub returned NaN or infinite features for images 0 to 4"):
        extract_features(draw_images(5), network)


def test_mixed_sizes_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mixed", draw_images(5))
    Image.new("RGB", (9, 7)).save(folder / "0003.png")
    # The header tells: of such an image nothing is decoded.
    (folder / "0003.png").write_bytes((folder / "0003.png").read_bytes()[:45])

    with pytest.raises(EvaluationError, match=r"'mixed' mixes image sizes: '0003\.png' has 9x7 pixels .* 8x8"):
        read_all(folder, 2)


def test_images_that_are_too_large_are_refused_by_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vrpo.evaluation.images._MAX_BYTES", 3 * 64 * 63)
    folder = write_folder(tmp_path / "images", torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(EvaluationError, match=r"Image '0000\.png' has 64x64 pixels, which exceed the limit of 4,032"):
        read_all(folder, 2)


def test_undecodable_image_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", draw_images(3))
    (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:60])

    with pytest.raises(EvaluationError, match=r"Image '0001\.png' cannot be decoded"):
        read_all(folder, 2)


def test_npz_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3), np.float32))
    np.savez(tmp_path / "nchw.npz", np.zeros((2, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "pickled.npz", np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("text")

    for name, message in {
        "labels.npz": "holds no images",
        "float.npz": "is float32 of shape",
        "nchw.npz": r"uint8 of shape \(2, 3, 8, 8\)",
        "pickled.npz": "is object of shape",
        "text.npz": "no readable .npz",
        "absent.npz": "There is no",
    }.items():
        with pytest.raises(EvaluationError, match=message):
            open_images(tmp_path / name)


def test_truncated_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8))
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[-9000] ^= 1
    (tmp_path / "images.npz").write_bytes(content)

    with pytest.raises(EvaluationError, match="is damaged"):
        read_all(tmp_path / "images.npz", 4)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"float32 tensor of shape \(2, 3, 8, 8\)"):
        open_images(torch.zeros(2, 3, 8, 8))
    with pytest.raises(DataError):
        open_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        open_images(tmp_path / "empty")


def test_images_may_come_from_a_generator(network) -> None:
    images = draw_images(10)
    drawn = ImageSet("drawn", 10, lambda size: iter(images.split(size)))

    assert torch.equal(extract_features(drawn, network), network.pooled(images))
