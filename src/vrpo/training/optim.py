"""AdamW with loss scaling, clipping, and a step that is skipped on the device when a gradient is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vrpo.config import TrainConfig


class Optimizer:
    """One optimiser step for all precisions, without a host synchronisation.

    The loss is multiplied by ``scale`` before the backward pass: 1 except in fp16, where it starts at 2^16, is halved
    by a non-finite gradient and doubled after 2,000 good steps (Micikevicius et al. 2018). A step whose gradient is not
    finite leaves weights and moments as they were, in every precision.
    """

    GROWTH_INTERVAL = 2_000

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        # The fused kernel takes `found_inf` on the device: that is what skips a step without asking the host.
        # Kernels over lists take tensors of one kind: shards (of the trunk, which come first) or whole ones.
        kinds = [part for part in split_by_kind(self.parameters) if part]
        self.adamw = torch.optim.AdamW(
            [{"params": part} for part in kinds],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        half = config.precision == "fp16"
        self.scale = torch.full((), 2.0**16 if half else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._scaled = half

    def learning_rate(self, images: int) -> float:
        """Return the learning rate after ``images`` images."""
        warmup = self.config.lr_warmup
        return self.config.lr * (min(1.0, images / warmup) if warmup else 1.0)

    @torch.no_grad()
    def step(self, images: int) -> Tensor:
        """Apply the accumulated gradients, clear them, and return their global norm (unscaled, before clipping)."""
        present = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in present if parameter.grad is not None]
        norm = total_norm(gradients) / self.scale
        bad = (~torch.isfinite(norm)).float()
        factor = 1.0 / self.scale
        if self.config.clip:
            factor = factor * (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for part in split_by_kind(gradients):
            if part:
                torch._foreach_mul_(part, factor)
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(images)
        self.adamw.found_inf = bad  # type: ignore[attr-defined]
        self.adamw.grad_scale = None  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._count(bad)
        return norm

    def _count(self, bad: Tensor) -> None:
        self.skipped += bad
        self.skipped_in_a_row.copy_((self.skipped_in_a_row + 1) * bad)
        if not self._scaled:
            return
        self.good_steps.copy_((self.good_steps + 1) * (1 - bad))
        grow = (self.good_steps >= self.GROWTH_INTERVAL).float()
        self.scale.mul_(1 - 0.5 * bad).mul_(1 + grow)
        self.good_steps.mul_(1 - grow)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the optimiser's state under a flat name."""
        tensors = {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        for index, parameter in enumerate(self.parameters):
            for name, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"{index}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned, whole tensors whatever is sharded here."""
        for name in ("scale", "good_steps", "skipped", "skipped_in_a_row"):
            getattr(self, name).copy_(tensors[name].reshape(()))
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if name:
                states.setdefault(int(index), {})[name] = (
                    value.reshape(()) if name == "step" else shard_like(self.parameters[int(index)], value)
                )
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": states, "param_groups": groups})


T = TypeVar("T", bound=Tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one process's part of a larger one (a DTensor, whose module takes seconds to load)."""
    return hasattr(tensor, "full_tensor")


def split_by_kind(tensors: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the sharded tensors and the others, each in their order."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    return sharded, [tensor for tensor in tensors if not is_sharded(tensor)]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, shards of other processes included."""
    sharded, others = split_by_kind(gradients)
    if not sharded:
        return torch.nn.utils.get_total_norm(others)
    norms = [torch.nn.utils.get_total_norm(sharded).full_tensor()]  # type: ignore[attr-defined]
    if others:
        norms.append(torch.nn.utils.get_total_norm(others))
    return torch.linalg.vector_norm(torch.stack(norms))


def shard_like(parameter: Any, value: Tensor) -> Tensor:
    """Return this process's shard of the whole tensor ``value`` where ``parameter`` is sharded."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor, so none needs to send.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
