"""Reading local weights files, and fitting them to an architecture or saying why they do not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError
from vrpo.files import load_weights

SUFFIXES = {".safetensors", ".pt", ".pth", ".bin"}
WRAPPERS = ("state_dict", "model")


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 over the names, types, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel() and not value.is_meta:  # a network that is only planned with has no values
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text metadata of a safetensors file (empty for none).

    Raises:
        CheckpointError: the file is not safetensors, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): fetch it again.") from error


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors of a ``.safetensors`` file, or of a ``.pt``, ``.pth`` or ``.bin`` file, on the CPU.

    The usual wrappers (``state_dict``, ``model``) and the prefix ``module.`` are taken off.

    Raises:
        CheckpointError: the file is missing, of another kind, or damaged.
    """
    if path.is_file() and path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is not a weights file: give .safetensors, or .pt, .pth or .bin of PyTorch.")
    state = load_weights(path)
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
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


def misfit(module: nn.Module, state: Mapping[str, Any], may_be_extra: Iterable[str] = ()) -> str | None:
    """Return a clause about the first key of ``state`` that does not fit ``module``, or None where all do.

    Counters of batch normalisation (``num_batches_tracked``) may be missing, and keys that begin with one of
    ``may_be_extra`` (a classifier that is not used) may be left over.
    """
    expected = module.state_dict()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        found = state.get(name)
        if not isinstance(found, Tensor):
            return f"it has no '{name}'"
        if found.shape != value.shape:
            return f"'{name}' is {tuple(found.shape)} and should be {tuple(value.shape)}"
    allowed = tuple(f"{prefix}." for prefix in may_be_extra)
    extra = (name for name in state if name not in expected and not name.startswith(allowed))
    return next((f"'{name}' has no place in it" for name in extra), None)
