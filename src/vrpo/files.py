"""Files that are whole or absent: atomic writes, hashes, and safetensors with one-sentence errors."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrpo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once: a reader sees the old content or the new, never half."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a hidden file that takes the name ``path`` when the block ends, and goes when it fails.

    When the name is there, so is the content, also after a loss of power. An error of the system names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        # A disk that is full says so of a write, which knows of no name.
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether a path is that of a file being written, or left by a process that was killed while it wrote."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a loss of power, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not possible on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems flush files only
            raise
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: dict[str, Tensor], *, seal: bool = False) -> None:
    """Write tensors to a safetensors file, with their hash in it on ``seal``, and wait until it is on disk.

    Raises:
        OSError: no space is left, or it cannot be written there.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_safetensors(path, plain, {"seal": tensors_hash(plain)} if seal else None)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors in main memory to a safetensors file.

    Raises:
        OSError: no space is left, or it cannot be written there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # The library's own error holds that of the system as text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names, types, shapes and values of tensors, such as a module's state."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel() and not value.is_meta:  # a network that is only planned with has no values
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def whole_safetensors(path: Path) -> Iterator[None]:
    """Say of a safetensors file, where reading it in this block fails, that it is damaged.

    Raises:
        CheckpointError: it is.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): use another copy.") from error


def load_tensors(path: Path, *, sealed: bool = False) -> dict[str, Tensor]:
    """Read a safetensors file; with ``sealed``, one whose hash is in it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"there is no weights file at {path}: check the path.")
    with whole_safetensors(path):
        tensors = load_file(path)
        if sealed:
            with safe_open(path, framework="pt") as file:
                seal = (file.metadata() or {}).get("seal")
            if seal != tensors_hash(tensors):
                raise ValueError("its content differs from its seal")
    return tensors


def load_weights(path: Path) -> Any:
    """Read a safetensors file, or any other as one of PyTorch, of which nothing is executed.

    Raises:
        CheckpointError: it is missing or damaged, or holds more than tensors and plain values.
    """
    import argparse
    import pickle

    import torch

    if path.suffix == ".safetensors" or not path.is_file():
        return load_tensors(path)
    # Training scripts save their command line beside the weights; a Namespace is inert.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged or holds Python objects, which are never executed: save its tensors alone, best as "
                "safetensors."
            ) from error
        except Exception as error:  # on damaged bytes it raises any type
            raise CheckpointError(f"{path} is damaged or no PyTorch file: use another copy.") from error


def unwrap(content: Any, wrappers: Iterable[str]) -> Any:
    """Return what ``content``, read from a weights file, holds under each of ``wrappers`` in turn that is there."""
    for name in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    return content


def misfit(module: nn.Module, state: Mapping[str, Any], may_be_extra: Iterable[str] = ()) -> str | None:
    """Return a clause about the first key of ``state`` that does not fit ``module``, or None where all do.

    Counters of batch normalisation (``num_batches_tracked``) may be missing, and keys that begin with one of
    ``may_be_extra`` (a classifier that is not used) may be left over.
    """
    import torch

    expected = module.state_dict()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        found = state.get(name)
        if not isinstance(found, torch.Tensor):
            return f"it has no '{name}'"
        if found.shape != value.shape:
            return f"'{name}' is {tuple(found.shape)} and should be {tuple(value.shape)}"
    allowed = tuple(f"{prefix}." for prefix in may_be_extra)
    extra = (name for name in state if name not in expected and not name.startswith(allowed))
    return next((f"'{name}' has no place in it" for name in extra), None)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load tensors into a module of the same architecture.

    Raises:
        CheckpointError: names or shapes differ; the first difference is named.
    """
    wrong = misfit(module, tensors)
    if wrong is not None:
        raise CheckpointError(
            f"{what} is of another architecture than this configuration's: {wrong}; train with the configuration that "
            "made it."
        )
    module.load_state_dict(tensors)


def explain_os_error(error: Exception) -> str:
    """Return the reason of a failed write in words a user can act on."""
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in str(error):
        return "no space is left on the device"
    return getattr(error, "strerror", None) or str(error)
