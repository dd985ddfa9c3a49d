"""Files of unknown origin, mutated at random: an answer or one of our errors, soon, in bounded memory.

``INPUTS`` are tried of each kind in an ordinary run, and ``SOAK_INPUTS`` as ``pytest -m soak``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from small_run import tiny_config

from vrpo.checkpoints import find_checkpoints, read_state
from vrpo.config_load import load_file, to_yaml, validate
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import open_source
from vrpo.data.transforms import decode
from vrpo.data.workers import Work, decode_entries
from vrpo.errors import VrpoError
from vrpo.evaluation.frechet import FeatureStatistics
from vrpo.evaluation.images import open_images
from vrpo.files import load_tensors
from vrpo.models.weights import read_tensors
from vrpo.report import charts
from vrpo.report.compare import compare
from vrpo.runs import Run
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


PROTOCOL = {
    "sample_count": 9,
    "reference": {"name": "r", "count": 9, "fingerprint": "ab"},
    "features": {"name": "Inception", "architecture": "inception", "weights_hash": "cd", "input_size": 299},
    "sampler": "ode-euler",
    "steps": 2,
    "guidance_scale": 1.5,
    "guidance_interval": [0.0, 1.0],
    "selection": {"rule": "best", "candidates": 2, "time": 0.5},
    "kid": {"subsets": 2, "subset_size": 4, "seed": 0},
}


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


# How many inputs each search tried: hypothesis may know of fewer than it is asked for.
TRIED: list[int] = []


def searched(given_as: st.SearchStrategy[Any], check: Callable[[Any], None], inputs: int) -> None:
    """Check ``inputs`` examples; what this process holds at its most may not grow beyond ``MEMORY_MB``."""

    @settings(
        max_examples=inputs,
        deadline=PATIENCE,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(given_as)
    def trial(example: Any) -> None:
        TRIED[-1] += 1
        check(example)

    forget_peak()
    before = peak_mb()
    TRIED.append(0)
    trial()
    assert peak_mb() - before < MEMORY_MB


def forget_peak() -> None:
    """Let the peak of this process begin anew from what it holds now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the most memory that this process held since the last ``forget_peak``, or in its life elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        told = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(told[1]) / 2**10  # type: ignore[index]
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def tried(whole: bytes, check: Callable[[bytes], None], inputs: int, keep_size: bool = False) -> None:
    """Try ``inputs`` mutations of a valid file."""
    check(whole)
    searched(edits(), lambda changes: check(edited(whole, changes, keep_size)), inputs)


# Values of another kind than a reader expects, or of no sensible size.
VALUES = [
    None, True, "x", "", "\ud800", "\x1b[2J", "a" * 300, "../" * 9, "$\\frac{", -1, 0, 10**400, -1e308, 1e308, 5e-324,
    float("nan"), float("inf"), [], {}, [[1], [1, 2]], [1, "x", None], {"a": {"b": 1}}, [{"a": 1}],
]  # fmt: skip


def leaves(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value of nested mappings and lists, branches included."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [*([place] if place else []), *(found for key, value in below for found in leaves(value, (*place, key)))]


def exchanged(tree: Any, changes: list[tuple[int, int]]) -> Any:
    """Return a copy of nested mappings and lists with some values exchanged for others of ``VALUES``."""
    tree = copy.deepcopy(tree)
    for where, what in changes:
        places = leaves(tree)
        *path, last = places[where % len(places)]
        branch = tree
        for key in path:
            branch = branch[key]
        branch[last] = copy.deepcopy(VALUES[what])
    return tree


def tried_values(tree: Any, check: Callable[[Any], None], inputs: int) -> None:
    """Try ``inputs`` copies of nested mappings and lists with up to four values exchanged."""
    change = st.tuples(st.integers(0, 10_000), st.integers(0, len(VALUES) - 1))
    check(tree)
    searched(st.lists(change, min_size=1, max_size=4), lambda changes: check(exchanged(tree, changes)), inputs)


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
    run, lines, facts = folder / "run", folder / "run" / "metrics.jsonl", folder / "run" / "run.json"

    def put(file: Path, content: bytes) -> None:
        whole = file.read_bytes()
        file.write_bytes(content)
        attempt(lambda: compare([run], folder / "report.html", json_file=True))
        file.write_bytes(whole)

    # Without their seals too, so that what lies behind them is reached.
    records = [unsealed(line) for line in lines.read_bytes().splitlines()]
    told = unsealed(facts.read_bytes())
    scored = {"step": 4, "images": 32, "metrics": {"fd": 9.0, "is": 2.0}, "protocol": PROTOCOL}
    evaluation = run / "evaluations" / "a.json"
    evaluation.parent.mkdir()
    evaluation.write_text(json.dumps(scored))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    # A figure takes longer than all the rest, so most pages have none.
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("draw_lines", "draw_history"):
            patch.setattr(charts, draw, lambda *_, **__: "")
        for file, bare in ((lines, as_lines(records)), (facts, json.dumps(told).encode())):
            tried(file.read_bytes(), lambda content, file=file: put(file, content), inputs // 4)
            tried(bare, lambda content, file=file: put(file, content), inputs // 4)
        tried_values(records, lambda records: put(lines, as_lines(records)), inputs // 4)
        tried_values(told, lambda told: put(facts, json.dumps(told).encode()), inputs // 4)
        tried_values(scored, lambda scored: put(evaluation, json.dumps(scored).encode()), inputs // 4)
        tried_values(tree, lambda tree: put(run / "config.yaml", yaml.safe_dump(tree).encode()), inputs // 4)
    tried_values(records, lambda records: put(lines, as_lines(records)), inputs // 20)


def unsealed(line: bytes) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != "seal"}


def as_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def tar(folder: Path, finished: Path, inputs: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in ((f"{i}.{kind}", content) for i in range(3) for kind, content in sample_files(i)):
            info = tarfile.TarInfo(name if name != "2.png" else "long/" * 30 + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    tried(stream.getvalue(), lambda content: read_source(folder / "images.tar", content), inputs)
    # The headers alone, each with a checksum that is right, which readers look at first.
    whole = stream.getvalue()
    starts = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]

    def check(changes: list[tuple[str, float, bytes | int]]) -> None:
        content = bytearray(whole)
        for at in starts:
            header = bytearray(edited(whole[at : at + 512], changes, keep_size=True))
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            content[at : at + 512] = header
        read_source(folder / "images.tar", bytes(content))

    searched(edits(), check, inputs)


def sample_files(number: int) -> list[tuple[str, bytes]]:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, "PNG")
    return [("png", stream.getvalue()), ("cls", str(number).encode())]


def read_source(file: Path, content: bytes) -> None:
    file.write_bytes(content)

    def read() -> None:
        source = open_source(file)
        decode_entries(source.opener, source.entries[:100], Work(8, 10**6))

    attempt(read)


def parquet(folder: Path, finished: Path, inputs: int) -> None:
    arrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": sample_files(number)[0][1], "path": None} for number in range(6)]
    names = json.dumps({"info": {"features": {"label": {"names": ["a", "b", "c"]}}}})
    table = arrow.table({"image": rows, "label": [0, 1, 2] * 2}).replace_schema_metadata({"huggingface": names})
    for compression in ("none", "snappy"):
        stream = io.BytesIO()
        writer.write_table(table, stream, row_group_size=3, compression=compression)
        whole = stream.getvalue()
        tried(whole, lambda content: read_source(folder / "images.parquet", content), inputs // 2)
        # The description at the end alone, which mutations of a large file rarely meet.
        start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        tried(
            whole[start:-8],
            lambda footer, head=whole[:start]: read_source(
                folder / "images.parquet", head + footer + len(footer).to_bytes(4, "little") + b"PAR1"
            ),
            inputs // 2,
        )


def images(folder: Path, finished: Path, inputs: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        tried(stream.getvalue(), lambda data: attempt(lambda: decode(data, 8, 10**6)), inputs // 4)


KINDS = [manifest, shard, config, npz, weights, checkpoint, telemetry, tar, parquet, images]
kinds = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@kinds
def test_mutated_files(kind: Callable[[Path, Path, int], None], finished: Path, tmp_path: Path) -> None:
    kind(tmp_path, finished, INPUTS)


@quiet
@kinds
@pytest.mark.soak
def test_many_mutated_files(
    kind: Callable[[Path, Path, int], None],
    finished: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    TRIED.clear()
    kind(tmp_path, finished, SOAK_INPUTS)
    record_property("inputs", sum(TRIED))


def test_memory_that_a_reader_takes_is_seen() -> None:
    def hold(megabytes: int) -> None:
        assert b"\1" * (megabytes << 20)

    hold(2 * MEMORY_MB)  # an earlier peak must not hide what follows
    with pytest.raises(AssertionError):
        searched(st.just(MEMORY_MB + 50), hold, 1)
