"""Text of unknown origin as plain data: bounded in size and depth, never code, and sealed so that damage shows.

A sealed record carries the SHA-256 of everything else in it, so that a bit that flips on a disk is found when it is
read. A seal is no signature: whoever may write the file may seal it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 256 << 20
MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 64

SEAL = "seal"
_SEAL_LINE = re.compile(r"^# seal ([0-9a-f]{64})\n\Z", re.MULTILINE)
_SEAL_LIKE = re.compile(r"[0-9a-f]{64}\s*\Z")
_SEALED = "# The last line is the SHA-256 of those above.\n"


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text whose lists and mappings are nested at most ``MAX_DEPTH`` deep.

    Raises:
        ValueError: it is no JSON, too deep or too large.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if brackets > MAX_DEPTH:
        _check_depth(value)
    return value


def read_json(file: Path) -> Any:
    """Return the value of a JSON file; errors are those of ``parse_json`` and OSError."""
    with file.open("rb") as stream:
        return parse_json(stream.read(MAX_JSON_BYTES + 1))


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = list(chain.from_iterable(map(_members, level)))
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _members(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text: no tags, which name types, and no aliases, which can multiply without bound.

    Raises:
        ValueError: it is no YAML, too deep, too large, or has a tag or an alias; the line is named where known.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it is longer than {MAX_YAML_BYTES:,} characters")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            start: Any = event.start_mark
            line = start.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has an alias at line {line}, which is not read")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"it has a tag at line {line}, which is not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep at line {line}")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise ValueError(f"it is not valid{where}") from error


def read_yaml(file: Path) -> Any:
    """Return the value of a YAML file; errors are those of ``parse_yaml`` and OSError."""
    return parse_yaml(read_text(file, MAX_YAML_BYTES))


def read_text(file: Path, limit: int) -> str:
    """Return the text of a file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer, or not UTF-8.
    """
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is longer than {limit:,} bytes")
    return content.decode("utf-8").replace("\r\n", "\n")


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own SHA-256 under ``seal``."""
    return {**record, SEAL: _digest(json.loads(json.dumps(record)))}


def unseal(record: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    """Return a sealed JSON object without its seal.

    Raises:
        ValueError: its content is not what was sealed, or with ``required`` it has no seal.
    """
    content = {key: value for key, value in record.items() if key != SEAL}
    if SEAL not in record:
        if required:
            raise ValueError("it has no seal")
        return content
    if record[SEAL] != _digest(content):
        raise ValueError("its content differs from its seal")
    return content


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def seal_text(text: str) -> str:
    """Return text with a last line that holds the SHA-256 of the lines above, and a first one that says so.

    Both are comments to YAML. The first one tells text that was cut from text that never had a seal.
    """
    text = _SEALED + text
    return f"{text}# {SEAL} {hashlib.sha256(text.encode()).hexdigest()}\n"


def unseal_text(text: str) -> str:
    """Return text without its seal; text that has none is returned as it is.

    Raises:
        ValueError: the lines are not those that were sealed.
    """
    found = _SEAL_LINE.search(text)
    if found is None:
        if _SEAL_LIKE.search(text):
            raise ValueError("its seal is damaged")
        if text.startswith(_SEALED):
            raise ValueError("its end is missing")
        return text
    content = text[: found.start()]
    if hashlib.sha256(content.encode()).hexdigest() != found.group(1):
        raise ValueError("its content differs from its seal")
    return content.removeprefix(_SEALED)


def printable(text: str) -> str:
    """Return text with control characters escaped, which could drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
