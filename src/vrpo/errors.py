"""Errors a user can cause: each is one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VrpoError(Exception):
    """Base of every error that the command line prints as one sentence, without a traceback."""

    exit_code = 2
    silent = False
    """Whether another process of the run prints it."""


class ConfigError(VrpoError):
    """A configuration that cannot be trained."""


class DataError(VrpoError):
    """A source, a prepared data set or an image that cannot be used."""


class CheckpointError(VrpoError):
    """Weights or a checkpoint that are missing, damaged, or of another architecture."""


class EvaluationError(VrpoError):
    """Samples, references or features that cannot be scored."""


def nearest(value: object, choices: Iterable[object]) -> str:
    """Return a clause that names the valid choice closest to ``value``, or lists the choices."""
    names = [str(choice) for choice in choices]
    match = difflib.get_close_matches(str(value), names, n=2, cutoff=0.6)
    # Of a few short names two may be meant: 'fid' is closest to 'sfid', and is 'fd'.
    if len(match) == 2 and len(names) <= 12 and _likeness(value, match[0]) - _likeness(value, match[1]) < 0.1:
        return f"did you mean '{match[0]}' or '{match[1]}'?"
    if match:
        return f"did you mean '{match[0]}'?"
    if len(names) > 12:
        names = [*names[:12], "..."]
    return "choose one of: " + ", ".join(names) + "."


def _likeness(value: object, name: str) -> float:
    return difflib.SequenceMatcher(None, name, str(value)).ratio()
