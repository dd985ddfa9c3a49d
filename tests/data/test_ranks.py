"""Several processes prepare one data set: they go on where one was interrupted, to the bytes of one alone."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vrpo.cli import main
from vrpo.data.prepare import prepare
from vrpo.data.progress import Reporting
from vrpo.data.ranks import Ranks
from vrpo.data.sources import Entry
from vrpo.data.workers import worker_count

SCRIPT = """
import sys
from vrpo.data.prepare import prepare

if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], size=8, shard_bytes=5 * 192, workers=1, progress=False)
"""


def start(script: Path, folder: Path, out: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
    team = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, str(script), str(folder), str(out)], env=os.environ | team)


def run_both(script: Path, folder: Path, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(script, folder, out, rank, port) for rank in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]


def test_two_processes_go_on_to_the_bytes_of_one(write_tree, image_files, tmp_path: Path) -> None:
    folder, out = write_tree("images", image_files), tmp_path / "out"
    options = {"size": 8, "shard_bytes": 5 * 192, "workers": 1}
    prepare(folder, tmp_path / "alone", progress=False, **options)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(folder, out, progress=interrupt, **options)
    first = (out / "shard-00000.safetensors").stat().st_mtime_ns
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_both(script, folder, out)
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == first
    alone = {file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == alone
    for lost in (1, 2, 4):  # of both processes' shares
        (out / f"shard-{lost:05d}.safetensors").unlink()
    run_both(script, folder, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == alone


def test_the_first_of_several_processes_tells_the_result(
    write_tree, image_files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tree("images", image_files)
    for rank, told in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            main(["prepare", str(folder), str(tmp_path / rank), "--size", "8"])
        assert not stop.value.code
        assert ("30 images of 8 x 8" in capsys.readouterr().out) is told


def test_one_bar_is_drawn_and_says_whose_it_is() -> None:
    from rich.console import Console

    for rank, drawn in ((0, True), (1, False)):
        stream = io.StringIO()
        reporting = Reporting(True, Console(file=stream, width=100))
        with reporting.begin("images", 8, 0, Ranks(rank, 2)) as report:
            report(8, 8)
        assert ("preparing images, process 1 of 2" in stream.getvalue()) is drawn


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    large = [Entry("a.png", None, 1 << 30, "a.png")]
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count(None, large) == 12
    for processes, workers in ((4, 3), (8, 1), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert worker_count(None, large) == workers
    assert worker_count(5, large) == 5
