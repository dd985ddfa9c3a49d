"""Files that are numbered parts of a set: which of them belong together, and whether all are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vrpo.errors import DataError

SPLIT_NAMES = frozenset({"dev", "test", "testing", "train", "training", "val", "valid", "validation"})


@dataclass(frozen=True)
class Part:
    """What a file's name says: its set, its number in it and of how many; None where it does not."""

    set: str
    number: int | None = None
    total: int | None = None

    @property
    def of_split(self) -> bool:
        """Whether the name of the set speaks of training, validation or the like."""
        return not SPLIT_NAMES.isdisjoint(re.split(r"[^a-z]+", self.set.lower()))


def part_of(file: Path) -> Part:
    """Read names such as ``train-00003-of-00010-1f2e3d``, ``set_7``, ``00012`` and ``n01440764_train``."""
    told = re.fullmatch(r"(.*?)[-_.]?(\d+)[-_.]of[-_.](\d+)(?:[-_.].*)?", file.stem)
    if told is not None:
        return Part(told[1], int(told[2]), int(told[3]))
    told = re.fullmatch(r"(.*?)(\d+)(\D*)", file.stem)
    if told is None:
        return Part(file.stem)
    return Part(f"{told[1]}*{told[3]}" if told[3] else told[1].rstrip("-_."), int(told[2]))


def consecutive(parts: Sequence[Part]) -> bool:
    """Whether all are of one set, and their numbers follow each other."""
    numbers = sorted(part.number for part in parts if part.number is not None)
    return len({part.set for part in parts}) == 1 and numbers == list(range(numbers[0], numbers[0] + len(parts)))


def refuse_several_sets(path: Path, parts: Iterable[Part]) -> None:
    """Raise DataError where ``parts`` are of more than one set."""
    sets = sorted({part.set for part in parts})
    if len(sets) > 1:
        names = ", ".join(name or "numbers alone" for name in sets[:4]) + ", ..." * (len(sets) > 4)
        raise DataError(
            f"'{path}' holds several sets ({names}): give each a folder of its own, or, if they are one, names that "
            "differ by a running number."
        )


def refuse_missing(path: Path, parts: Iterable[Part]) -> None:
    """Raise DataError where the numbers of one set's ``parts`` have a gap, or are fewer than their names say."""
    parts = list(parts)
    totals = sorted({part.total for part in parts if part.total is not None})
    if len(totals) > 1:
        raise DataError(
            f"'{path}' holds parts of {' and of '.join(map(str, totals[:2]))}, which are not of one set: give each set "
            "a folder of its own."
        )
    numbers = sorted({part.number for part in parts if part.number is not None})
    total = totals[0] if totals else None
    if not numbers or (total is not None and len(numbers) >= total):
        return
    bounds = [-1, *numbers] if total is not None and total not in numbers else numbers
    count = numbers[-1] + 1 - numbers[0] - len(numbers) if total is None else total - len(numbers)
    if count == 0:
        return
    first = next((one + 1 for one, other in pairwise(bounds) if other > one + 1), numbers[-1] + 1)
    parts_said = "parts" if total is None else f"{total:,} parts"
    more = f", and {count - 1:,} more" if count > 1 else ""
    raise DataError(
        f"'{path}' is not whole, number {first} of its {parts_said} is missing{more}: fetch what is missing, or rename "
        "the files that are to make the set, with numbers that have no gap."
    )
