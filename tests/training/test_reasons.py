"""What a launcher is told of a process that fails, by the process and at the end of its own summary."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from vrpo.cli import main


def test_a_sentence_is_left_as_torchrun_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        main(["trian"])
    told = capsys.readouterr().err.strip()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert isinstance(failure.message, dict)
    assert told == f"vrpo: {failure.message['message']}"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2


def test_the_summary_of_torchrun_ends_with_the_sentence(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["vrpo", "train", "--out", str(tmp_path / "run"), "--resume"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("vrpo: there is no run at") == 1
    cause = ended.stderr.partition("Root Cause")[2]
    assert "exitcode  : 2" in cause
    assert "there is no run at" in cause
