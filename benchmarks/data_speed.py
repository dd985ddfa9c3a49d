"""Speed and memory of data: shuffled latent rows, preparing images, opening a data set of ImageNet's size.

    python benchmarks/data_speed.py --images tiny-imagenet-50-train.zip

Ratios compare two ways of doing the same in one run, in turns. Memory is that of a process of its own, with its
workers. PyTorch is imported only where it is needed, because workers import this file too.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROW = (8, 32, 32)
BATCH = 256


def read_rows(folder: Path, rows: int, files: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Rows a second in shuffled order from shards and from a folder of ``.npy`` files, both in the page cache."""

    import torch

    from vrpo.data.shards import ShardedDataset

    torch.set_num_threads(1)
    draws = np.random.default_rng(0)
    write_latents(folder / "shards", rows, row_bytes=True)
    (folder / "npy").mkdir()
    for row in range(files):
        np.save(folder / "npy" / f"{row:08d}.npy", draws.integers(0, 2**15, ROW, dtype=np.uint16).view(np.float16))
    dataset = ShardedDataset(folder / "shards")
    order = draws.permutation(rows)
    names = [folder / "npy" / f"{row:08d}.npy" for row in draws.permutation(files)]

    def from_shards(step: int) -> None:
        dataset.read_latents(np.take(order, np.arange(step * BATCH, (step + 1) * BATCH), mode="wrap"))

    def from_files(step: int) -> None:
        torch.from_numpy(np.stack([np.load(names[(step * BATCH + i) % files]) for i in range(BATCH)]))

    for step in range(-(-rows // BATCH)):
        from_shards(step)  # the first touch of a page maps it
    for step in range(-(-files // BATCH)):
        from_files(step)
    shards, npy = [], []
    for _ in range(rounds):
        shards.append(_rate(from_shards, seconds))
        npy.append(_rate(from_files, seconds))
    return {
        "rows": rows,
        "files": files,
        "row_bytes": 2 * int(np.prod(ROW)),
        "shards_rows_per_second": statistics.median(shards),
        "npy_rows_per_second": statistics.median(npy),
        "ratio": statistics.median(a / b for a, b in zip(shards, npy, strict=True)),
        "rounds": [shards, npy],
    }


def _rate(work: Callable[[int], None], seconds: float) -> float:
    start, step = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work(step)
        step += 1
    return step * BATCH / (time.perf_counter() - start)


def write_latents(folder: Path, rows: int, *, row_bytes: bool, shards: int = 8) -> None:
    """Write a data set of latents by the package's own functions; without ``row_bytes`` its rows are holes."""
    from vrpo.data import manifest as parts
    from vrpo.data.shards import Rows, write_shard

    folder.mkdir(parents=True)
    draws = np.random.default_rng(1)
    share = -(-rows // shards)
    records = []
    for shard in range(shards):
        count = min(share, rows - shard * share)
        keys = [f"n{shard:08d}/n{shard:08d}_{row:08d}.JPEG" for row in range(count)]
        labels = draws.integers(0, 1000, count).tolist()
        size = ROW if row_bytes else (ROW[0], 1, 1)
        latents = draws.integers(0, 2**15, (count, *size), dtype=np.uint16).view(np.float16)
        records.append(write_shard(folder, shard, [Rows(None, latents)], labels, keys))
    preprocessing = parts.Preprocessing(size=256 if row_bytes else 8, max_pixels=1)
    latent = parts.LatentRecord(
        autoencoder="synthetic",
        weights=None,
        channels=ROW[0] // 2,
        size=ROW[1] if row_bytes else 1,
        posterior=True,
        precision="fp16",
        normalisation="autoencoder",
        pixels=False,
    )
    normaliser = parts.Normaliser(shift=(0.0,) * (ROW[0] // 2), scale=(0.18215,) * (ROW[0] // 2))
    shown = parts.Manifest(
        version=2,
        source=parts.SourceRecord(name="synthetic", kind="synthetic", listing="0" * 64),
        counts=parts.Counts(images=rows, bad=0, ignored=0, upscaled=0),
        class_names=tuple(f"n{number:08d}" for number in range(1000)),
        class_counts=(0,) * 1000,
        preprocessing=preprocessing,
        latents=latent,
        normaliser=normaliser,
        rows_per_shard=share,
        shards=tuple(records),
        bad=(),
        upscaled=(),
        fingerprint=parts.fingerprint(preprocessing, records, latent, normaliser),
    )
    (folder / parts.MANIFEST).write_text(shown.to_json(), encoding="utf-8")


def prepare_images(source: Path, folder: Path, size: int, workers: int) -> dict[str, Any]:
    """Prepare a zip, watching the memory of this process and its workers."""
    from vrpo.data.prepare import prepare

    with _watched() as peak:
        start = time.perf_counter()
        result = prepare(source, folder / "prepared", size=size, workers=workers, progress=False)
        seconds = time.perf_counter() - start
    count = result.manifest.counts.images
    return {
        "images": count,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "peak_memory_mb": peak[0] / 2**20,
    }


def naive_images(source: Path, folder: Path, size: int) -> dict[str, Any]:
    """The same in one process: read, decode, crop, store in arrays of the same size, one image after the other."""
    from PIL import Image

    from vrpo.data.transforms import centre_crop

    folder = folder / "naive"
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        per_shard = (256 << 20) // (3 * size * size)
        for shard in range(0, len(names), per_shard):
            images = []
            for name in names[shard : shard + per_shard]:
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    images.append(np.asarray(centre_crop(image.convert("RGB"), size)).transpose(2, 0, 1))
            np.save(folder / f"{shard:08d}.npy", np.stack(images))
    seconds = time.perf_counter() - start
    return {"images": len(names), "seconds": seconds, "images_per_second": len(names) / seconds}


def open_large(folder: Path, rows: int, shards: int) -> dict[str, Any]:
    """Open a data set of ImageNet's size, with its labels and one key, and say how long and how much that takes."""
    from vrpo.data.shards import ShardedDataset

    before = _peak()
    start = time.perf_counter()
    dataset = ShardedDataset(folder)
    opened = time.perf_counter()
    labels = dataset.labels()
    key = dataset.key(rows - 1)
    seconds = time.perf_counter() - start
    after = _peak()
    assert labels is not None
    return {
        "rows": len(labels),
        "shards": shards,
        "open_seconds": opened - start,
        "open_labels_key_seconds": seconds,
        "process_peak_mb": after / 2**20,
        "added_mb": (after - before) / 2**20,
        "last_key": key,
        "torch_imported": "torch" in sys.modules,
    }


def _peak() -> int:
    """Return the most memory that this process has held; unlike ``ru_maxrss`` it knows nothing of the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class _watched:
    """Samples the memory (proportional set size) of this process and its children until the block ends."""

    def __enter__(self) -> list[int]:
        self.peak, self.done = [0], threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self.peak

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            total = sum(map(_memory, [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]))
            self.peak[0] = max(self.peak[0], total)


def _memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``work`` in a process of its own, which may have children."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _send(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(work(*arguments))


def measure(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the result of each measurement."""
    quick = options.quick
    rows, files, seconds, rounds = (4096, 512, 0.3, 3) if quick else (65_536, 8192, 3.0, 5)
    yield "latent_rows", _apart(read_rows, folder / "rows", rows, files, seconds, rounds)
    large, shards = (20_000, 10) if quick else (1_281_167, 1000)
    write_latents(folder / "large", large, row_bytes=False, shards=shards)
    yield "large_manifest", _apart(open_large, folder / "large", large, shards)
    if options.images is None:
        return
    ratios, fast, slow = [], [], []
    for turn in range(1 if quick else 3):
        naive = _apart(naive_images, options.images, folder / f"turn-{turn}", options.size)
        mine = _apart(prepare_images, options.images, folder / f"turn-{turn}", options.size, options.workers)
        fast.append(mine)
        slow.append(naive)
        ratios.append(mine["images_per_second"] / naive["images_per_second"])
    yield (
        "prepare",
        {
            "source": options.images.name,
            "size": options.size,
            "workers": options.workers,
            "ratio": statistics.median(ratios),
            "peak_memory_mb": max(run["peak_memory_mb"] for run in fast),
            "prepare": fast,
            "naive": slow,
        },
    )


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="zip of images to prepare; left out: no such measurement")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files, about 2 GB")
    options = parser.parse_args()

    import torch

    from machine import describe, slug

    torch.set_num_threads(1)
    machine = describe(torch.device("cpu"))
    results = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for name, result in measure(options, Path(scratch)):
            results[name] = result
            print(name, json.dumps(result), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"data-speed-{slug(machine)}.json"
    file.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
