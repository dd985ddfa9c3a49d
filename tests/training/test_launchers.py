"""Real launchers and real processes: one that is lost, and the restart that goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vrpo.checkpoints import find_checkpoints
from vrpo.config_load import to_yaml
from vrpo.runs import Run

# Process 1 sends itself a signal in the middle of its tenth step, once.
FATE = """
import os, pathlib, signal
from datetime import timedelta
from vrpo.training import stop
from vrpo.training.trainer import Trainer

step, mark = Trainer._train_step, pathlib.Path(__file__).with_suffix(".done")

def deadly(self, batch):
    if self.step == 9 and not mark.exists():
        stop.SIGNAL_TIMEOUT = timedelta(seconds=1)
        if self.world.rank == 1:
            mark.touch()
            os.kill(os.getpid(), signal.{signal})
    step(self, batch)

Trainer._train_step = deadly
"""
# The command, but the gradients are waited for half a minute.
IMPATIENT = """
from datetime import timedelta
from vrpo import cli, processes

processes.STEP_TIMEOUT = timedelta(seconds=30)
cli.main()
"""
SOON = 200


@pytest.fixture(params=["SIGKILL"])
def words(make_config: Any, tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    """Return a training command with a process that is lost, by a signal."""
    config = make_config(align={"objective": "vrpo"}, train={"checkpoint_every": 24, "keep_checkpoints": 9})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "fate.py").write_text(FATE.format(signal=request.param))
    return ["train", "--config", str(tmp_path / "config.yaml"), "--plugin", str(tmp_path / "fate.py")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "how"),
    [("SIGKILL", "lost another one ("), ("SIGSTOP", "has waited in vain for another one, which hangs (")],
    indirect=["words"],
    ids=["killed", "hangs"],
)
def test_a_lost_process_ends_the_others_with_a_sentence(words: list[str], how: str, tmp_path: Path) -> None:
    # Without a launcher, which would end the others itself.
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, *words, "--out", str(tmp_path / "run")],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, told = processes[0].communicate(timeout=SOON)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 2
    (sentence,) = [line for line in told.splitlines() if line.startswith("vrpo: ")]
    assert sentence.startswith(f"vrpo: process 0 of 2 {how}")
    assert "--resume" in sentence
    assert "Traceback" not in told
    assert find_checkpoints(tmp_path / "run")[0].name == "step-00000009"


def launch(launcher: list[str], words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "-m", "vrpo", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SOON, check=False)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_torchrun_restarts_after_a_loss_to_the_same_weights(parallel: str, words: list[str], tmp_path: Path) -> None:
    words = [*words, "--train.parallel", parallel]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    lost = launch([*torchrun, "--max-restarts", "1"], [*words, "--out", str(tmp_path / "lost"), "--resume"])
    assert lost.returncode == 0, lost.stderr
    assert (tmp_path / "fate.done").exists(), "no process was lost"
    assert "Resumed" in lost.stderr + lost.stdout
    whole = launch(torchrun, [*words, "--out", str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr
    for part in ("model", "ema", "objective", "optimizer"):
        ours, theirs = (
            load_file(find_checkpoints(tmp_path / run)[0] / f"{part}.safetensors") for run in ("lost", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# What the cluster's commands do, for one node that is this machine.
CLUSTER = {
    "scontrol": """
case "$1" in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" > "$CLUSTER/requeued" ;;
esac
""",
    "srun": """
echo $$ > "$CLUSTER/step"
shift
exec "$@"
""",
    "scancel": """
[ "$2" = 7.0 ] && kill "-${1#--signal=}" "$(cat "$CLUSTER/step")"
""",
    "torchrun": """
exec "$PYTHON" -m torch.distributed.run "$@"
""",
}


def test_the_script_for_slurm_stops_and_is_queued_again(make_config: Any, tmp_path: Path) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, lines in CLUSTER.items():
        (commands / name).write_text(f"#!/bin/sh{lines}")
        (commands / name).chmod(0o755)
    train = {"images": 480, "checkpoint_every": 10_000, "parallel": "ddp"}
    (tmp_path / "config.yaml").write_text(to_yaml(make_config(align={"objective": "repa"}, train=train)))
    # The step at which the cluster wants its nodes back waits for that.
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "from vrpo.training.trainer import Trainer\n"
        "step, reached = Trainer._train_step, pathlib.Path(__file__).with_name('reached')\n"
        "def waiting(self, batch):\n"
        "    step(self, batch)\n"
        "    if self.step == 20 and not reached.exists():\n"
        "        self.world.gather(None)\n"
        "        reached.touch()\n"
        "        time.sleep(3)\n"
        "Trainer._train_step = waiting\n"
    )
    script = str(Path(__file__).parents[2] / "examples/slurm.sh")
    words = ["--config", str(tmp_path / "config.yaml"), "--plugin", str(tmp_path / "slow.py")]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    here = {"CLUSTER": str(tmp_path), "PYTHON": sys.executable, "PATH": f"{commands}:{os.environ['PATH']}"}

    def submit() -> subprocess.Popen[str]:
        settings = environment(**job, **here, MASTER_PORT=str(free_port()))
        out = ["--out", str(tmp_path / "run")]
        return subprocess.Popen(["bash", script, *words, *out], env=settings, stderr=subprocess.PIPE, text=True)

    first = submit()
    deadline = time.monotonic() + SOON
    while not (tmp_path / "reached").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, told = first.communicate(timeout=SOON)
    assert first.returncode == 0, told
    assert (tmp_path / "requeued").read_text() == "7\n"
    (stopped,) = find_checkpoints(tmp_path / "run")
    assert 20 <= int(stopped.name.removeprefix("step-")) < 30, told
    again = submit()
    _, told = again.communicate(timeout=SOON)
    assert again.returncode == 0, told
    assert "Resumed" in told
    assert find_checkpoints(tmp_path / "run")[0].name == "step-00000060"


@pytest.mark.soak
def test_compiled_blocks_are_sharded_to_the_same_losses(make_config: Any, tmp_path: Path) -> None:
    config = make_config(align={"objective": "vrpo"}, train={"images": 64, "log_every": 8})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    words = ["train", "--config", str(tmp_path / "config.yaml"), "--train.parallel", "fsdp"]
    losses = {}
    for compiled in ("False", "True"):
        torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        out = tmp_path / compiled
        ended = launch(torchrun, [*words, "--train.compile", compiled, "--out", str(out)])
        assert ended.returncode == 0, ended.stderr
        losses[compiled] = [record["loss"] for record in Run(out).metrics("train")]
    assert len(losses["True"]) == 8
    assert losses["True"] == pytest.approx(losses["False"], rel=1e-4)
