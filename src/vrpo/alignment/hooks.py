"""Forward hooks that pass the tokens of a block, in whatever it returns, through a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vrpo.errors import ConfigError, nearest
from vrpo.models.taps import TokenTap

Select = slice | Sequence[int] | Tensor


def find_block(model: nn.Module, name: str) -> nn.Module:
    """Return the module that ``model.named_modules()`` calls ``name``.

    Raises:
        ConfigError: there is none.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        blocks = [other for other in modules if other.rpartition(".")[2].isdigit()]
        raise ConfigError(f"the model has no block '{name}': {nearest(name, blocks or list(modules)[1:])}")
    return modules[name]


class BlockHook:
    """A forward hook that replaces a block's tokens by ``tap()`` of them, where that is not None.

    A copy of the model, such as its moving average, gets a hook that does nothing.

    Args:
        name: the block's, for messages.
        tap: gives the function for this call.
        hidden_size: channels D of the tokens.
        tokens: N, how many the function is given.
        select: which of the block's tokens they are, and in which order; None: all.
        output: the place of the tokens in a block's output that is a tuple or list.
    """

    def __init__(
        self,
        name: str,
        tap: Callable[[], TokenTap | None],
        *,
        hidden_size: int,
        tokens: int,
        select: Select | None,
        output: int,
    ) -> None:
        self.name, self.tap = name, tap
        self.hidden_size, self.tokens, self.select, self.output = hidden_size, tokens, select, output

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()

    # Objectives keep state from call to call, which is nothing for a compiler to trace.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Return the output with its tokens replaced, or None to leave it as it is."""
        tap = self.tap()
        if tap is None:
            return None
        found = self._find(output)
        # Under activation checkpointing this runs inside what is recomputed. What the function saves is kept
        # instead, so that it runs once and the recomputation can pass it by.
        with saved_tensors_hooks(_same, _same):
            replaced = self._replace(found, tap)
        if replaced is found:
            return None
        if isinstance(output, Tensor):
            return replaced
        return type(output)([*output[: self.output], replaced, *output[self.output + 1 :]])

    def _replace(self, found: Tensor, tap: TokenTap) -> Tensor:
        if self.select is None:
            self._check_count(found.shape[1])
            return tap(found)
        index = torch.arange(found.shape[1], device=found.device)[_index(self.select, found.device)]
        self._check_count(len(index))
        tokens = found.index_select(1, index)
        tapped = tap(tokens)
        return found if tapped is tokens else found.index_copy(1, index, tapped)

    def _find(self, output: Any) -> Tensor:
        """Return the tensor of tokens in a block's output."""
        found, kind = output, type(output)
        if kind in (tuple, list):
            found = output[self.output] if self.output < len(output) else None
        if not isinstance(found, Tensor):
            what = f"{kind.__name__} of {len(output)}" if kind in (tuple, list) else kind.__name__
            raise ConfigError(
                f"the block '{self.name}' returns a {what} without tokens at {self.output}: name a block that returns "
                "a tensor or a tuple, and with output the place of the tokens in it."
            )
        if found.ndim != 3 or found.shape[-1] != self.hidden_size:
            raise ConfigError(
                f"the block '{self.name}' returns a tensor of shape {tuple(found.shape)}, not tokens (B, N, "
                f"{self.hidden_size}): name another block, or set hidden_size to its last dimension."
            )
        return found

    def _check_count(self, count: int) -> None:
        if count != self.tokens:
            raise ConfigError(
                f"the block '{self.name}' gives {count} tokens an image, where tokens is {self.tokens}: correct it, or "
                "say with select which of them lie on the encoders' grid."
            )


class _NoHook:
    """What becomes of a ``BlockHook`` in a copy."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        return None


def _index(select: Select, device: torch.device) -> slice | Tensor:
    return select if isinstance(select, slice) else torch.as_tensor(select, dtype=torch.long, device=device)


def _same(tensor: Tensor) -> Tensor:
    return tensor
