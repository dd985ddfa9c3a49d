"""The drop-in in two processes trains as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loop import (
    BATCH,
    config,
    denoise,
    draw,
    make,
    pictures,
    trunk,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vrpo.alignment import Aligner
from vrpo.pixels import to_float

# -- two processes ----------------------------------------------------------------------------------------------------


class Both(nn.Module):
    def __init__(self, model: nn.Module, aligner: Aligner) -> None:
        super().__init__()
        self.model, self.aligner = model, aligner

    def forward(self, images: Tensor, draws: Any) -> Tensor:
        with self.aligner.step(images, draws.uniforms):
            loss = denoise(self.model, to_float(images), draws)
        return loss + self.aligner.loss()


def _train(rank: int, wrap_both: bool) -> dict[str, Tensor]:
    model = trunk()
    torch.manual_seed(rank)
    aligner = make(model, objective=config("vrpo", warmup=0.0), budget=1000)
    both = Both(model, aligner)
    step_module: Any = both
    if dist.is_initialized():
        if wrap_both:
            step_module = DistributedDataParallel(both)
        else:
            both.model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([*model.parameters(), *aligner.parameters()], lr=0.05)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2) if dist.is_initialized() else slice(0, BATCH)
    for step in range(3):
        step_module(pictures(step)[half], draw(step).part(half.start, half.stop)).backward()
        if not wrap_both:
            aligner.average_gradients()
        optimizer.step()
        optimizer.zero_grad()
        aligner.update()
    state = {**model.state_dict(), **{f"aligner.{name}": value for name, value in aligner.state_dict().items()}}
    return {name: value.detach().clone() for name, value in state.items()}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({wrap: _train(rank, wrap) for wrap in (False, True)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    alone = _train(0, False)
    for rank in range(2):
        for state in torch.load(tmp_path / f"{rank}.pt").values():
            for name, value in alone.items():
                assert torch.allclose(state[name].double(), value.double(), rtol=2e-4, atol=1e-5), name
