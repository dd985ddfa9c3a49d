from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import vrpo.vision.convnet as convnet
from vrpo.errors import CheckpointError, ConfigError, DataError
from vrpo.vision.convnet import fit_encoder
from vrpo.vision.encoders import load_encoder, load_feature_network


@pytest.fixture(scope="module")
def fitted(digits, tmp_path_factory):
    lines: list[str] = []
    path = tmp_path_factory.mktemp("encoder") / "digits.safetensors"
    result = fit_encoder(digits, path, steps=40, width=48, grid=4, progress=lines.append)
    return result, lines


def test_digits_are_learned(fitted):
    result, lines = fitted
    assert result.steps == 40
    assert result.accuracy > 0.8  # chance is 0.1
    assert f"{result.accuracy:.1%} of 179 held-out images right" in lines[-1]


def test_accuracy_is_of_images_never_trained_on(memory_rows, monkeypatch, tmp_path):
    rows = memory_rows(torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8), torch.arange(200) % 2)
    read_in_training: list[int] = []
    accuracy = convnet._accuracy

    def marked(*args):
        read_in_training.extend(rows.rows_read)
        rows.rows_read.clear()
        return accuracy(*args)

    monkeypatch.setattr(convnet, "_accuracy", marked)
    result = fit_encoder(rows, tmp_path / "noise.safetensors", steps=20, width=16, grid=2, progress=None)
    assert len(rows.rows_read) == 20
    assert set(read_in_training).isdisjoint(rows.rows_read)
    assert {*read_in_training, *rows.rows_read} == set(range(200))
    assert result.accuracy < 0.85  # there is nothing to learn


def test_equal_steps_give_equal_weights(digits, tmp_path):
    def fit(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + len(name))  # the global random state plays no part
        path = tmp_path / name
        fit_encoder(digits, path, steps=3, seed=seed, width=16, grid=4, flips=True, progress=None)
        return load_file(path)

    first, again, other = fit("a.safetensors", 1), fit("again.safetensors", 1), fit("b.safetensors", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_minutes_bound_the_training(digits, tmp_path):
    result = fit_encoder(digits, tmp_path / "short.safetensors", minutes=0.01, width=16, grid=2, progress=None)
    assert 0.6 <= result.seconds < 5


def test_fitted_file_is_an_encoder_on_any_grid(fitted, digits):
    result, _ = fitted
    images = digits.images[:64]
    for grid in (4, 8):
        encoder = load_encoder("vrpo-conv", weights=result.path, grid=grid)
        tokens = encoder.tokens(images)
        assert tokens.shape == (64, grid**2, 48)
        assert (encoder.family, encoder.input_size, encoder.resampled) == ("conv", 4 * grid, False)
    network = load_feature_network("vrpo-conv", weights=result.path)
    assert network.input_size == 16
    features = network.pooled(digits.images)
    same = digits.labels[:, None] == digits.labels[None, :]
    distances = torch.cdist(features, features).fill_diagonal_(float("inf"))
    assert same.gather(1, distances.argmin(1, keepdim=True)).double().mean() > 0.85


def test_tokens_are_in_their_place(fitted, digits):
    encoder = load_encoder("vrpo-conv", weights=fitted[0].path, grid=4)
    images = digits.images[:8]
    before = encoder.tokens(images)
    for row in range(2):
        for column in range(2):
            changed = images.clone()
            place = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            changed[place] = 255 - changed[place]
            moved = (encoder.tokens(changed) - before).norm(dim=-1).view(8, 2, 2, 2, 2).mean(dim=(0, 2, 4))
            assert moved.argmax().item() == 2 * row + column


def test_augmentation_shifts_and_mirrors_only():
    ramp = torch.arange(16.0).expand(64, 3, 16, 16).contiguous()
    generator = torch.Generator().manual_seed(0)
    shifted = convnet._augment(ramp, generator, flips=False)
    offsets = shifted[:, 0, 0, 8] - 8
    assert set(offsets.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    expected = (torch.arange(16.0) + offsets[:, None]).clamp(0, 15)
    assert torch.equal(shifted, expected[:, None, None, :].expand(64, 3, 16, 16))
    mirrored = convnet._augment(ramp, generator, flips=True)
    falling = mirrored[:, 0, 0, 4] > mirrored[:, 0, 0, 12]
    assert 16 < int(falling.sum()) < 48


def test_data_that_cannot_be_learned_from(memory_rows, tmp_path):
    images = torch.zeros(30, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(30) % 2
    for rows, reason in [
        (memory_rows(images, None), "unlabelled"),
        (memory_rows(images, torch.zeros(30, dtype=torch.int64)), "one class only"),
        (memory_rows(images[:10], labels[:10]), "has 10 images, fitting an encoder needs 20"),
    ]:
        with pytest.raises(DataError, match=reason):
            fit_encoder(rows, tmp_path / "never.safetensors", progress=None)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(digits, fitted, tmp_path, monkeypatch):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(fitted[0].path.read_bytes())

    def full(state, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DataError, match=r"could not be written to .* \(no space left on device\)"):
        fit_encoder(digits, path, steps=1, width=16, grid=2, progress=None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert path.read_bytes() == fitted[0].path.read_bytes()


def test_files_of_another_kind(tmp_path, fitted):
    with pytest.raises(CheckpointError, match="no published weights"):
        load_encoder("vrpo-conv", grid=4)
    with pytest.raises(CheckpointError, match="no encoder file at"):
        load_encoder("vrpo-conv", weights=tmp_path / "none.safetensors", grid=4)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="was not written by `vrpo encoder fit`"):
        load_encoder("vrpo-conv", weights=tmp_path / "other.safetensors", grid=4)
    with pytest.raises(ConfigError, match="has one feature map"):
        load_encoder("vrpo-conv", weights=fitted[0].path, grid=4, feature=2)
