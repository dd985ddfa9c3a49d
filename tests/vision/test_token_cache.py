from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vrpo.vision.cache as cache_module
from vrpo.errors import ConfigError, DataError
from vrpo.files import is_unfinished
from vrpo.vision.cache import TokenCache
from vrpo.vision.encoders import Encoder, load_encoder

ROWS = 23


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("mobilenetv2_050", weights="random", grid=2)


@pytest.fixture
def rows(memory_rows):
    return memory_rows(torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8), None)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch, encoder):
    # five rows and their mirror images to a part
    monkeypatch.setattr(cache_module, "PART_BYTES", 5 * 2 * 2 * encoder.grid**2 * encoder.width)


def test_cached_tokens_are_those_computed_online(tmp_path, encoder, rows):
    cache = TokenCache(tmp_path, encoder, rows, flips=True).build(batch_size=3)
    order = np.array([22, 0, 7, 7, 13, 4, 5])
    flipped = np.array([True, False, False, True, True, False, True])
    images = rows.images[order]
    images = torch.where(torch.from_numpy(flipped)[:, None, None, None], images.flip(-1), images)
    stored = TokenCache(tmp_path, encoder, rows, flips=True)
    found = stored.split(stored.read(order, flipped)).tokens
    assert found.dtype == torch.float16
    expected = encoder.tokens(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=2e-3)  # half an ulp of float16 is 5e-4
    mirrored_grid = encoder.tokens(rows.images[order]).view(-1, 2, 2, encoder.width).flip(2).flatten(1, 2)
    assert (found.float() - mirrored_grid)[0].abs().max() > 1e-3  # the image is mirrored, not its tokens
    size = sum(path.stat().st_size for path in cache.folder.glob("part-*.npy"))
    assert cache.bytes < size < cache.bytes + 128 * (cache.parts + 1)


def test_a_large_cache_is_agreed_to_first(tmp_path, encoder, rows, monkeypatch):
    cache = TokenCache(tmp_path, encoder, rows, flips=True)
    monkeypatch.setattr(cache, "bytes", 504 * 10**9)
    with pytest.raises(ConfigError, match=r"for 23 images take 469\.4 GiB in .*: agree to that with .* 470, or"):
        cache.check_room(10)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**33))
    with pytest.raises(DataError, match=r"take 469\.4 GiB in .*, and only 8\.0 GiB are free there: make room"):
        cache.check_room(500)
    monkeypatch.setattr(cache, "bytes", 2**32)
    cache.check_room(10)
    monkeypatch.setattr(cache, "bytes", 40 * 2**20)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**10))
    with pytest.raises(DataError, match=r"take 40\.0 MiB in .*, and only 5\.0 KiB are free there: make room"):
        cache.check_room(10)
    assert not cache.folder.exists()


def test_an_interrupted_build_resumes_at_the_part(tmp_path, encoder, rows):
    read = rows.read

    def killed(indices):
        if indices[0] >= 12:
            raise KeyboardInterrupt
        return read(indices)

    rows.read = killed
    with pytest.raises(KeyboardInterrupt):
        TokenCache(tmp_path, encoder, rows, flips=True).build(batch_size=2)
    rows.read = read
    left = next(tmp_path.iterdir()) / ".part-00003.npy.1.tmp"  # by a process that could not remove it
    left.write_bytes(b"half a part")
    resumed = TokenCache(tmp_path, encoder, rows, flips=True)
    assert not resumed.complete
    with pytest.raises(DataError, match="not complete"):
        resumed.read(np.arange(2))
    rows.rows_read.clear()
    progress: list[tuple[int, int]] = []
    resumed.build(batch_size=2, progress=lambda done, total: progress.append((done, total)))
    assert rows.rows_read == list(range(10, ROWS))
    assert progress[-1] == (ROWS, ROWS)
    whole = TokenCache(tmp_path / "whole", encoder, rows, flips=True).build(batch_size=2)
    everything = np.arange(ROWS)
    assert torch.equal(resumed.read(everything), whole.read(everything))
    assert not list(filter(is_unfinished, resumed.folder.iterdir()))
    rows.rows_read.clear()
    TokenCache(tmp_path, encoder, rows, flips=True).build()
    assert rows.rows_read == []


def test_tokens_of_anything_else_lie_elsewhere(tmp_path, encoder, rows, memory_rows):
    other_encoder = load_encoder("mobilenetv2_050", weights="random", grid=2, input_size=96)
    changed = rows.images.clone()
    changed[3, 0, 0, 0] += 1
    caches = [
        TokenCache(tmp_path, encoder, rows, flips=True),
        TokenCache(tmp_path, encoder, rows, flips=False),
        TokenCache(tmp_path, other_encoder, rows, flips=True),
        TokenCache(tmp_path, encoder, memory_rows(changed, None), flips=True),
    ]
    assert len({cache.folder for cache in caches}) == 4
    caches[0].build()
    assert [cache.complete for cache in caches] == [True, False, False, False]


def test_without_flips_mirrored_images_are_refused(tmp_path, encoder, rows):
    cache = TokenCache(tmp_path, encoder, rows, flips=False).build()
    assert cache.read(np.arange(3)).shape == (3, 4 * encoder.width)
    with pytest.raises(DataError, match="holds no mirrored images"):
        cache.read(np.arange(2), np.array([False, True]))


def test_a_part_cut_short_is_built_again_and_a_flipped_bit_is_found(tmp_path, encoder, rows):
    cache = TokenCache(tmp_path, encoder, rows, flips=True).build()
    expected = cache.read(np.arange(ROWS))
    part = cache.folder / "part-00001.npy"
    part.write_bytes(part.read_bytes()[:-10])
    again = TokenCache(tmp_path, encoder, rows, flips=True)
    assert not again.complete
    rows.rows_read.clear()
    again.build()
    assert rows.rows_read == [5, 6, 7, 8, 9]
    assert torch.equal(again.read(np.arange(ROWS)), expected)
    again.verify()
    damaged = bytearray(part.read_bytes())
    damaged[-1] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(DataError, match=r"part-00001\.npy is damaged"):
        TokenCache(tmp_path, encoder, rows, flips=True).verify()


def test_a_part_that_is_cut_while_it_is_read_is_named(tmp_path, encoder, rows):
    cache = TokenCache(tmp_path, encoder, rows, flips=True).build()
    whole = cache.read(np.arange(ROWS))
    part = cache.folder / "part-00001.npy"
    os.truncate(part, part.stat().st_size - 6)  # within a page, which then reads as zeros
    assert torch.equal(cache.read(np.array([4, 10])), whole[[4, 10]])
    with pytest.raises(DataError, match=r"part-00001\.npy' was cut to .* bytes while it was read"):
        cache.read(np.array([4, 9]))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_parts_hold_no_file_descriptors(tmp_path, encoder, rows):
    """The tokens of ImageNet are two thousand parts, and a process may hold a thousand descriptors."""
    TokenCache(tmp_path, encoder, rows, flips=True).build()
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache = TokenCache(tmp_path, encoder, rows, flips=True)
    cache.read(np.arange(ROWS))
    assert cache.parts == 5
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_full_disk_keeps_the_finished_parts(tmp_path, encoder, rows, monkeypatch):
    replace = os.replace

    def full(source, target):
        if target.name == "part-00002.npy":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"\(No space left on device\): it needs .* finished parts are kept"):
        TokenCache(tmp_path, encoder, rows, flips=True).build()
    monkeypatch.setattr(os, "replace", replace)
    rows.rows_read.clear()
    TokenCache(tmp_path, encoder, rows, flips=True).build()
    assert rows.rows_read == list(range(10, ROWS))
