"""Two commands do not train in one folder at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vrpo.errors import ConfigError
from vrpo.training.lock import FolderLock
from vrpo.training.trainer import Trainer

HOLD = """
import pathlib, sys
from vrpo.training.lock import FolderLock
FolderLock(pathlib.Path(sys.argv[1])).take()
lock = FolderLock(pathlib.Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


def hold(run: Path) -> subprocess.Popen[str]:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_command_is_refused_until_the_first_ends(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"images": 16})
    Trainer(config, tmp_path / "run", say=lambda s: None).train()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = hold(tmp_path / "run")
    try:
        with pytest.raises(ConfigError, match=r"another process is training in .*run: wait until it ends, or choose"):
            Trainer(config, tmp_path / "run", resume=True, say=lambda s: None)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    finally:
        other.kill()
        other.wait()
    assert Trainer(config, tmp_path / "run", resume=True, say=lambda s: None).train().status == "finished"


def test_a_new_run_that_another_process_began_meanwhile_is_refused(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vrpo.training import trainer as trainer_module

    build, others = trainer_module.build_parts, []

    def meanwhile(*arguments: Any) -> Any:
        (tmp_path / "run").mkdir()
        others.append(hold(tmp_path / "run"))
        return build(*arguments)

    monkeypatch.setattr(trainer_module, "build_parts", meanwhile)
    try:
        with pytest.raises(ConfigError, match="another process is training in"):
            Trainer(make_config(), tmp_path / "run", say=lambda s: None)
        assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_system_without_locks_trains_all_the_same(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert Trainer(make_config(train={"images": 8}), tmp_path / "run", say=lambda s: None).train().step == 1


def test_one_process_may_take_it_again(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    second.take()
    first.close()
    first.close()
