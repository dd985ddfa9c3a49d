"""The command ``vrpo``: parses, calls one function, prints. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from vrpo import __version__
from vrpo.errors import ConfigError, VrpoError, nearest

INTERRUPTED = 130
T = TypeVar("T")


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code: 0 done, 2 a user error told in one sentence, 130 interrupted."""
    words = sys.argv[1:] if words is None else list(words)
    try:
        code = _dispatch(list(words))
    except VrpoError as error:
        print(f"vrpo: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("vrpo: interrupted; run the same command again to go on.", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    sys.exit(code)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"vrpo {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return COMMANDS[name][0](words[length:]) or 0
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    if words[0] in groups:
        members = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
        if words[1:] and not words[1].startswith("-"):
            raise ConfigError(f"there is no command '{words[0]} {words[1]}': {nearest(words[1], members)}")
        print(f"usage: vrpo {words[0]} {{{','.join(members)}}} ...")
        return 0
    raise ConfigError(f"there is no command '{words[0]}': {nearest(words[0], sorted({n.split()[0] for n in COMMANDS}))}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"vrpo {__version__}: train diffusion transformers with representation alignment.",
            "",
            "usage: vrpo COMMAND ...",
            "",
            *lines,
            "",
            "`vrpo COMMAND --help` explains a command. Start with `vrpo demo`.",
        ]
    )


def _parse(command: type[T], words: Sequence[str], name: str, *, rest: bool = False) -> tuple[T, list[str]]:
    """Read ``words`` into a command's options, and return those it does not know if ``rest`` is true.

    Raises:
        ConfigError: words that do not fit.
    """
    import tyro

    if "--help" in words or "-h" in words:
        tyro.cli(command, prog=f"vrpo {name}", args=["--help"])
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options, unknown = tyro.cli(command, prog=f"vrpo {name}", args=list(words), return_unknown_args=True)
    except SystemExit as stop:
        said = [line.strip("╭╮╰╯│─ ") for line in output.getvalue().splitlines()[1:]]
        sentence = " ".join(line for line in said if line and not line.startswith("For full"))
        raise ConfigError(f"vrpo {name}: {sentence or 'these words do not fit.'} See `vrpo {name} --help`.") from stop
    if unknown and not rest:
        from dataclasses import fields

        choices = [f"--{field.name.replace('_', '-')}" for field in fields(command)]  # type: ignore[arg-type]
        raise ConfigError(f"vrpo {name} has no option '{unknown[0]}': {nearest(unknown[0], choices)}")
    return options, list(unknown)


def _positional(kind: Any) -> Any:
    from tyro.conf import Positional

    return Positional[kind]


# -- train -------------------------------------------------------------------------------------------------------------


@dataclass
class Train:
    """Train a diffusion transformer. Every key of the configuration is an option: --train.images 2M."""

    preset: str | None = None
    """Where to start from: a name that `vrpo presets` lists."""
    config: Path | None = None
    """Where to start from: a YAML file, for example a run's config.yaml."""
    data: Path | None = None
    """Prepared data set; the same as --data.path."""
    out: Path | None = None
    """Folder of the run; default runs/NAME-seed-SEED."""
    resume: bool = False
    """Go on with the run in --out."""


def _train(words: list[str]) -> int:
    from vrpo.config import RunConfig
    from vrpo.config_load import build_config, load_file, load_preset, merge

    if "--help" in words or "-h" in words:
        import tyro

        with contextlib.suppress(SystemExit):
            tyro.cli(Train, prog="vrpo train", args=["--help"])
        print("\nand every key of the configuration:\n")
        tyro.cli(RunConfig, prog="vrpo train", default=RunConfig(), args=["--help"])
    # tyro knows --data as a prefix of nothing: sections are written --data.path.
    options, rest = _parse(Train, words, "train", rest=True)
    if options.preset is not None and options.config is not None:
        raise ConfigError("give --preset or --config, not both: they are two starting points.")
    where, values = "the defaults", {}
    if options.preset is not None:
        where, values = f"preset {options.preset}", load_preset(options.preset)
    elif options.config is not None:
        where, values = str(options.config), load_file(options.config)
    elif options.resume and options.out is not None:
        where = str(options.out / "config.yaml")
        values = load_file(options.out / "config.yaml")
    if options.data is not None:
        values = merge(values, {"data": {"path": str(options.data)}})
    config = build_config(values, rest, where)

    from vrpo.display import TrainingDisplay
    from vrpo.training.trainer import train

    out = options.out or Path("runs") / f"{config.name}-seed-{config.seed}"
    with TrainingDisplay() as display:
        result = train(
            config, out, resume=options.resume, say=display.say, display=display.report, progress=display.progress
        )
    print(f"{result.status.capitalize()} at {result.images:,} images, {result.seconds:.0f} s of training: {result.run}")
    return 0 if result.signal is None else 128 + result.signal


def _presets(words: list[str]) -> int:
    import yaml

    from vrpo.config_load import load_preset, preset_names, to_yaml, validate

    if not words:
        print("\n".join(preset_names()))
        return 0
    name = words[-1]
    config = validate(load_preset(name), f"preset {name}")
    print(to_yaml(config) if "--full" in words else yaml.safe_dump(load_preset(name), sort_keys=False), end="")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "train": (_train, "Train a diffusion transformer on prepared data."),
    "presets": (_presets, "List the presets, or show one: vrpo presets NAME [--full]."),
}
