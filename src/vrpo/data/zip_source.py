"""Zip archives of images, read in place."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from vrpo.data.sources import IMAGE_SUFFIXES, Entry, ListedFile, Source, arrange, hidden, printable_name, unsafe_name
from vrpo.errors import DataError

# A zip member's local header: what is known from the directory, then the lengths of its name and of its extra field.
_LOCAL_HEADER = struct.Struct("<26sHH")


def is_zip(path: Path) -> bool:
    """Whether a path is a zip archive, or is named like one."""
    return path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


@dataclass
class ZipOpener:
    """Reads members of a zip archive in place, one at a time; every process has its own handle.

    An entry says where its member lies, so that a process need not read the archive's directory: of a million members
    it takes a gigabyte, in each of as many processes as the machine has cores.
    """

    path: Path

    def __post_init__(self) -> None:
        self._stream: BinaryIO | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_stream": None}

    def connect(self) -> None:
        """Open the archive, once."""
        self._connected()

    def open(self, entry: Entry) -> BinaryIO:
        """Open one member as a stream; nothing is extracted to disk."""
        offset, compressed, method = cast("tuple[int, int, int]", entry.location)
        stream = self._connected()
        stream.seek(offset)
        header = stream.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile("its header is damaged")
        stream.seek(sum(_LOCAL_HEADER.unpack(header)[1:]), os.SEEK_CUR)  # past its name and extra field
        member = zipfile.ZipInfo()
        member.compress_type, member.compress_size = method, compressed
        member.file_size, member.CRC = entry.size, entry.checksum
        return cast(BinaryIO, zipfile.ZipExtFile(stream, "r", member))

    def _connected(self) -> BinaryIO:
        if self._stream is None:
            self._stream = self.path.open("rb")
        return self._stream


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"'{path}' is a damaged or incomplete zip archive ({error}): fetch it again.") from error


def open_zip(path: Path) -> Source:
    """List the images of a zip archive; raises DataError for a damaged, encrypted or hostile one."""
    files: list[ListedFile] = []
    ignored: Counter[str] = Counter()
    seen: set[str] = set()
    with _open_archive(path) as archive:
        members = archive.infolist()
        archive.NameToInfo.clear()
        while members:
            member = members.pop()  # let go at once: a member takes more memory than what is kept of it
            key = printable_name(member.filename.replace("\\", "/"))
            _refuse_unsafe(path, key, member)
            if key.endswith("/") or any(map(hidden, key.split("/"))):
                continue
            suffix = os.path.splitext(key)[1].lower()
            if suffix not in IMAGE_SUFFIXES:
                ignored[suffix] += 1
                continue
            if key in seen:
                raise DataError(f"'{path}' has two members named '{key}': pack it again with each name once.")
            if member.flag_bits & 1:
                raise DataError(f"'{path}' is encrypted (member '{key}'): pack it again without a password.")
            seen.add(key)
            place = (member.header_offset, member.compress_size, member.compress_type)
            files.append(ListedFile(key, member.file_size, place, member.CRC))
    return arrange("zip", path, files, ignored, ZipOpener(path))


def _refuse_unsafe(path: Path, key: str, member: zipfile.ZipInfo) -> None:
    """Refuse members that would leave the archive's own folder: such an archive is damaged or hostile."""
    reason = unsafe_name(key)
    if reason is None and stat.S_ISLNK(member.external_attr >> 16):
        reason = "a symbolic link"
    if reason is not None:
        raise DataError(f"'{path}' has a member that is {reason} ('{key}'): pack it again with plain files only.")
