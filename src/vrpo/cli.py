"""The command ``vrpo``: finds the command, prints user errors as one sentence, and exits with its code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vrpo import __version__
from vrpo.errors import ConfigError, VrpoError, nearest
from vrpo.processes import leave_reason
from vrpo.untrusted import printable

INTERRUPTED = 130

# Each command is a function of a module of `vrpo.commands`, imported only when it runs, so that help answers at once.
COMMANDS = {
    "demo": ("training.demo", "Train with and without alignment on small images, compare, write a report."),
    "prepare": ("data.prepare", "Turn images in any of many layouts, or their latents, into a data set."),
    "data info": ("data.data_info", "Say what a prepared data set holds."),
    "data verify": ("data.data_verify", "Check every byte of a prepared data set against its hashes."),
    "data browse": ("data.data_browse", "Write a page of random samples of a prepared data set."),
    "encoder fit": ("data.encoder_fit", "Train a small encoder on a labelled data set."),
    "plan": ("plan.plan", "Say what a run takes: memory, disk, time, cost."),
    "presets": ("training.presets", "List the presets, or show one: vrpo presets NAME [--full]."),
    "train": ("training.train", "Train a diffusion transformer."),
    "sample": ("images.sample", "Draw images from a run."),
    "export": ("publish.export", "Write a run's weights as the code of DiT, SiT, REPA or REG reads them."),
    "import": ("publish.import_", "Make a run of a checkpoint of DiT, SiT, REPA or REG."),
    "evaluate": ("evaluation.evaluate", "Score runs, folders or npz files against reference images."),
    "evaluate stats": ("evaluation.stats", "Save the statistics of reference images."),
    "evaluate parity": ("evaluation.parity", "Score a pair of published files and compare with published values."),
    "evaluate cknna": (
        "representation.cknna",
        "Measure how a run's tokens align with an encoder's, by depth and time.",
    ),
    "evaluate probe": ("representation.probe", "Fit linear classifiers to a run's tokens, by depth and time."),
    "compare": ("images.compare", "Compare runs in one HTML report."),
}

# How to go on after an interruption, where the work done is not lost.
CONTINUE = {
    "prepare": "run the same command again to go on.",
    "sample": "run the same command again to go on.",
    "train": "go on from the newest checkpoint by adding --resume.",
}

# What to do about an error of the operating system, by its number.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, so give another path",
    errno.EEXIST: "a file stands where a folder is needed, so give another path",
    errno.EISDIR: "give the name of a file in it",
    errno.EACCES: "give a path that you may use, or change its permissions",
    errno.EPERM: "give a path that you may use, or change its permissions",
    errno.EROFS: "give a path that can be written",
    errno.ENOSPC: "free some space and run the command again",
    errno.EDQUOT: "free some space and run the command again",
}


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code: 0 done, 2 a user error told in one sentence, 130 interrupted."""
    words = sys.argv[1:] if words is None else list(words)
    try:
        code = _dispatch(list(words))
    except VrpoError as error:
        _tell(str(error), error.silent)
        code = error.exit_code
    except KeyboardInterrupt:
        remedy = CONTINUE.get(words[0] if words else "", "run the command again to start over.")
        # Under a launcher all processes are interrupted, and the first one says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"vrpo: interrupted; {remedy}", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left; closing keeps Python from complaining at exit.
        sys.stderr.close()
        code = 0
    except OSError as error:
        _tell(_os_sentence(error), getattr(error, "silent", False))
        code = VrpoError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".") or "the machine has no more"
        _tell(f"memory ran out ({reason}): use smaller batches, and see `vrpo plan`.")
        code = VrpoError.exit_code
    sys.exit(code)


def _tell(sentence: str, silent: bool = False) -> None:
    """Print an error's sentence, unless another process does, and leave it to the launcher."""
    sentence = printable(sentence)
    if not silent:
        print(f"vrpo: {sentence}", file=sys.stderr)
    leave_reason(sentence)


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or a GPU; torch's errors are told by name, for it loads slowly."""
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or named


def _os_sentence(error: OSError) -> str:
    from vrpo.files import explain_os_error

    where = "" if error.filename is None else f"{error.filename}: "
    remedy = REMEDIES.get(error.errno or 0, "correct that and run the command again")
    reason = " ".join(explain_os_error(error).split()).rstrip(".")
    return f"{where}{reason[:1].lower()}{reason[1:]}: {remedy}."


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"vrpo {__version__}")
        return 0
    for length in (2, 1):
        entry = COMMANDS.get(" ".join(words[:length])) if len(words) >= length else None
        if entry is not None:
            module, _, function = entry[0].partition(".")
            return getattr(import_module(f"vrpo.commands.{module}"), function)(words[length:])
    members = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if not members:
        choices = dict.fromkeys(name.split()[0] for name in COMMANDS)
        raise ConfigError(f"there is no command '{words[0]}': {nearest(words[0], choices)}")
    if len(words) > 1 and not words[1].startswith("-"):
        raise ConfigError(f"there is no command '{words[0]} {words[1]}': {nearest(words[1], members)}")
    print(f"usage: vrpo {words[0]} {{{','.join(members)}}} ...")
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"vrpo {__version__}: train diffusion transformers with representation alignment.",
            "",
            "usage: vrpo COMMAND ...",
            "",
            *(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            "`vrpo COMMAND --help` explains a command. Start with `vrpo demo`.",
        ]
    )
