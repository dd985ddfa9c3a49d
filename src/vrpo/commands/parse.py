"""Reading a command's words into its options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from vrpo.config_load import explain, parser_words
from vrpo.errors import ConfigError, nearest

T = TypeVar("T")


def parse(command: type[T], words: Sequence[str], name: str, *, rest: bool = False) -> tuple[T, list[str]]:
    """Read ``words`` into a command's options; with ``rest``, also return the words it does not know.

    Values are held to the constraints of the fields' annotations, which tyro alone does not read. An option is given
    once: the parser would take the last one's values and drop the others'.

    Raises:
        ConfigError: words that do not fit.
    """
    prog = f"vrpo {name}"
    if not rest:
        if "--help" in words or "-h" in words:
            tyro.cli(command, prog=prog, args=["--help"])
        _refuse_unknown(command, words, prog)
    _refuse_repeated(command, words, prog)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options, unknown = tyro.cli(command, prog=prog, args=list(words), return_unknown_args=True)
    except SystemExit as stop:
        _refuse_values(command, words, prog)
        printed = output.getvalue()
        said = f"needs {_required(command)}" if "Missing from" in printed else f"says: {parser_words(printed)}"
        raise ConfigError(f"{prog} {said}: see `{prog} --help`.") from stop
    if unknown and not rest:
        raise ConfigError(f"{prog} did not expect '{unknown[0]}': see `{prog} --help`.")
    try:
        return TypeAdapter(command).validate_python(dataclasses.asdict(options)), list(unknown)  # type: ignore[call-overload]
    except ValidationError as error:
        field = [part for part in error.errors()[0]["loc"] if isinstance(part, str)][-1]
        raise ConfigError(f"{prog}: {explain(error, _dashed(field))}") from error


def option_names(command: type) -> list[str]:
    """Return a command's options, positional ones excluded, as ``--name``."""
    names = []
    for option in _options(command):
        if not option.positional:
            names += [_dashed(option.name)] + [f"--no-{_dashed(option.name)[2:]}"] * (option.hint is bool)
    return names


@dataclasses.dataclass(frozen=True)
class _Option:
    name: str
    hint: Any
    positional: bool
    required: bool


def _options(command: type) -> Iterator[_Option]:
    """Yield the fields of a command; those of a group of options are its own."""
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        marks: tuple[Any, ...] = ()
        if get_origin(hint) is Annotated:
            marks = hint.__metadata__
        plain = get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(plain) and isinstance(plain, type):
            yield from _options(plain)
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        # An option may be called otherwise than its field, such as --class.
        names = [getattr(mark, "name", None) for mark in marks]
        name = next((name for name in names if isinstance(name, str)), field.name)
        yield _Option(name, hint, tyro.conf.Positional in marks, required)


def _dashed(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _required(command: type) -> str:
    named = [
        option.name.upper() if option.positional else _dashed(option.name)
        for option in _options(command)
        if option.required
    ]
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def _refuse_unknown(command: type, words: Sequence[str], prog: str) -> None:
    names = option_names(command)
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in names:
            raise ConfigError(f"{prog} has no option '{name}': {nearest(name.replace('_', '-'), names)}")


def _refuse_repeated(command: type, words: Sequence[str], prog: str) -> None:
    several = {_dashed(option.name): "tuple" in str(option.hint) for option in _options(command)}
    seen: set[str] = set()
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        plain = f"--{name[5:]}" if name.startswith("--no-") and name not in several else name
        if plain in seen:
            remedy = f"write its values one after another, {name} A B" if several[plain] else "give it once"
            raise ConfigError(f"{prog}: {name} is given twice: {remedy}.")
        if plain in several:
            seen.add(plain)


def _refuse_values(command: type, words: Sequence[str], prog: str) -> None:
    """Say which value pydantic would refuse too; its sentences name the value and what it should be."""
    by_name = {_dashed(option.name): option for option in _options(command)}
    given: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = given.setdefault(name.replace("_", "-"), [value] if equals else [])
        elif given:
            values.append(word)
    for name, values in given.items():
        option = by_name.get(name)
        if option is None or option.hint is bool or values == ["None"]:
            continue
        if not values:
            raise ConfigError(f"{prog}: {name} has no value: give one.")
        try:
            TypeAdapter(option.hint).validate_python(values if "tuple" in str(option.hint) else values[0])
        except ValidationError as error:
            raise ConfigError(f"{prog}: {explain(error, name)}") from error
