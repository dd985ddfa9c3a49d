"""Several processes prepare one data set: they go on where one was interrupted, to the bytes of one alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vrpo.data.prepare import prepare
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(script, folder, out, rank, port) for rank in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == first
    alone = {file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == alone


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    large = [Entry("a.png", None, 1 << 30, "a.png")]
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count(None, large) == 12
    for processes, workers in ((4, 3), (8, 1), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert worker_count(None, large) == workers
    assert worker_count(5, large) == 5
