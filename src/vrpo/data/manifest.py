"""What a prepared data set says of itself: ``manifest.json``, its parts, and the fingerprint over them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrpo.errors import DataError
from vrpo.untrusted import read_json, seal, unseal

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """A part of a manifest or journal: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(Record):
    """Where the images came from: the name and kind of the source, and a hash of its list of images."""

    name: str
    kind: str
    listing: Digest


class Preprocessing(Record):
    """What was done to every image, and whether readers mirror at random."""

    size: Positive
    crop: Literal["centre"] = "centre"
    resample: Literal["box, then bicubic"] = "box, then bicubic"
    flip: Literal["none", "random"] = "none"
    max_pixels: Positive


class LatentRecord(Record):
    """The latents of a data set, (channels, size, size) for each image, and the autoencoder that made them.

    ``autoencoder`` is the name or path it was loaded by, None where the source does not say, and ``weights`` its
    fingerprint, None where it did not make these latents here and was not compared with them. With ``posterior`` a row
    holds the mean and, in as many channels again, the standard deviation; otherwise one value. ``precision`` is that of
    the network, or the source's own where it brought the latents. ``normalisation`` says where the shift and scale of
    the diffusion come from.
    """

    autoencoder: str | None
    weights: Digest | None
    channels: Positive
    size: Positive
    posterior: bool
    precision: Literal["fp32", "bf16", "fp16", "source"]
    normalisation: Literal["autoencoder", "channels"]
    pixels: bool

    @property
    def stored_channels(self) -> int:
        """Channels of a stored row."""
        return self.channels * (2 if self.posterior else 1)

    def is_like(self, other: LatentRecord) -> bool:
        """Whether both are of one shape, and of one autoencoder as far as both say."""
        if (self.channels, self.size, self.posterior) != (other.channels, other.size, other.posterior):
            return False
        return None in (self.weights, other.weights) or self.weights == other.weights


class Normaliser(Record):
    """The diffusion's latents are (latents - shift) * scale, channel by channel."""

    shift: tuple[Finite, ...]
    scale: tuple[Finite, ...]


class Counts(Record):
    """Images stored, images that could not be read, other files, and images smaller than the target size."""

    images: Positive
    bad: Count
    ignored: Count
    upscaled: Count


class ShardRecord(Record):
    """One shard: its file name, rows, size in bytes and SHA-256."""

    file: Annotated[str, Field(pattern=r"^shard-\d{5,}\.safetensors$")]
    rows: Positive
    bytes: Positive
    sha256: Digest

    @property
    def index(self) -> int:
        """Its number, which says which entries of the source it was made of."""
        return int(self.file.removeprefix("shard-").removesuffix(".safetensors"))


class BadImage(Record):
    """An image that was left out, and why."""

    key: str
    reason: str


class Manifest(Record):
    """The contents of ``manifest.json``; ``upscaled`` names at most the first thousand such images.

    A data set of pixels alone is written in format 1, which has neither ``latents`` nor ``normaliser``.
    """

    version: int
    source: SourceRecord
    counts: Counts
    class_names: tuple[str, ...]
    class_counts: tuple[Count, ...]
    preprocessing: Preprocessing
    latents: LatentRecord | None = None
    normaliser: Normaliser | None = None
    rows_per_shard: Positive
    shards: tuple[ShardRecord, ...]
    bad: tuple[BadImage, ...]
    upscaled: tuple[str, ...]
    fingerprint: Digest

    def to_json(self) -> str:
        """Return the text of ``manifest.json``, the same for the same data set."""
        content = self.model_dump(mode="json")
        if self.latents is None:
            del content["latents"], content["normaliser"]
        return json.dumps(seal(content), indent=1) + "\n"

    @property
    def holds_pixels(self) -> bool:
        """Whether the images themselves are stored."""
        return self.latents is None or self.latents.pixels


def format_version(latents: LatentRecord | None) -> int:
    """Return the oldest format that can hold a data set with or without latents."""
    return 1 if latents is None else 2


def fingerprint(
    preprocessing: Preprocessing,
    shards: Sequence[ShardRecord],
    latents: LatentRecord | None = None,
    normaliser: Normaliser | None = None,
) -> str:
    """Hash what shapes the data: preprocessing, autoencoder, and the shards' hashes over rows, labels and keys."""
    parts: list[Any] = [
        format_version(latents),
        preprocessing.model_dump(),
        [(shard.rows, shard.sha256) for shard in shards],
    ]
    if latents is not None:
        # Where the autoencoder lies is no property of the data.
        parts.append(latents.model_dump(exclude={"autoencoder"}))
        parts.append(None if normaliser is None else normaliser.model_dump())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the prepared data set in folder ``path``.

    Raises DataError where there is none, where a newer version wrote it, or where it is damaged.
    """
    file = Path(path) / MANIFEST
    try:
        content = read_json(file)
        version = int(content["version"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"'{path}' holds no prepared data set (no {MANIFEST}): make one with 'vrpo prepare SOURCE {path} --size N'."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _damaged_manifest(file, str(error)) from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"'{path}' was prepared in format {version}, and this vrpo reads formats up to {FORMAT_VERSION}: "
            "update vrpo or prepare the source again."
        )
    try:
        manifest = Manifest.model_validate(_unsealed(content, file))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged_manifest(file, f"{place}: {first['msg']}") from error
    told = fingerprint(manifest.preprocessing, manifest.shards, manifest.latents, manifest.normaliser)
    if manifest.fingerprint != told or manifest.counts.images != sum(shard.rows for shard in manifest.shards):
        raise _damaged_manifest(file, "its entries contradict its fingerprint")
    return manifest


def _unsealed(content: dict[str, Any], file: Path) -> dict[str, Any]:
    try:
        return unseal(content, required=False)
    except ValueError as error:
        raise _damaged_manifest(file, str(error)) from error


def _damaged_manifest(file: Path, reason: str) -> DataError:
    return DataError(f"'{file}' is damaged ({reason}): delete its folder and prepare the source again.")
