"""Several processes prepare one data set: they go on where one was interrupted, to the bytes of one alone."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pictures import encode, noise_image
from rich.console import Console

from vrpo.cli import main
from vrpo.data.prepare import prepare
from vrpo.data.progress import Reporting
from vrpo.data.sources import Entry
from vrpo.data.workers import worker_count
from vrpo.processes import World

SCRIPT = """
import sys
from vrpo.data.prepare import prepare
from vrpo.processes import connect

if __name__ == "__main__":
    with connect() as world:
        prepare(sys.argv[1], sys.argv[2], size=8, shard_bytes=5 * 192, workers=1, progress=False, world=world)
"""
# The command, in which process 1 kills itself after its first shard, once.
KILLED = """
import os, pathlib, signal, sys
from vrpo.cli import main
from vrpo.data import prepare

append, mark = prepare.append, pathlib.Path(__file__).with_suffix(".done")

def deadly(folder, rank, request, finished):
    append(folder, rank, request, finished)
    if rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

prepare.append = deadly
main(sys.argv[1:])
"""
# The command, in which the disk of process 1 is full, and process 0 has minutes of work.
FULL = """
import errno, os, sys, time
from vrpo.cli import main
from vrpo.data import prepare

write, decode, rank = prepare.write_shard, prepare.decode_in_order, int(os.environ["RANK"])
prepare._TASK_IMAGES = 1

def refused(*words):
    if rank == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(*words)

def slow(*words):
    for result in decode(*words):
        time.sleep(4 * (rank == 0))
        yield result

prepare.write_shard, prepare.decode_in_order = refused, slow
main(sys.argv[1:])
"""
OPTIONS = ["--size", "128", "--shard-mb", "1", "--workers", "1"]  # 21 images to a shard
SOON = 120


@pytest.fixture
def pictures(write_tree) -> Path:
    """A folder of 63 images, of which three shards are made."""
    return write_tree("pictures", {f"{i:02d}.png": encode(noise_image(i, 12, 10), "PNG") for i in range(63)})


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def both(words: Sequence[str]) -> list[tuple[int, str, str]]:
    """Run Python with ``words`` as two processes, as a launcher would; return code, output and errors of each."""
    team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | team | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=SOON) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_two_processes_go_on_to_the_bytes_of_one(write_tree, image_files, tmp_path: Path) -> None:
    folder, out = write_tree("images", image_files), tmp_path / "out"
    options = {"size": 8, "shard_bytes": 5 * 192, "workers": 1}
    prepare(folder, tmp_path / "alone", progress=False, **options)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(folder, out, progress=interrupt, **options)
    first = (out / "shard-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [str(tmp_path / "script.py"), str(folder), str(out)]
    assert [code for code, *_ in both(words)] == [0, 0]
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert contents(out) == contents(tmp_path / "alone")
    # A finished data set that has lost shards is made whole by both, too.
    for index in (0, 1, 3):
        (out / f"shard-{index:05d}.safetensors").unlink()
    assert [code for code, *_ in both(words)] == [0, 0]
    assert contents(out) == contents(tmp_path / "alone")


def test_the_first_of_two_processes_speaks_for_both(pictures: Path, tmp_path: Path) -> None:
    words = ["-m", "vrpo", "prepare", str(pictures), str(tmp_path / "out"), *OPTIONS]
    (code, said, _), (other_code, other_said, other_errors) = both(words)
    assert (code, other_code) == (0, 0)
    assert said.count("63 images of 128 x 128") == 1
    assert other_said + other_errors == ""
    (_, again, _), (_, other_again, _) = both(words)
    assert "nothing to do" in again
    assert other_again == ""


def test_one_bar_is_drawn_and_says_whose_it_is() -> None:
    for rank, drawn in ((0, True), (1, False)):
        stream = io.StringIO()
        reporting = Reporting(True, Console(file=stream, width=100))
        with reporting.begin("images", 8, 0, World(rank, 2)) as report:
            report(8, 8)
        assert ("preparing images, process 1 of 2" in stream.getvalue()) is drawn


def test_torchrun_restarts_after_a_loss_to_the_bytes_of_one(pictures: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "alone", size=128, shard_bytes=1 << 20, workers=1, progress=False)
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    words = ["prepare", str(pictures), str(tmp_path / "out"), *OPTIONS]
    command = [sys.executable, *torchrun, "--max-restarts", "1", str(tmp_path / "killed.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "killed.done").exists(), "no process was lost"
    assert "shards of an earlier run were kept" in ended.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_lost_process_ends_the_other_with_a_sentence(pictures: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "alone", size=128, shard_bytes=1 << 20, workers=1, progress=False)
    (tmp_path / "killed.py").write_text(KILLED)
    words = [str(tmp_path / "killed.py"), "prepare", str(pictures), str(tmp_path / "out"), *OPTIONS]
    (code, _, errors), (killed, *_) = both(words)
    assert (code, killed) == (2, -signal.SIGKILL)
    (sentence,) = [line for line in errors.splitlines() if line.startswith("vrpo: ")]
    assert sentence.startswith("vrpo: process 0 of 2 lost another one (")
    assert "see why that one ended, then run the same command again; torchrun --max-restarts N" in sentence
    assert [code for code, *_ in both(words)] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["--size", "5000"], "--size 5000 is more than can be prepared"),
        (["--sice", "128"], "--sice"),
        (["--size", "128", "--latents", "{missing}"], "missing"),
        (["--size", "128", "--on-bad-image", "fail"], "'62.png' cannot be used"),
    ],
    ids=["size", "option", "autoencoder", "image"],
)
def test_a_refusal_is_one_sentence(told: list[str], sentence: str, pictures: Path, tmp_path: Path) -> None:
    (pictures / "62.png").write_bytes(b"no picture")
    words = [word.format(missing=tmp_path / "missing") for word in told]
    ended = both(["-m", "vrpo", "prepare", str(pictures), str(tmp_path / "out"), "--shard-mb", "1", *words])
    assert [code for code, *_ in ended] == [2, 2]
    (line,) = [line for *_, errors in ended for line in errors.splitlines() if line.startswith("vrpo: ")]
    assert sentence in line
    assert not any("Traceback" in errors for *_, errors in ended)


def test_the_failure_of_one_ends_the_other_before_its_work_is_done(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL)
    ended = both([str(tmp_path / "full.py"), "prepare", str(pictures), str(tmp_path / "out"), *OPTIONS])
    assert [code for code, *_ in ended] == [2, 2]
    lines = [line for *_, errors in ended for line in errors.splitlines() if line.startswith("vrpo: ")]
    assert len(lines) == 1
    assert "is full: free some space and repeat the command; finished shards are kept" in ended[1][2]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "vrpo: RANK, WORLD_SIZE or LOCAL_RANK is not a number: "),
        ({"LOCAL_WORLD_SIZE": "0"}, "vrpo: WORLD_SIZE or LOCAL_WORLD_SIZE is below 1: "),
        ({"WORLD_SIZE": "0"}, "vrpo: WORLD_SIZE or LOCAL_WORLD_SIZE is below 1: "),
    ],
)
def test_an_environment_of_no_launcher_is_refused(
    environment: dict[str, str],
    sentence: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**launcher, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(["prepare", str(pictures), str(tmp_path / "out"), "--size", "8"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(sentence)
    assert told.count("\n") == 1


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    large = [Entry("a.png", None, 1 << 30, "a.png")]
    assert worker_count(None, large) == 12
    for processes, workers in ((4, 3), (8, 1), (16, 1)):
        assert worker_count(None, large, processes) == workers
    assert worker_count(5, large, 2) == 5
