"""Parquet files as the Hugging Face hub holds them: an image column of {bytes, path} and a label column."""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from vrpo.data.sources import Entry, Source
from vrpo.errors import ConfigError, DataError, nearest
from vrpo.untrusted import parse_json

HUB = "hf:"
_IMAGE_NAMES = ("image", "img", "jpg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
_MOST_CLASSES = 10_000_000
# Rows are read a group at a time, so a group bounds a worker's memory.
_GROUP_BYTES = 2 << 30


def is_parquet_source(path: Path) -> bool:
    """Whether a path is a parquet file or a folder that holds some at its top or under ``data``."""
    return path.suffix == ".parquet" if path.is_file() else path.is_dir() and bool(_files(path))


@dataclass
class ParquetOpener:
    """Reads images of parquet files by file and row, keeping the last group of rows."""

    paths: Sequence[Path]
    column: str

    def __post_init__(self) -> None:
        self._file: tuple[int, Any, list[int]] | None = None
        self._group: tuple[int, int, Any] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "column": self.column, "_file": None, "_group": None}

    def connect(self) -> None:
        """Check that the first file is still there."""
        os.stat(self.paths[0])

    def open(self, entry: Entry) -> BinaryIO:
        """Return one row's encoded image."""
        number, row = cast("tuple[int, int]", entry.location)
        if self._file is None or self._file[0] != number:
            parquet = _pyarrow_parquet()
            file = parquet.ParquetFile(self.paths[number])
            starts = [0]
            for group in range(file.metadata.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            self._file, self._group = (number, file, starts), None
        _, file, starts = self._file
        group = next(index for index, end in enumerate(starts[1:]) if row < end)
        if self._group is None or self._group[:2] != (number, group):
            self._group = (number, group, file.read_row_group(group, columns=[self.column]).column(0))
        value = self._group[2][row - starts[group]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise DataError("the row holds no image bytes (only a path, perhaps)")
        return io.BytesIO(content)


def open_parquet(path: Path) -> Source:
    """List the images of a parquet file, or of all those of one split in a folder.

    Keys are FILE/ROW. Raises DataError where there is no image column, where the files' columns differ, or where a
    folder holds several splits.
    """
    parquet = _pyarrow_parquet()
    paths = [path] if path.is_file() else _files(path)
    splits = {re.sub(r"-\d+-of-\d+.*$|-\d+$", "", file.stem) for file in paths}
    if len(splits) > 1:
        raise DataError(
            f"'{path}' holds several splits ({', '.join(sorted(splits))}): put the files of each into a folder of its "
            "own, and prepare those."
        )
    entries: list[Entry] = []
    names: tuple[str, ...] | None = None
    columns: tuple[str, str | None] | None = None
    for number, file in enumerate(paths):
        try:
            found = parquet.ParquetFile(file)
            schema, metadata = found.schema_arrow, found.metadata
            told = _columns(file, schema)
            if columns is not None and told != columns:
                raise DataError(f"'{file}' has other columns than '{paths[0]}': prepare each kind by itself.")
            columns = told
            names = names or _class_names(schema, told[1])
            labels = None if told[1] is None else found.read(columns=[told[1]]).column(0).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise DataError(f"'{file}' is a damaged or incomplete parquet file: fetch it again.") from error
        checksum, row = _checksum(file), 0
        for group in range(metadata.num_row_groups):
            part = metadata.row_group(group)
            if part.total_byte_size > _GROUP_BYTES:
                raise DataError(f"'{file}' has a group of rows of more than 2 GiB: write it with smaller row groups.")
            size = part.total_byte_size // max(1, part.num_rows)
            for _ in range(part.num_rows):
                label = None if labels is None else labels[row]
                entries.append(Entry(f"{file.name}/{row:08d}", label, size, (number, row), checksum))
                row += 1
    if not entries or columns is None:
        raise DataError(f"'{path}' holds no rows: give parquet files with images.")
    return Source("parquet", path, _checked_names(path, entries, names), entries, 0, ParquetOpener(paths, columns[0]))


def fetch_from_hub(name: str) -> Path:
    """Download the parquet files of a data set of the hub, ``hf:OWNER/NAME`` or ``hf:OWNER/NAME/SPLIT``.

    Raises ConfigError for a name of another form, DataError where it cannot be fetched.
    """
    parts = name.removeprefix(HUB).split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(f"'{name}' names no data set of the hub: write hf:OWNER/NAME or hf:OWNER/NAME/SPLIT.")
    from huggingface_hub import snapshot_download

    split = parts[2] if len(parts) == 3 else "train"
    try:
        folder = snapshot_download("/".join(parts[:2]), repo_type="dataset", allow_patterns=[f"*{split}*.parquet"])
    except Exception as error:  # the hub's client raises errors of many libraries
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"'{name}' cannot be fetched ({said}): check the name and the network.") from error
    files = sorted(Path(folder).rglob(f"*{split}*.parquet"))
    if not files:
        raise DataError(f"'{name}' has no parquet files of a split '{split}': name another split.")
    return files[0].parent


def _files(folder: Path) -> list[Path]:
    top = sorted(folder.glob("*.parquet"), key=lambda file: file.name)
    return top or sorted((folder / "data").glob("*.parquet"), key=lambda file: file.name)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow, which is not installed: pip install 'vrpo[parquet]'.") from error
    return pyarrow.parquet


def _columns(file: Path, schema: Any) -> tuple[str, str | None]:
    import pyarrow as pa

    def holds_images(field: Any) -> bool:
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))

    images = [field.name for field in schema if holds_images(field)]
    image = next((name for name in _IMAGE_NAMES if name in images), images[0] if len(images) == 1 else None)
    if image is None:
        raise DataError(
            f"'{file}' has no image column, which holds encoded images as bytes: its columns are "
            f"{', '.join(schema.names) or 'none'}; {nearest('image', schema.names)}"
        )
    integers = {field.name for field in schema if pa.types.is_integer(field.type)}
    return image, next((name for name in _LABEL_NAMES if name in integers), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Return the names that the hub's metadata gives the classes."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None or label is None:
        return None
    try:
        names = parse_json(text)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _checked_names(path: Path, entries: Sequence[Entry], names: tuple[str, ...] | None) -> tuple[str, ...]:
    if entries[0].label is None and all(entry.label is None for entry in entries):
        return ()
    most = _MOST_CLASSES if names is None else len(names)
    for entry in entries:
        if entry.label is None or not 0 <= entry.label < most:
            raise DataError(f"row '{entry.key}' of '{path}' has the label {entry.label}, which is no class number.")
    return names or tuple(map(str, range(max(cast(int, entry.label) for entry in entries) + 1)))


def _checksum(file: Path) -> int:
    """Hash a file's end, which says where and how large everything in it is."""
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return zlib.crc32(stream.read())
