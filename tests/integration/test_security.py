"""The promises of SECURITY.md."""

from __future__ import annotations

import ast
import base64
import io
import json
import math
import os
import pickle
import re
import shutil
import socket
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_run import tiny_config

from vrpo.cli import main
from vrpo.config_load import to_yaml
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource
from vrpo.data.transforms import decode
from vrpo.display import TrainingDisplay
from vrpo.errors import CheckpointError, DataError, EvaluationError
from vrpo.evaluation.frechet import FeatureStatistics
from vrpo.evaluation.images import open_images
from vrpo.evaluation.npz import read_arrays
from vrpo.evaluation.trunk import DepthTimeTable
from vrpo.models.weights import read_tensors
from vrpo.runs import Run
from vrpo.vision.weight_files import read_weights

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "vrpo").rglob("*.py"))


def calls(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the dotted name and the constant keyword arguments of every call in a module."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            given = {word.arg or "": getattr(word.value, "value", None) for word in node.keywords}
            yield ast.unparse(node.func), given


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    banned = re.compile(
        r"(pickle|dill|joblib|marshal|shelve)\.|(^|\.)(eval|exec|extractall|extract|unsafe_load|full_load)$|^yaml\.load"
        r"|^os\.system$|^subprocess\.|^torch\.hub\.load"
    )
    seen = 0
    for file in SOURCES:
        for name, given in calls(file):
            seen += 1
            if name.endswith("torch.load"):
                assert given["weights_only"] is True, file
            if name in ("np.load", "numpy.load"):
                assert given["allow_pickle"] is False, file
            if "trust_remote_code" in given:
                assert given["trust_remote_code"] is False, file
            assert not banned.search(name) or name.endswith((".eval", "re.compile")), f"{file}: {name}"
    assert seen > 3000


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_in_weights_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    torch.save({"model": Bomb(canary)}, tmp_path / "new.pt")
    torch.save({"model": Bomb(canary)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(canary)))
    for name in ("new.pt", "old.pt", "plain.pt"):
        for read in (read_weights, read_tensors):
            with pytest.raises(CheckpointError):
                read(tmp_path / name)
    assert not canary.exists()


def test_a_pickle_in_an_npz_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    objects = np.array([Bomb(canary)], dtype=object)
    np.savez(tmp_path / "images.npz", arr_0=objects)
    np.savez(tmp_path / "statistics.npz", mu=objects, sigma=objects)
    with pytest.raises(EvaluationError):
        open_images(tmp_path / "images.npz")
    with pytest.raises(EvaluationError):
        FeatureStatistics.load(tmp_path / "statistics.npz")
    assert not canary.exists()


def claimed(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims to be so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_an_image_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    data = claimed(60_000, 60_000)
    started = time.perf_counter()
    with pytest.raises(DataError, match="exceed the limit"):
        decode(data, 16)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(data)
    with pytest.raises(EvaluationError, match="exceed the limit"):
        next(open_images(tmp_path / "images").batches(1))
    assert time.perf_counter() - started < 5


def test_a_format_whose_decoder_runs_a_program_is_not_opened(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "EPS")
    with pytest.raises(DataError, match="no image of a known format"):
        decode(stream.getvalue(), 4)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(stream.getvalue())
    with pytest.raises(EvaluationError, match="no image of a known format"):
        next(open_images(tmp_path / "images").batches(1))


@pytest.mark.parametrize("shape", [(1, 10**5, 10**5, 3), (10**9, 64, 64, 3), (2**62, 2, 2, 3)])
def test_an_npz_bomb_is_refused_by_its_header(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1 << 20))
    with pytest.raises(EvaluationError, match=r"size contradicts its shape|smaller"):
        next(open_images(tmp_path / "bomb.npz").batches(64))


@pytest.mark.parametrize(
    ("sigma", "shape", "honest"),
    [("<f8", (10**6, 10**6), False), ("<f8", (8, 10**6), True), ("<U100", (400, 400), True), ("<U", (), True)],
)
def test_statistics_of_a_large_claim_take_no_memory(
    sigma: str, shape: tuple[int, ...], honest: bool, tmp_path: Path
) -> None:
    """Shape and type are told by the header: what is too large or no number is not unpacked, even if all is there."""
    width = np.dtype("<U16000000" if sigma == "<U" else sigma)
    size = math.prod(shape) * width.itemsize if honest else 8 * 10**6
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, kind, axes, zeros in (("mu", "<f8", (8,), 64), ("sigma", width.str, shape, size)):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": axes})
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(zeros))
    tracemalloc.start()
    try:
        with pytest.raises(EvaluationError):
            FeatureStatistics.load(tmp_path / "bomb.npz")
        with pytest.raises(EvaluationError):
            read_arrays(tmp_path / "bomb.npz", {"sigma": ()})
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_zip_member_cannot_name_a_place_outside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("../../escape.png", claimed(1, 1))
    with pytest.raises(DataError, match=r"name with '\.\.'"):
        open_images(tmp_path / "images.zip")


def test_a_report_shows_no_file_from_outside_the_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"the owner's own file")
    grid = next((tmp_path / "run" / "samples").glob("*.png"))
    grid.unlink()
    grid.symlink_to(secret)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "samples", "step": 99, "images": 99, "file": "../secret.png", "rows": 1, "columns": 1}\n')
    assert not [shown for shown in Run(tmp_path / "run").sample_grids if shown.file.resolve() == secret]
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")])
    assert base64.b64encode(secret.read_bytes()).decode() not in (tmp_path / "report.html").read_text()


def test_no_command_opens_a_connection_of_itself(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    reference = shutil.copytree(finished / "data", tmp_path / "data")  # its features are kept beside it
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(reference)))
    run = str(tmp_path / "run")
    judge = ["--features", "resnet10t", "--features-weights", "random", "--metrics", "fd", "--samples", "8"]
    for words in (
        ["train", "--config", str(tmp_path / "config.yaml"), "--out", run],
        ["sample", run, "--out", str(tmp_path / "s.npz"), "--count", "4", "--device", "cpu"],
        ["evaluate", run, "--reference", str(reference), *judge, "--device", "cpu"],
        ["compare", run, "--out", str(tmp_path / "report.html")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert not stop.value.code, words
    assert asked == []


def test_a_terminal_is_not_driven_by_the_names_in_data(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = "evil\x1b[2J\x9b1m\ud800"
    shutil.copytree(finished / "run", tmp_path / "run")
    reference = str(shutil.copytree(finished / "data", tmp_path / "reference"))
    facts = {"name": clear, "objective": clear, "status": clear, "data": {"fingerprint": clear, "classes": [clear]}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    for index in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    record = {"sampler": clear, "steps": 2, "decoder": clear, "label_policy": clear}
    (tmp_path / "images" / "sampling.json").write_text(json.dumps(record))
    pictures = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    named = ArraySource(pictures, [0, 1, 0, 1], ("cat\x1b[2J", "dog"), "evil\x1b[2J")
    prepare(named, tmp_path / "data", size=8, workers=1, progress=False)
    judge = ["--features", "resnet10t", "--features-weights", "random", "--metrics", "fd", "--device", "cpu"]
    images = str(tmp_path / "images")
    monkeypatch.setenv("COLUMNS", "200")
    for words, said in (
        (["data", "info", str(tmp_path / "no\x1b[2Jsuch")], "no\\x1b[2Jsuch"),
        (["data", "info", str(tmp_path / "data")], "cat\\x1b[2J"),
        (["compare", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")], "evil\\x1b[2J"),
        (["evaluate", images, "--reference", reference, *judge], "evil\\x1b[2J"),
        (["evaluate", images, images, "--reference", reference, *judge], "evil\\x1b[2J"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        printed = "".join(capsys.readouterr())
        assert said in printed, words
        assert not re.search("[\x1b\x9b\ud800]", printed), words


def test_tables_and_progress_print_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table = DepthTimeTable("CKNNA", (1,), (0.5,), [[0.1]], {"encoder": "evil\x1b[2J"})
    Console(width=200).print(table.table())
    with TrainingDisplay(label="evil\x1b[2J") as display:
        display.say("evil\x1b[2J")
        display.progress("evil\x1b[2J", 2, 2)
    printed = capsys.readouterr()
    assert printed.out.count("evil\\x1b[2J") == 1
    assert printed.err.count("evil\\x1b[2J") == 2
    assert "\x1b" not in printed.out + printed.err


def test_the_promises_name_their_tests() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) >= 15
    defined = {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert named <= defined, named - defined
