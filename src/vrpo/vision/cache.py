"""Encoder tokens of a whole data set on disk, for encoders that cost more than reading does."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vrpo.errors import ConfigError, DataError
from vrpo.files import is_unfinished, replacing, write_text
from vrpo.mapped import MappedFile
from vrpo.untrusted import read_json, seal, unseal
from vrpo.vision.backbone import EncoderOutput
from vrpo.vision.encoders import Encoder
from vrpo.vision.rows import ImageRows
from vrpo.wording import sized

FORMAT = 2
PART_BYTES = 256 * 2**20
INDEX = "index.json"


class TokenCache:
    """What an encoder says of every row of a data set (and of its mirror image), in float16.

    ``folder/<hash>/part-00000.npy`` holds (rows, 1 or 2, F): an image's tokens and, where the encoder was loaded for
    them, its keys, values and class token, each flattened, one after the other. ``index.json`` beside it names them
    with their shapes, and holds the fingerprints and the SHA-256 of each finished part. The hash stands for encoder,
    data set, flips and what is stored, so a cache of anything else lies in another folder and is never read.

    Args:
        folder: where caches are kept.
        encoder: the encoder whose tokens they are.
        dataset: the data set they are of.
        flips: whether mirrored images are cached too.

    Attributes: ``bytes`` (size on disk when complete), ``complete``, ``folder``.
    """

    def __init__(self, folder: str | Path, encoder: Encoder, dataset: ImageRows, flips: bool) -> None:
        self.encoder, self.dataset, self.flips = encoder, dataset, flips
        self.rows = len(dataset)
        self.stored = _stored_shapes(encoder)
        self.shape = (2 if flips else 1, sum(int(np.prod(shape)) for shape in self.stored.values()))
        row_bytes = 2 * int(np.prod(self.shape))
        self.part_rows = max(1, PART_BYTES // row_bytes)
        self.parts = -(-self.rows // self.part_rows)
        self.bytes = row_bytes * self.rows
        self.identity = {
            "format": FORMAT,
            "encoder": encoder.fingerprint,
            "dataset": dataset.fingerprint,
            "flips": flips,
            "stored": {name: list(shape) for name, shape in self.stored.items()},
            "part_rows": self.part_rows,
        }
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / digest[:16]
        self._maps: dict[int, tuple[MappedFile, np.ndarray]] = {}
        self._hashes = self._read_index()

    @property
    def complete(self) -> bool:
        """Whether the tokens of every row are there."""
        return len(self._hashes) == self.parts

    def check_room(self, limit: float) -> None:
        """Refuse a cache of more than ``limit`` GiB, or of more than what is free on its disk.

        Raises:
            ConfigError: it is larger than was agreed to.
            DataError: there is too little room for what is still missing.
        """
        size = self.bytes / 2**30
        what = f"The tokens of {self.encoder.name} for {self.rows:,} images take {sized(self.bytes)} in {self.folder}"
        if size > limit:
            raise ConfigError(
                f"{what}: agree to that with --encoder.cache-limit {math.ceil(size)}, or compute them online with "
                "--encoder.cache False."
            )
        missing = self.bytes * (1 - len(self._hashes) / self.parts)
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if missing > free:
            raise DataError(
                f"{what}, and only {sized(free)} are free there: make room, or compute them online with "
                "--encoder.cache False."
            )

    def build(self, *, batch_size: int = 64, progress: Callable[[int, int], None] | None = None) -> TokenCache:
        """Compute what is missing, part by part, and return self; interrupted, it goes on at the next part.

        ``progress`` is called with the rows done and the rows in all.

        Raises:
            DataError: the disk refuses a part; the finished ones are kept.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in filter(is_unfinished, self.folder.iterdir()):
                leftover.unlink()
            for part in range(self.parts):
                if part not in self._hashes:
                    digest = self._write_part(part, batch_size, progress)
                    self._hashes[part] = digest
                    try:
                        self._write_index()
                    except OSError:
                        del self._hashes[part]
                        raise
        except OSError as error:
            raise DataError(
                f"The token cache {self.folder} could not be written ({error.strerror or error}): it needs "
                f"{sized(self.bytes)} in all; make room and run again, finished parts are kept."
            ) from error
        return self

    def read(self, indices: np.ndarray, flipped: np.ndarray | None = None, pinned: bool = False) -> Tensor:
        """Return all that is stored of rows (B,), of the mirror image where ``flipped`` (B,): float16 (B, F).

        ``pinned`` in page-locked memory, from which a GPU copies while it computes; ``split`` tells the parts apart.

        Raises:
            DataError: the cache is not complete, or holds no mirrored images.
        """
        if not self.complete:
            raise DataError(f"The token cache {self.folder} is not complete: build it again, it will resume.")
        indices = np.asarray(indices, dtype=np.int64)
        sides = np.zeros(len(indices), dtype=np.int64) if flipped is None else np.asarray(flipped, dtype=np.int64)
        if not self.flips and sides.any():
            raise DataError(f"The token cache {self.folder} holds no mirrored images: build it with flips.")
        found = torch.empty(len(indices), self.shape[1], dtype=torch.float16, pin_memory=pinned)
        parts, rows = np.divmod(indices, self.part_rows)
        # One copy a row from map to batch: numpy's fancy indexing would make two.
        target = found.numpy()
        tensors: dict[int, np.ndarray] = {}
        for part in np.unique(parts).tolist():
            mapped, tensors[part] = self._map(part)
            mapped.check()
        for place, (part, row, side) in enumerate(zip(parts.tolist(), rows.tolist(), sides.tolist(), strict=True)):
            target[place] = tensors[part][row, side]
        return found

    def split(self, rows: Tensor) -> EncoderOutput:
        """Return the parts, what is stored still float16, of what ``read`` returned, wherever it was moved since."""
        sizes = [int(np.prod(shape)) for shape in self.stored.values()]
        parts = zip(self.stored.items(), rows.split(sizes, dim=1), strict=True)
        return self.encoder.completed(
            EncoderOutput(**{name: part.reshape(-1, *shape) for (name, shape), part in parts})
        )

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare every part with its recorded hash; of ``world_size`` processes, each takes its share.

        Raises:
            DataError: a part differs; it is named.
        """
        for part, expected in list(self._hashes.items())[rank::world_size]:
            path = self._path(part)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise DataError(f"The token cache's part {path} is damaged: delete it and build again.")

    def _write_part(self, part: int, batch_size: int, progress: Callable[[int, int], None] | None) -> str:
        start = part * self.part_rows
        stop = start + self._rows_of(part)
        path = self._path(part)
        device = self.encoder.mean.device
        limit = torch.finfo(torch.float16).max
        # ordinary writes, not a memory map: a full disk is then an error and not a bus fault
        with replacing(path) as unfinished, unfinished.open("wb+") as file:
            layout = {"descr": "<f2", "fortran_order": False, "shape": (stop - start, *self.shape)}
            np.lib.format.write_array_header_1_0(file, layout)
            for row in range(start, stop, batch_size):
                indices = np.arange(row, min(row + batch_size, stop), dtype=np.int64)
                images = self.dataset.read(indices)[0].to(device)
                views = [images, images.flip(-1)] if self.flips else [images]
                found = torch.stack([self._flat(view) for view in views], dim=1)
                file.write(found.clamp(-limit, limit).half().cpu().numpy().tobytes())
                if progress is not None:
                    progress(int(indices[-1]) + 1, self.rows)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _flat(self, images: Tensor) -> Tensor:
        """Return all that is stored of images, (B, F)."""
        found = self.encoder.outputs(images)
        return torch.cat([getattr(found, name).flatten(1) for name in self.stored], dim=1)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npy"

    def _rows_of(self, part: int) -> int:
        return min(self.part_rows, self.rows - part * self.part_rows)

    def _map(self, part: int) -> tuple[MappedFile, np.ndarray]:
        """Return a part's file and its rows, (rows, 1 or 2, F); raises OSError or ValueError where it is not whole."""
        if part not in self._maps:
            shape = (self._rows_of(part), *self.shape)
            path = self._path(part)
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                found = np.lib.format.read_array_header_1_0(file)
                start = file.tell()
            size = start + 2 * math.prod(shape)
            if found != (shape, False, np.dtype("<f2")) or path.stat().st_size != size:
                raise ValueError(f"{path} is not the part that it should be")
            mapped = MappedFile(path, size)
            self._maps[part] = mapped, mapped.bytes[start:].view("<f2").reshape(shape)
        return self._maps[part]

    def _whole(self, part: int) -> bool:
        try:
            self._map(part)
        except (OSError, ValueError, EOFError):
            return False
        return True

    def _read_index(self) -> dict[int, str]:
        """Return the hashes of the finished parts that are whole; the others will be built again."""
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            index = {int(key): str(digest) for key, digest in unseal(read_json(path))["parts"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"The token cache's {path} is damaged ({error}): delete {self.folder}; it is built again."
            ) from error
        return {part: digest for part, digest in index.items() if 0 <= part < self.parts and self._whole(part)}

    def _write_index(self) -> None:
        parts = {str(part): digest for part, digest in sorted(self._hashes.items())}
        write_text(self.folder / INDEX, json.dumps(seal({**self.identity, "parts": parts}), indent=1))


def _stored_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored part of an ``EncoderOutput``; what is made of the tokens is not stored again."""
    tokens = encoder.grid**2
    shapes: dict[str, tuple[int, ...]] = {"tokens": (tokens, encoder.width)}
    if encoder.has_attention:
        shapes |= {"keys": (tokens, encoder.key_width), "values": (tokens, encoder.value_width)}
    if encoder.class_token and encoder.has_class_token:
        shapes["class_token"] = (encoder.width,)
    return shapes
