"""Which keys of a configuration shape no weights: a resumed run may change them, and they make no other experiment.

Data and encoders are told by their fingerprints, wherever their files lie.
"""

from __future__ import annotations

import re

FREE_KEYS = (
    "name",
    "data.path",
    "data.validation",
    "data.prefetch",
    "data.verify",
    "train.device",
    "train.compile",
    "train.parallel",
    "train.shard_size",
    "train.deterministic",
    "train.keep_checkpoints",
    "train.stop_after_bad",
)
FREE_ENDINGS = ("_every",)
ENCODER_WEIGHTS = re.compile(r"(encoder|more_encoders\.\d+)\.weights")
FREE_SECTIONS = ("sample.", "evaluate.")


def is_free(key: str) -> bool:
    """Whether a key, by its dotted name, shapes no weights."""
    named = key in FREE_KEYS or key.endswith(FREE_ENDINGS) or key.startswith(FREE_SECTIONS)
    return named or ENCODER_WEIGHTS.fullmatch(key) is not None
