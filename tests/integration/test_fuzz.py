"""Files of unknown origin, mutated at random: an answer or one of our errors, soon, in bounded memory.

``INPUTS`` are tried of each kind in an ordinary run, and ``SOAK_INPUTS`` as ``pytest -m soak``.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from small_run import tiny_config

from vrpo.config_load import load_file, to_yaml, validate
from vrpo.data.shards import ShardedDataset
from vrpo.data.transforms import decode
from vrpo.errors import VrpoError
from vrpo.evaluation.frechet import FeatureStatistics
from vrpo.evaluation.images import open_images
from vrpo.files import load_tensors
from vrpo.models.weights import read_tensors
from vrpo.runs import Run
from vrpo.training.checkpoint import find_checkpoints, read_state
from vrpo.vision.convnet import ConvConfig, ConvEncoder, load_conv
from vrpo.vision.weight_files import read_metadata, read_weights

INPUTS, SOAK_INPUTS = 200, 20_000
PATIENCE = timedelta(seconds=10)
MEMORY_MB = 400

# What is worth writing into a file: limits of integers, brackets, words of the formats.
TOKENS = [
    b"[" * 200, b"{", b"}", b'"', b"null", b"-1", b"1e999", b"NaN", b"9" * 30, b"\xff" * 8, b"\x00" * 8, b"&a", b"*a",
    b"!!python/object/apply:os.system", b"\x7f" * 8, b"<<: ", b"\n", b"\xed\xa0\x80", b"../../", b"F64", b"BOOL",
    b"data_offsets", b"shape", b"O",
]  # fmt: skip


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, float, bytes | int]]:
    """Return up to six edits: a kind, a place from 0 to 1, and what it needs."""
    kinds = {
        "flip": st.integers(0, 7),
        "put": st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=9),
        "over": st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=9),
        "cut": st.integers(1, 64),
        "end": st.just(0),
    }
    found = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(sorted(kinds)))
        # Most formats keep what matters at the beginning or the end.
        place = draw(st.floats(0, 1) | st.floats(0, 0.02) | st.floats(0.98, 1))
        found.append((kind, place, draw(kinds[kind])))
    return found


def edited(whole: bytes, changes: list[tuple[str, float, bytes | int]], keep_size: bool = False) -> bytes:
    content = bytearray(whole)
    for kind, place, what in changes:
        at = min(int(place * len(content)), max(0, len(content) - 1))
        if kind == "flip" and content:
            content[at] ^= 1 << int(what)  # type: ignore[arg-type]
        elif kind == "put":
            content[at:at] = what  # type: ignore[assignment]
        elif kind == "over":
            content[at : at + len(what)] = what  # type: ignore[arg-type, assignment]
        elif kind == "cut":
            del content[at : at + int(what)]  # type: ignore[arg-type]
        elif kind == "end" and not keep_size:
            del content[at:]
    if keep_size:
        content = content[: len(whole)].ljust(len(whole), b"\0")
    return bytes(content)


def attempt(work: Callable[[], object]) -> None:
    with contextlib.suppress(VrpoError):
        work()


def tried(whole: bytes, check: Callable[[bytes], None], inputs: int, keep_size: bool = False) -> None:
    """Try ``inputs`` mutations of a valid file; what Python holds at its most may not grow beyond ``MEMORY_MB``."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=inputs,
        deadline=PATIENCE,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(edits())
    def trial(changes: list[tuple[str, float, bytes | int]]) -> None:
        check(edited(whole, changes, keep_size))

    check(whole)
    trial()
    unit = 2**20 if sys.platform == "darwin" else 2**10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < MEMORY_MB


def manifest(folder: Path, finished: Path, inputs: int) -> None:
    shutil.copytree(finished / "data", folder / "data")
    file = folder / "data" / "manifest.json"
    sealed = json.loads(file.read_text())

    def check(content: bytes) -> None:
        file.write_bytes(content)
        attempt(lambda: read_rows(ShardedDataset(folder / "data")))

    tried(file.read_bytes(), check, inputs // 2)
    # Without its seal, so that what lies behind it is reached.
    tried(json.dumps({key: value for key, value in sealed.items() if key != "seal"}).encode(), check, inputs // 2)


def read_rows(dataset: ShardedDataset) -> None:
    count = min(len(dataset), 1000)
    dataset.read(np.arange(count))
    for row in range(count):
        dataset.key(row)


def shard(folder: Path, finished: Path, inputs: int) -> None:
    shutil.copytree(finished / "data", folder / "data")
    file = folder / "data" / "shard-00001.safetensors"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        attempt(lambda: read_rows(ShardedDataset(folder / "data")))

    whole = file.read_bytes()
    tried(whole, check, inputs, keep_size=True)
    # The header alone, which mutations of a large file rarely meet.
    length = 8 + int.from_bytes(whole[:8], "little")
    tried(whole[:length], lambda header: check((header + whole[length:])[: len(whole)].ljust(len(whole))), inputs)


def config(folder: Path, finished: Path, inputs: int) -> None:
    file = folder / "config.yaml"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        attempt(lambda: validate(load_file(file), "the file"))
        attempt(lambda: Run(folder).config)

    tried(to_yaml(tiny_config(finished / "data")).encode(), check, inputs // 2)
    few = {"train": {"lr": 0.1, "images": "2M", "betas": [0.9, 0.95]}, "align": {"vrpo": {"semantic": {"0": 1.0}}}}
    tried(yaml.safe_dump(few).encode(), check, inputs // 2)


def npz(folder: Path, finished: Path, inputs: int) -> None:
    file = folder / "images.npz"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        attempt(lambda: [batch.shape for batch in open_images(file).batches(4)])
        attempt(lambda: FeatureStatistics.load(file))

    for pack in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
        pack(stream, arr_0=images, mu=np.zeros(3), sigma=np.eye(3), count=np.array(6))
        tried(stream.getvalue(), check, inputs // 2)


def weights(folder: Path, finished: Path, inputs: int) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "pos_embed": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, folder / "w.safetensors", {"note": "text"})
    torch.save({"ema": tensors}, folder / "w.pt")
    network = ConvEncoder(ConvConfig(width=4, blocks=1, input_size=8, num_classes=2))
    record = json.dumps({"config": {"width": 4, "blocks": 1, "input_size": 8, "num_classes": 2}})
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "conv.safetensors", {"vrpo_encoder": record})

    def safe(content: bytes) -> None:
        (folder / "w.safetensors").write_bytes(content)
        for read in (read_weights, read_metadata, load_tensors, read_tensors):
            attempt(lambda read=read: read(folder / "w.safetensors"))

    def pickled(content: bytes) -> None:
        (folder / "w.pt").write_bytes(content)
        for read in (read_weights, read_tensors):
            attempt(lambda read=read: read(folder / "w.pt"))

    def conv(content: bytes) -> None:
        (folder / "conv.safetensors").write_bytes(content)
        attempt(lambda: load_conv(folder / "conv.safetensors"))

    tried((folder / "w.safetensors").read_bytes(), safe, inputs)
    tried((folder / "w.pt").read_bytes(), pickled, inputs)
    tried((folder / "conv.safetensors").read_bytes(), conv, inputs)


def checkpoint(folder: Path, finished: Path, inputs: int) -> None:
    newest = find_checkpoints(finished / "run")[0]
    file = folder / "state.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        attempt(lambda: read_state(folder))
        attempt(lambda: read_state(folder, verify=True))

    tried((newest / "state.json").read_bytes(), check, inputs)


def telemetry(folder: Path, finished: Path, inputs: int) -> None:
    shutil.copytree(finished / "run", folder / "run")

    def check(content: bytes, file: Path) -> None:
        file.write_bytes(content)
        run = Run(folder / "run")
        attempt(lambda: (run.metrics("train"), run.sample_grids, run.evaluations, run.name, run.objective, run.seed))

    for name in ("metrics.jsonl", "run.json"):
        file = folder / "run" / name
        whole = file.read_bytes()
        tried(whole, lambda content, file=file: check(content, file), inputs // 2)
        file.write_bytes(whole)


def images(folder: Path, finished: Path, inputs: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        tried(stream.getvalue(), lambda data: attempt(lambda: decode(data, 8, 10**6)), inputs // 4)


KINDS = [manifest, shard, config, npz, weights, checkpoint, telemetry, images]
kinds = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@kinds
def test_mutated_files(kind: Callable[[Path, Path, int], None], finished: Path, tmp_path: Path) -> None:
    kind(tmp_path, finished, INPUTS)


@quiet
@kinds
@pytest.mark.soak
def test_many_mutated_files(kind: Callable[[Path, Path, int], None], finished: Path, tmp_path: Path) -> None:
    kind(tmp_path, finished, SOAK_INPUTS)
