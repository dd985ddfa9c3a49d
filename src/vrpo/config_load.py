"""From presets, files and command-line words to a validated configuration, or to one sentence that says why not."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vrpo.config import AlignConfig, RunConfig
from vrpo.errors import ConfigError, nearest
from vrpo.untrusted import MAX_YAML_BYTES, parse_yaml, read_text, unseal_text

OBJECTIVES: tuple[str, ...] = get_args(AlignConfig.model_fields["objective"].annotation)


def preset_names() -> list[str]:
    """Return every preset: each base by itself and, as BASE-OBJECTIVE, with each objective."""
    bases = sorted(item.name.removesuffix(".yaml") for item in files("vrpo.presets").iterdir() if _is_base(item.name))
    return [
        name for base in bases for name in (base, *(f"{base}-{objective}" for objective in OBJECTIVES)) if _fits(name)
    ]


def _fits(name: str) -> bool:
    """Whether an objective suits a base: a representation token is denoised by its velocity, which a DiT has not."""
    return "-dit-" not in name or not name.endswith("-reg")


def _is_base(file_name: str) -> bool:
    return file_name.endswith(".yaml") and not file_name.startswith("_")


def load_preset(name: str) -> dict[str, Any]:
    """Return a preset's values; ``BASE-OBJECTIVE`` is the base with that objective's own values over it.

    Raises:
        ConfigError: there is no such preset.
    """
    folder = files("vrpo.presets")
    base, _, objective = name.rpartition("-")
    if (folder / f"{name}.yaml").is_file() and _is_base(f"{name}.yaml"):
        layers = [f"{name}.yaml"]
    elif objective in OBJECTIVES and _fits(name) and (folder / f"{base}.yaml").is_file() and _is_base(f"{base}.yaml"):
        layers = [f"{base}.yaml", f"_objective-{objective}.yaml"]
    else:
        raise ConfigError(f"there is no preset '{name}': {nearest(name, preset_names())}")
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, _with_parents(layer))
    return merge(values, {"name": name})


def _with_parents(file_name: str) -> dict[str, Any]:
    values = yaml.safe_load((files("vrpo.presets") / file_name).read_text("utf-8")) or {}
    parent = values.pop("extends", None)
    return merge(_with_parents(f"{parent}.yaml"), values) if parent else values


def load_file(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Return the values of a YAML configuration file; with ``sealed``, of one that a run wrote for itself.

    Raises:
        ConfigError: it is missing, is not YAML, holds no mapping, or with ``sealed`` was changed since.
    """
    try:
        text = read_text(path, MAX_YAML_BYTES)
        values = parse_yaml(unseal_text(text) if sealed else text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}.") from error
    except ValueError as error:
        remedy = "put it back as the run wrote it." if sealed else "correct it or start from `vrpo presets NAME`."
        raise ConfigError(f"{path} cannot be read as YAML ({error}): {remedy}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no configuration: expected sections such as 'train:' and 'align:'.")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over``'s values, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def validate(values: Mapping[str, Any], where: str) -> RunConfig:
    """Return the configuration that ``values`` describe.

    Raises:
        ConfigError: the first key or value that is wrong, with the nearest valid choice.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def build_config(
    values: Mapping[str, Any],
    words: Sequence[str],
    where: str = "the configuration",
    other_options: Iterable[str] = (),
) -> RunConfig:
    """Return ``values`` with the overrides of the command line, such as ``--align.weight 0.3``, over them.

    ``other_options`` are the command's own, which a mistyped override may mean.

    Raises:
        ConfigError: a key or a value that is wrong, with the nearest valid choice.
    """
    base = validate(values, where)
    if not words:
        return base
    import tyro

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            config, unknown = tyro.cli(
                RunConfig,
                prog="vrpo train",
                default=base,
                args=list(words),
                return_unknown_args=True,
                # Switches take True or False like any other key, as in a file.
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        validate(merge(values, _as_values(words)), "the command line")
        raise ConfigError(f"the command line: {parser_words(output.getvalue())}: see `vrpo train --help`.") from stop
    if unknown:
        raise ConfigError(_unknown_word(unknown[0], other_options))
    return config


def option_names() -> list[str]:
    """Return every override that the command line takes, as ``--section.key``."""
    return ["--" + ".".join(path).replace("_", "-") for path in _leaves(RunConfig)]


def _leaves(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, (*prefix, name))
        else:
            yield (*prefix, name)


def _unknown_word(word: str, other_options: Iterable[str]) -> str:
    if not word.startswith("--"):
        return f"'{word}' was not expected: overrides are written --section.key value, for example --train.images 2M."
    name = word.partition("=")[0]
    dashed = name.replace("_", "-")
    spoken = dashed.lstrip("-").rpartition(".")[2].replace("-", " ")
    described = [option for option, text in _described() if " " in spoken and spoken in text.lower()]
    hint = f"did you mean '{described[0]}'?" if described else nearest(dashed, [*other_options, *option_names()])
    if hint.startswith("choose"):  # from more than a sentence holds
        hint = "`vrpo train --help` lists all, for example --train.images 2M."
    return f"there is no option '{name}': {hint}"


def _described() -> Iterable[tuple[str, str]]:
    """Yield each override with its explanation, in which its usual name elsewhere may stand."""
    for path in _leaves(RunConfig):
        field = _model_at(path[:-1]).model_fields[path[-1]]
        yield "--" + ".".join(path).replace("_", "-"), field.description or ""


def _as_values(words: Sequence[str]) -> dict[str, Any]:
    """Read overrides as nested text values, so that pydantic can say what is wrong with them."""
    values: dict[str, Any] = {}
    path: list[str] = []
    found: list[str] = []

    def store() -> None:
        if not path:
            return
        inner: Any = found[0] if len(found) == 1 else list(found)
        for key in reversed(path):
            inner = {key: inner}
        values.update(merge(values, inner))

    for word in words:
        if word.startswith("--"):
            store()
            key, equals, value = word[2:].partition("=")
            path, found = key.replace("-", "_").split("."), [value] if equals else []
        else:
            found.append(word)
    store()
    return values


def parser_words(printed: str) -> str:
    """Return what tyro printed without its title, boxes, help texts and hints."""
    lines = [line.strip("╭╮╰╯│─+| ") for line in printed.splitlines()[1:]]
    lines = [line for line in lines if line.strip("- ")]
    ends = ("Argument helptext", "For full helptext", "Got errors")
    return " ".join(itertools.takewhile(lambda line: not line.startswith(ends), lines)).rstrip(".:")


def explain(error: ValidationError, key: str | None = None) -> str:
    """Put pydantic's first complaint into one sentence about ``key`` (default: the key of a configuration)."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    if key is None:
        parts = (part for part in location if part not in ("float", "int", "str") and not part.startswith("dict["))
        key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        section = _model_at(location[:-1])
        return f"there is no key '{key}': {nearest(location[-1], section.model_fields)}"
    given = first.get("input")
    if given in ([], ()):
        return f"{key} has no value: give at least one."
    if first["type"] == "missing":
        return f"{key} has too few values: it was given {', '.join(map(str, given))}."
    if first["type"] == "literal_error":
        choices = [part.strip(" '") for part in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key} cannot be '{given}': {nearest(given, choices)}"
    message = first["msg"][0].lower() + first["msg"][1:].rstrip(".")
    message = message.removeprefix("value error, ").replace("input should be", "it should be")
    return f"{key} cannot be {given!r}: {message}."


def _model_at(path: Sequence[str]) -> type[BaseModel]:
    model: type[BaseModel] = RunConfig
    for part in path:
        field = model.model_fields.get(part)
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            model = kind
    return model


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, which ``vrpo train --config`` reads back to the same values."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
