"""Parquet files as the Hugging Face hub holds them: an image column of {bytes, path} and a label column."""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from vrpo.data.parts import part_of, refuse_missing
from vrpo.data.sources import Entry, Source, printable_name
from vrpo.errors import ConfigError, DataError, nearest
from vrpo.untrusted import parse_json
from vrpo.vision.hub import asking_hub, why_not

HUB = "hf:"
_IMAGE_NAMES = ("image", "img", "jpg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
_MOST_CLASSES = 10_000_000
# Reading a page takes several times its size, and the largest page is a whole group.
_GROUP_BYTES = 2 << 30
# Encoded images hardly become smaller: a file that would grow more than this is made to fill memory.
_GROWTH, _SMALL_FILE = 100, 64 << 20
# Even where images repeat each other, no row takes less of a file.
_ROW_BYTES = 16


def is_parquet_source(path: Path) -> bool:
    """Whether a path is a parquet file or a folder that holds some at its top or under ``data``."""
    return path.suffix == ".parquet" if path.is_file() else path.is_dir() and bool(_files(path))


class _GroupReader:
    """Reads the values of a column of one group of rows in their order, one at a time.

    Many rows may share one value in the file, so what a group expands to has no bound; what a row does has. Where the
    file is damaged the rest of the group is lost.
    """

    def __init__(self, file: Any, group: int, start: int, column: str) -> None:
        self.group, self.next = group, start
        self._batches: Iterator[Any] = file.iter_batches(
            batch_size=1, row_groups=[group], columns=[column], use_threads=False
        )
        self._damage: str | None = None

    def value(self, row: int) -> Any:
        """Return the value of ``row``, which is not before ``next``; raises DataError where it cannot be read."""
        if self._damage is not None:
            raise DataError(self._damage)
        try:
            for _ in range(row - self.next):
                next(self._batches)
                self.next += 1
            batch = next(self._batches)
        except StopIteration:
            self._damage = "the file holds fewer rows than it says"
            raise DataError(self._damage) from None
        except _damages() as error:
            self._damage = f"it cannot be read ({error})"
            raise DataError(self._damage) from error
        self.next += 1
        return batch.column(0)[0].as_py()


@dataclass
class ParquetOpener:
    """Reads images of parquet files by file and row."""

    paths: Sequence[Path]
    column: str

    def __post_init__(self) -> None:
        self._file: tuple[int, Any, list[int]] | None = None
        self._reader: _GroupReader | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "column": self.column, "_file": None, "_reader": None}

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
            self._file, self._reader = (number, file, starts), None
        _, file, starts = self._file
        group = next(index for index, end in enumerate(starts[1:]) if row < end)
        if self._reader is None or self._reader.group != group or self._reader.next > row:
            self._reader = _GroupReader(file, group, starts[group], self.column)
        value = self._reader.value(row)
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise DataError("the row holds no image bytes (only a path, perhaps)")
        return io.BytesIO(content)


def open_parquet(path: Path) -> Source:
    """List the images of a parquet file, or of all those of one split in a folder.

    Keys are FILE/ROW. Raises DataError where there is no image column, where the files' columns differ, or where a
    folder holds several splits.
    """
    if path.is_file():
        return _open_files(path, [path])
    paths = _files(path)
    splits = {_split_of(file) for file in paths}
    if len(splits) > 1:
        raise DataError(
            f"'{path}' holds several splits ({', '.join(sorted(splits))}): put the files of each into a folder of its "
            "own, and prepare those."
        )
    refuse_missing(path, map(part_of, paths))
    return _open_files(path, paths)


class _Columns(NamedTuple):
    """The columns of images and of labels, if there are any, and whether labels are names of classes."""

    image: str
    label: str | None
    named: bool


@dataclass
class _Table:
    """What is known of a file: the rows and bytes of each group, and the label of each row."""

    counts: list[int]
    sizes: list[int]
    labels: Sequence[int | None] | None
    checksum: int


def _open_files(path: Path, paths: Sequence[Path], name: str | None = None) -> Source:
    """List the images of parquet files of one kind, which lie at or below ``path``."""
    tables: list[_Table] = []
    names: tuple[str, ...] | None = None
    columns: _Columns | None = None
    numbers: dict[str, int] = {}  # of names of classes, as they are found
    for file in paths:
        told, claimed, table = _read_table(file, numbers)
        if columns is not None and told != columns:
            raise DataError(f"'{file}' has other columns than '{paths[0]}': prepare each kind by itself.")
        columns, names = told, names or claimed
        tables.append(table)
    place: dict[int | None, int] = {}
    if numbers:
        names = tuple(sorted(numbers, key=str.encode))
        place = {numbers[name]: rank for rank, name in enumerate(names)}
    entries: list[Entry] = []
    for number, (file, table) in enumerate(zip(paths, tables, strict=True)):
        row = 0
        for rows, size in zip(table.counts, table.sizes, strict=True):
            for _ in range(rows):
                label = None if table.labels is None else table.labels[row]
                label = place.get(label, label)
                entries.append(Entry(f"{file.name}/{row:08d}", label, size // rows, (number, row), table.checksum))
                row += 1
    if not entries or columns is None:
        raise DataError(f"'{path}' holds no rows: give parquet files with images.")
    classes = _checked_names(path, entries, names)
    return Source("parquet", path, classes, entries, 0, ParquetOpener(paths, columns.image), title=name)


def _read_table(file: Path, numbers: dict[str, int]) -> tuple[_Columns, tuple[str, ...] | None, _Table]:
    """Return the columns of a file, the names that it gives to class numbers, and what its rows are.

    Labels that are names become numbers by ``numbers``, to which new ones are added.
    """
    parquet = _pyarrow_parquet()
    try:
        found = parquet.ParquetFile(file)
        schema, metadata = found.schema_arrow, found.metadata
        columns = _columns(file, schema)
        # Of groups alone: to ask for a column ends the process where its statistics are damaged (pyarrow 26).
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        counts, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        held = file.stat().st_size
        if min(sizes, default=0) < 0:
            raise ValueError("groups without size")
        if min(counts, default=0) < 0 or not sum(counts) <= held // _ROW_BYTES:
            raise DataError(f"'{file}' claims {sum(counts):,} rows, which it cannot hold: fetch it again.")
        if max(sizes, default=0) > _GROUP_BYTES:
            raise DataError(f"'{file}' has a group of rows of more than 2 GiB: write it with smaller row groups.")
        if sum(sizes) > max(_SMALL_FILE, _GROWTH * held):
            raise DataError(
                f"'{file}' would grow from {held:,} to {sum(sizes):,} bytes, as no file of images does: fetch it "
                "again, or write it without compression."
            )
        labels: list[int | None] | None = None
        if columns.named:
            # A name is held once, however many rows share it.
            found = parquet.ParquetFile(file, read_dictionary=[columns.label])
            labels = _numbered(found.read(columns=[columns.label], use_threads=False).column(0), numbers)
        elif columns.label is not None:
            labels = found.read(columns=[columns.label]).column(0).to_pylist()
        if labels is not None and len(labels) != sum(counts):
            raise ValueError("rows without labels")
    except _damages() as error:
        raise DataError(f"'{file}' is a damaged or incomplete parquet file: fetch it again.") from error
    return columns, _class_names(schema, columns.label), _Table(counts, sizes, labels, _checksum(file))


def _numbered(column: Any, numbers: dict[str, int]) -> list[int | None]:
    """Return the numbers of the names in a column that is encoded by a dictionary."""
    labels: list[int | None] = []
    for chunk in column.chunks:
        known = [
            None if name is None else numbers.setdefault(printable_name(name), len(numbers))
            for name in chunk.dictionary.to_pylist()
        ]
        labels += [None if index is None else known[index] for index in chunk.indices.to_pylist()]
    return labels


def open_from_hub(name: str) -> Source:
    """Fetch a data set of the hub, ``hf:OWNER/NAME`` or ``hf:OWNER/NAME/SPLIT``, and list its images.

    The split is ``train`` where none is named. Raises ConfigError for a name of another form, DataError where it cannot
    be fetched, or where several configurations hold the split.
    """
    parts = name.removeprefix(HUB).split("/")
    split = parts[2] if len(parts) == 3 else "train"
    # The names that the hub allows; no wildcard is among them.
    if len(parts) not in (2, 3) or not all(parts) or not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ConfigError(f"'{name}' names no data set of the hub: write hf:OWNER/NAME or hf:OWNER/NAME/SPLIT.")
    from huggingface_hub import snapshot_download

    repository = "/".join(parts[:2])
    patterns = [f"{place}{split}{end}" for place in ("", "*/") for end in (".parquet", "-*.parquet")]
    reached = True
    try:
        with asking_hub(name) as reached:
            root = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of many libraries
        said = why_not(error, reached)
        raise DataError(f"'{name}' cannot be fetched ({said}): check the name and the network.") from error
    # All that was ever fetched of a revision lies in one folder, other splits too.
    files = sorted((file for file in root.rglob("*.parquet") if _split_of(file) == split), key=lambda file: file.name)
    if not files:
        raise DataError(f"'{name}' has no parquet files of a split '{split}': name another split.")
    folders = sorted({file.parent.relative_to(root).as_posix() for file in files})
    if len(folders) > 1:
        raise DataError(
            f"'{name}' has a split '{split}' in several folders ({', '.join(folders)}): fetch the files of one with "
            "'hf download', and prepare their folder."
        )
    told = re.search(r"-\d+-of-(\d+)", files[0].stem)
    if told is not None and len(files) != int(told[1]):
        raise DataError(
            f"of '{name}' {len(files)} files of {int(told[1])} are here: repeat with the network, to fetch the others."
        )
    return _open_files(files[0].parent, files, f"{repository}/{split}")


def _split_of(file: Path) -> str:
    """Return a file's name without what numbers it among those of its split."""
    return re.sub(r"-\d+-of-\d+.*$|-\d+$", "", file.stem)


def _files(folder: Path) -> list[Path]:
    top = sorted(folder.glob("*.parquet"), key=lambda file: file.name)
    return top or sorted((folder / "data").glob("*.parquet"), key=lambda file: file.name)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow, which is not installed: pip install 'vrpo[parquet]'.") from error
    return pyarrow.parquet


def _damages() -> tuple[type[Exception], ...]:
    """Return what pyarrow, and the C++ below it, raise on damaged bytes."""
    import pyarrow

    return (pyarrow.ArrowCapacityError, OSError, ValueError, LookupError, TypeError, RuntimeError)


def _columns(file: Path, schema: Any) -> _Columns:
    import pyarrow as pa

    def holds_images(field: Any) -> bool:
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))

    images = [field.name for field in schema if holds_images(field)]
    image = next((name for name in _IMAGE_NAMES if name in images), images[0] if len(images) == 1 else None)
    if image is None:
        held = f"its columns are {', '.join(schema.names) or 'none'}"
        close = nearest("image", schema.names)
        close = f"; {close}" if close.startswith("did you mean") else "."
        raise DataError(f"'{file}' has no image column, which holds encoded images as bytes: {held}{close}")

    def holds_names(field: Any) -> bool:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    labels = [schema.field(name) for name in _LABEL_NAMES if name in schema.names and name != image]
    integers = [field.name for field in labels if pa.types.is_integer(field.type)]
    named = [field.name for field in labels if holds_names(field)]
    if labels and not integers and not named:
        raise DataError(
            f"the column '{labels[0].name}' of '{file}' holds {labels[0].type}, neither class numbers nor names: write "
            "it as either, or leave it out."
        )
    return _Columns(image, next(iter(integers + named), None), not integers and bool(named))


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Return the names that the hub's metadata gives the classes."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None or label is None:
        return None
    try:
        names = parse_json(text)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(printable_name(str(name)) for name in names) if isinstance(names, list) else None


def _checked_names(path: Path, entries: Sequence[Entry], names: tuple[str, ...] | None) -> tuple[str, ...]:
    if entries[0].label is None and all(entry.label is None for entry in entries):
        return ()
    most = _MOST_CLASSES if names is None else len(names)
    for entry in entries:
        if entry.label is None:
            raise DataError(f"row '{entry.key}' of '{path}' has no label, as others have: complete its column.")
        if not 0 <= entry.label < most:
            raise DataError(f"row '{entry.key}' of '{path}' has the label {entry.label}, which is no class number.")
    return names or tuple(map(str, range(max(cast(int, entry.label) for entry in entries) + 1)))


def _checksum(file: Path) -> int:
    """Hash a file's end, which says where and how large everything in it is."""
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return zlib.crc32(stream.read())
