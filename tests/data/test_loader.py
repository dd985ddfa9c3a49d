"""Batches: a pure function of seed and step, each sample once an epoch, read ahead by an honest thread."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo.data.loader import BatchOrder, Loader, hash_positions
from vrpo.errors import ConfigError, DataError


class Rows:
    """Row i is filled with i, and its last column is marked."""

    def __init__(self, size: int, labelled: bool = True) -> None:
        self.size = size
        self.labelled = labelled

    def __len__(self) -> int:
        return self.size

    def read(self, indices):
        pixels = torch.from_numpy(indices.astype(np.uint8))[:, None, None, None].repeat(1, 3, 2, 4)
        pixels[..., -1] = 255
        return pixels, torch.from_numpy(indices % 5) if self.labelled else None


def loader_threads() -> int:
    return sum(thread.name == "vrpo-loader" for thread in threading.enumerate())


def test_hash_is_the_splitmix64_sequence():
    # The published first outputs for seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert hash_positions(1234567, np.arange(4)).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 150), st.integers(0, 2**63 - 1))
def test_epochs_follow_each_other_and_hold_every_sample_once(size, batch_size, seed):
    order = BatchOrder(size, batch_size, seed)
    steps = -(-3 * size // batch_size)
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_batch_does_not_depend_on_what_was_read_before():
    forward = BatchOrder(100, 32, 7)
    batches = [forward.indices(step) for step in range(20)]
    for step in (19, 3, 11, 0):
        np.testing.assert_array_equal(BatchOrder(100, 32, 7).indices(step), batches[step])
        np.testing.assert_array_equal(forward.indices(step), batches[step])


def test_seeds_and_epochs_give_different_orders():
    orders = [BatchOrder(50, 50, seed).indices(step).tolist() for seed in range(3) for step in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_permutations_are_uniform():
    # Each of 6 samples in each of 6 places: chi-square with 25 degrees of freedom, 99.99% below 61.
    counts = np.zeros((6, 6))
    order = BatchOrder(6, 6, 1)
    for epoch in range(3000):
        counts[order.indices(epoch), np.arange(6)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 61


def test_coins_are_fair_and_differ_between_epochs():
    order = BatchOrder(1000, 1000, 5)
    coins = np.stack([order.flips(step) for step in range(40)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(coins.size)
    agreement = (coins[1:] == coins[:-1]).mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / np.sqrt(coins.size)


def test_batches_are_those_of_the_order_and_mirrored_by_the_coin():
    loader = Loader(Rows(20), 8, seed=3, flip=True)
    batches = list(loader.batches(5, 9))
    assert [batch.step for batch in batches] == [5, 6, 7, 8]
    order = BatchOrder(20, 8, 3)
    for batch in batches:
        np.testing.assert_array_equal(batch.indices, order.indices(batch.step))
        np.testing.assert_array_equal(batch.flipped.numpy(), order.flips(batch.step))
        assert batch.pixels.dtype == torch.uint8
        assert torch.equal(batch.pixels[:, 0, 0, 1], torch.from_numpy(batch.indices.astype(np.uint8)))
        assert torch.equal(batch.pixels[..., 0].eq(255).all((1, 2)), batch.flipped)
        assert torch.equal(batch.pixels[..., 3].eq(255).all((1, 2)), ~batch.flipped)
        assert torch.equal(batch.labels, torch.from_numpy(batch.indices % 5))
    assert any(batch.flipped.any() for batch in batches)


def test_what_is_cached_of_the_rows_is_read_by_the_thread():
    threads = []

    class Cache:
        def read(self, indices, flipped, pinned):
            assert not pinned
            threads.append(threading.current_thread().name)
            return torch.from_numpy(np.stack([indices, flipped], axis=1))

    for batch in Loader(Rows(20), 8, seed=3, flip=True, caches=[Cache(), Cache()]).batches(0, 4):
        assert len(batch.cached) == 2
        for rows in batch.cached:
            np.testing.assert_array_equal(rows[:, 0], batch.indices)
            assert torch.equal(rows[:, 1].bool(), batch.flipped)
    assert threads == ["vrpo-loader"] * 8


def test_without_flips_or_labels():
    batch = next(Loader(Rows(20, labelled=False), 8, seed=3, flip=False).batches(0))
    assert batch.labels is None
    assert not batch.flipped.any()


def test_ranks_divide_the_global_batch():
    whole = list(Loader(Rows(30), 12, seed=1, flip=True).batches(0, 6))
    parts = [list(Loader(Rows(30), 12, 1, True, rank=rank, world_size=3).batches(0, 6)) for rank in range(3)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step].indices for part in parts]), batch.indices)
        assert torch.equal(torch.cat([part[step].pixels for part in parts]), batch.pixels)
        assert torch.equal(torch.cat([part[step].flipped for part in parts]), batch.flipped)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"batch of 10 .* 4 processes: the nearest size is 8"):
        Loader(Rows(30), 10, 0, False, rank=0, world_size=4)


def test_a_batch_may_be_larger_than_the_data():
    batch = next(Loader(Rows(3), 10, seed=0, flip=False).batches(0))
    assert sorted(batch.indices[:9].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


class Slow(Rows):
    def read(self, indices):
        time.sleep(0.02)
        return super().read(indices)


def test_waiting_is_counted_and_hidden_behind_work():
    idle = Loader(Slow(20), 4, 0, False)
    list(idle.batches(0, 10))
    assert idle.wait_seconds > 0.15
    busy = Loader(Slow(20), 4, 0, False)
    for _ in busy.batches(0, 10):
        time.sleep(0.03)
    assert busy.wait_seconds < 0.1


def test_no_more_than_prefetch_batches_are_read_ahead():
    class Counting(Rows):
        reads = 0

        def read(self, indices):
            self.reads += 1
            return super().read(indices)

    rows = Counting(20)
    batches = Loader(rows, 4, 0, False, prefetch=2).batches(0)
    next(batches)
    time.sleep(0.2)
    assert rows.reads == 1 + 2 + 1  # taken, queued, and one in the thread's hands
    batches.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("the disk is gone"), r"\(OSError: the disk is gone\): check the data with `vrpo data verify`"),
        (MemoryError(), r"\(memory ran out\): go on with --resume and a smaller --data.prefetch"),
    ],
)
def test_an_error_in_the_thread_reaches_the_consumer_with_the_batch(error, told):
    class Failing(Rows):
        reads = 0

        def read(self, indices):
            self.reads += 1
            if self.reads == 3:
                raise error
            return super().read(indices)

    batches = Loader(Failing(20), 4, 0, False).batches(7)
    assert [next(batches).step, next(batches).step] == [7, 8]
    with pytest.raises(DataError, match=r"data thread failed at batch 9 of the data " + told) as caught:
        next(batches)
    assert caught.value.__cause__ is error
    assert loader_threads() == 0


def test_breaking_off_ends_the_thread():
    for batch in Loader(Slow(20), 4, 0, False, prefetch=1).batches(0):
        if batch.step == 2:
            break
    assert loader_threads() == 0
