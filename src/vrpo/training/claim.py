"""Whether a run may begin or go on in a folder, and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path

from vrpo.config import RunConfig
from vrpo.config_load import load_file, validate
from vrpo.errors import ConfigError
from vrpo.files import is_unfinished
from vrpo.runs import flatten

# What a resumed run may change: nothing that shapes the weights. Data and encoders are told by their fingerprints,
# wherever their files lie.
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
    "train.keep_checkpoints",
)
FREE_ENDINGS = ("_every", "encoder.weights")
FREE_SECTIONS = ("sample.", "evaluate.")
# Objectives in which nothing depends on how long the run will be.
TIMELESS = ("none", "repa", "irepa", "contrastive")
# Objectives that compare images of one forward pass with each other; for the others its size is a matter of memory.
COMPARING = ("contrastive",)


def claim_folder(run: Path, config: RunConfig, resume: bool) -> None:
    """Refuse to write over another run, or to go on with one under a configuration that would change it.

    Raises:
        ConfigError: the folder holds something else, or the first key that differs.
    """
    file = run / "config.yaml"
    if not file.is_file():
        # A process that was killed in its first moment leaves hidden unfinished files.
        if run.is_dir() and any(not is_unfinished(child) for child in run.iterdir()):
            raise ConfigError(f"{run} is not empty and holds no run: choose another --out.")
        return
    if not resume:
        if not (run / "checkpoints").is_dir() and not (run / "metrics.jsonl").is_file():
            return  # it failed before its first step: nothing is lost by beginning again
        raise ConfigError(f"{run} holds a run already: go on with --resume, or choose another --out.")
    old = flatten(validate(load_file(file, sealed=True), str(file)).model_dump(mode="json"))
    new = flatten(config.model_dump(mode="json"))
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key) and not _is_free(key, config):
            raise ConfigError(
                f"resuming {run} would change {key} from {old.get(key)} to {new.get(key)}: start a new run with "
                "another --out, or leave it as it was."
            )


def _is_free(key: str, config: RunConfig) -> bool:
    align = config.align
    if key == "train.images":
        counted = align.supply == "none" or (align.supply == "clock" and align.scaffold.steps > 0)
        return align.side in TIMELESS and counted and align.perceptual_image.kind == "none"
    if key == "train.micro_batch":
        return align.side not in COMPARING
    return key in FREE_KEYS or key.endswith(FREE_ENDINGS) or key.startswith(FREE_SECTIONS)
