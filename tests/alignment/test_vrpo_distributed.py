"""Two processes train as one does: the trunk under DistributedDataParallel or FSDP2, the objective's gradients averaged
beside it, as the trainer has them; and FSDP2 with the projector sharded too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import BATCH, Data, accumulate, objective, trunk

from vrpo.training.optim import is_sharded
from vrpo.training.parallel import average

STEPS = 3
HALF = BATCH // 2


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _run(net: nn.Module, align: Any, forward: Any, rank: int | None, beside: list[nn.Parameter]) -> dict[str, Tensor]:
    trained = [*net.parameters(), *align.parameters()]
    optimiser = torch.optim.SGD(trained, 0.05)
    part, total = (slice(None), BATCH) if rank is None else (slice(rank * HALF, (rank + 1) * HALF), HALF)
    for step in range(STEPS):
        optimiser.zero_grad()
        accumulate(forward, align, Data(step), part=part, total=total, seen=20 * step)
        if rank is not None:
            average(parameter.grad for parameter in beside)
        optimiser.step()
        align.update()
    state = {**net.state_dict(), **{f"align.{k}": v for k, v in align.state_dict().items()}}
    logs = {f"log.{k}": v for k, v in align.logs().items() if not k.startswith("alignment")}
    return {name: _whole(value).detach().clone() for name, value in (state | logs).items()}


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}

    net, align = trunk(), objective()
    found["ddp"] = _run(net, align, DistributedDataParallel(net), rank, list(align.parameters()))

    for name in ("fsdp", "fsdp-projector"):
        net, align = trunk(), objective()
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        if name == "fsdp-projector":
            fully_shard(align.projectors[0], mesh=mesh)
        beside = [p for p in align.parameters() if not is_sharded(p)]
        found[name] = _run(net, align, net, rank, beside)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp-projector"])
def test_two_processes_equal_one(way: str, two_processes: list[dict[str, dict[str, Tensor]]]) -> None:
    net, align = trunk(), objective()
    expected = _run(net, align, net, None, [])
    before = trunk().state_dict()
    assert any((expected[name] - before[name]).abs().max() > 1e-3 for name in before)
    for found in two_processes:
        for name, value in expected.items():
            torch.testing.assert_close(found[way][name], value, rtol=2e-3, atol=1e-5, equal_nan=True, msg=name)
