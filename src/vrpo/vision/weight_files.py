"""Reading local weights files, and fitting them to an architecture or saying why they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vrpo.errors import CheckpointError
from vrpo.files import load_weights, misfit, unwrap, whole_safetensors

SUFFIXES = {".safetensors", ".pt", ".pth", ".bin"}
WRAPPERS = ("state_dict", "model")


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text metadata of a safetensors file (empty for none).

    Raises:
        CheckpointError: the file is not safetensors, or damaged.
    """
    from safetensors import safe_open

    with whole_safetensors(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors of a ``.safetensors`` file, or of a ``.pt``, ``.pth`` or ``.bin`` file, on the CPU.

    The usual wrappers (``state_dict``, ``model``) and the prefix ``module.`` are taken off.

    Raises:
        CheckpointError: the file is missing, of another kind, or damaged.
    """
    if path.is_file() and path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is not a weights file: give .safetensors, or .pt, .pth or .bin of PyTorch.")
    state = unwrap(load_weights(path), WRAPPERS)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no table of named tensors: save its state_dict as safetensors.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def fit_weights(
    module: nn.Module,
    state: Mapping[str, Any],
    *,
    architecture: str,
    source: Path,
    may_be_extra: Iterable[str] = (),
    remedy: Callable[[], str] = lambda: "give the architecture that the file was saved from.",
) -> None:
    """Copy ``state`` into ``module``, key by key.

    ``may_be_extra`` is as in ``misfit``; ``remedy`` says, when asked, what to do with a file that does not fit.

    Raises:
        CheckpointError: a key is missing, left over, or of another shape; the first such key is named.
    """
    wrong = misfit(module, state, may_be_extra)
    if wrong is not None:
        raise CheckpointError(f"{source} does not hold the weights of '{architecture}': {wrong}; {remedy()}")
    module.load_state_dict({name: state[name] for name in module.state_dict() if name in state}, strict=False)
