"""How the processes of a run share its weights, and how their gradients meet: once a step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo.config import TrainConfig
from vrpo.errors import ConfigError
from vrpo.models.transformer import DiffusionTransformer
from vrpo.processes import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel


class Parallel:
    """The trunk under DistributedDataParallel or FSDP2, the objective's own parameters averaged beside it.

    ``trunk`` is what a step calls. Sharded, every block is a unit of its own, and the averaged copy of the trunk is
    sharded alike. The objective stays outside because which of its parameters a step uses changes in the course of a
    run (HASTE ends, a reward's weight reaches zero), which DistributedDataParallel would have to look for in every
    step's graph. It is small, and its gradients meet in one message after the backward pass.
    """

    def __init__(
        self,
        trunk: DiffusionTransformer,
        averaged: DiffusionTransformer,
        objective: nn.Module,
        train: TrainConfig,
        world: World,
        device: torch.device,
    ) -> None:
        """Wrap or shard ``trunk`` and ``averaged`` in place; a process on its own leaves them alone.

        Raises:
            ConfigError: the processes do not divide into groups of ``train.shard_size``.
        """
        self.world = world
        self.trunk: nn.Module = trunk
        self._objective = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self._ddp: DistributedDataParallel | None = None
        self._sharded: FSDPModule | None = None
        if not world.connected:
            return
        if train.parallel == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            self._ddp = DistributedDataParallel(
                trunk,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
            _arrange_buckets(self._ddp, trunk, device)
            self.trunk = self._ddp
        else:
            mesh = _mesh(train, world, device)
            _shard(averaged, mesh)
            self._sharded = _shard(trunk, mesh)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self._sharded is not None

    def backward(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one forward and backward pass; gradients meet in the ``last`` of a step."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last)
        if self._ddp is None or last:
            return nullcontext()
        return self._ddp.no_sync()

    @torch.no_grad()
    def finish(self) -> None:
        """Average what the wrapper does not, after the last backward pass of a step."""
        if self.world.size > 1:
            average(parameter.grad for parameter in self._objective)


def average(gradients: Iterable[Tensor | None]) -> None:
    """Replace gradients by their means over processes, in one message; all processes lack the same ones."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return
    flat = torch.cat([gradient.flatten() for gradient in present])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in present])
    torch._foreach_copy_(present, [part.view_as(gradient) for part, gradient in zip(parts, present, strict=True)])


def _arrange_buckets(ddp: DistributedDataParallel, trunk: DiffusionTransformer, device: torch.device) -> None:
    """Let DistributedDataParallel see the order in which gradients come.

    It rearranges its buckets once, after the first backward pass, and the order in which processes are summed depends
    on a gradient's place in its bucket. With a pass of no consequence before the first step, a resumed run sums as an
    uninterrupted one does, to the bit.
    """
    shape = (1, trunk.in_channels, trunk.input_size, trunk.input_size)
    image, time = torch.zeros(shape, device=device), torch.zeros(1, device=device)
    if trunk.token_width:
        outputs = ddp(image, time, token=torch.zeros(1, trunk.token_width, device=device))
        sum(output.sum() for output in outputs).backward()
    else:
        ddp(image, time).sum().backward()
    ddp.zero_grad(set_to_none=True)


def _mesh(train: TrainConfig, world: World, device: torch.device) -> DeviceMesh:
    """Return all processes in a row, or for ``hybrid`` one row for each copy of the weights."""
    from torch.distributed.device_mesh import init_device_mesh

    if train.parallel == "fsdp":
        return init_device_mesh(device.type, (world.size,))
    size = train.shard_size or world.local_size
    if world.size % size:
        nearest = max(n for n in range(1, size + 1) if world.size % n == 0)
        raise ConfigError(
            f"train.shard_size {size} does not divide the {world.size} processes into equal groups: use {nearest}."
        )
    return init_device_mesh(device.type, (world.size // size, size), mesh_dim_names=("copies", "shards"))


def _shard(network: DiffusionTransformer, mesh: DeviceMesh) -> FSDPModule:
    from torch.distributed.fsdp import fully_shard

    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    # By default the outermost unit keeps its weights whole after a pass without gradients, which validation makes.
    return fully_shard(network, mesh=mesh, reshard_after_forward=True)
