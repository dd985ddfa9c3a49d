"""Writing a run's transformer as the code of DiT, SiT, REPA or REG reads it.

An export holds one set of weights of the transformer. The projectors of the alignment, which REPA and REG save within
their model, are those that were trained, beside averaged weights too: a run averages the transformer alone. What a
scaffold projects belongs to neither, for the transformer is a plain one without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import vrpo
from vrpo.alignment.build import default_depth
from vrpo.checkpoints import check_part, read_state
from vrpo.errors import ConfigError
from vrpo.files import load_tensors
from vrpo.models.transformer import SIZES, DiffusionTransformer, parse_model_name
from vrpo.models.weights import Source, save_published
from vrpo.publish.projectors import count, to_repa
from vrpo.sampling import LoadedRun, load_run

_TIMES = {
    "dit": "steps 0 (data) to 999 (noise), noise and variance are predicted",
    "sit": "0 is noise and 1 is data, the velocity is data minus noise",
    "repa": "0 is data and 1 is noise, the velocity is noise minus data",
    "reg": "0 is data and 1 is noise, the velocity is noise minus data",
}


@dataclass(frozen=True)
class Exported:
    """What was written: the run, its layout, how many projectors are in it, and why none are, where some could be."""

    loaded: LoadedRun
    layout: Source
    projectors: int
    without: str | None


def export_run(run: Path, out: Path, layout: Source | None = None, weights: Literal["ema", "raw"] = "ema") -> Exported:
    """Write the transformer of a run, or of one of its checkpoints, to ``out``: .safetensors, or .pt as {"ema": ...}.

    ``layout`` None: that of the model. The projectors that go with ``repa`` and ``reg`` are the trained ones, which
    belong to the weights ``raw``: of the average ``ema`` there is the transformer alone.

    Raises:
        DataError, CheckpointError: no run, no checkpoint, or another suffix.
        ConfigError: a layout that cannot hold the model.
        OSError: it cannot be written there; an earlier file of the name stays.
    """
    loaded = load_run(run, weights, torch.device("cpu"))
    fitting, what = layouts_for(loaded.network)
    if not fitting:
        raise ConfigError(f"the model of {run} is {what}, which no published code reads: give another run.")
    if layout is not None and layout not in fitting:
        raise ConfigError(
            f"the model of {run} is {what}, which the layout {layout} cannot hold: give --layout "
            f"{' or '.join(fitting)}."
        )
    align = loaded.config.align
    objective = loaded.checkpoint / "objective.safetensors"
    check_part(objective, read_state(loaded.checkpoint))
    projectors, without = to_repa(load_tensors(objective), align)
    if layout is None:
        # A scaffold is taken down in the end: what is left to show is a plain transformer.
        as_repa = projectors and "repa" in fitting and align.supply == "none"
        layout = "repa" if as_repa else fitting[0]
    if layout not in ("repa", "reg"):
        projectors, without = {}, None
    metadata = describe(loaded, layout, weights) if out.suffix == ".safetensors" else None
    save_published(loaded.network, out, layout, projectors, metadata)
    return Exported(loaded, layout, count(projectors), without)


def layouts_for(network: DiffusionTransformer) -> tuple[tuple[Source, ...], str]:
    """Return the layouts that can hold a model, the plainest first, and what it is in words."""
    qk_norm = network.config["qk_norm"]
    with_norms = " with QK normalisation" if qk_norm else ""
    if not network.num_classes:
        return (), "one without classes"
    if network.kind == "DiT":
        return () if qk_norm else ("dit",), f"a DiT{with_norms}"
    if network.representation is not None:
        return ("reg",), "a SiT with a representation token"
    if network.learn_sigma:
        return () if qk_norm else ("sit",), f"a SiT with a variance{with_norms}"
    return ("repa",) if qk_norm else ("sit", "repa"), f"a SiT{with_norms or ' without a representation token'}"


def describe(loaded: LoadedRun, layout: Source, weights: Literal["ema", "raw"]) -> dict[str, str]:
    """Return the metadata of a safetensors file: all that a reader must know besides the tensors."""
    config, align = loaded.config, loaded.config.align
    _, size, _ = parse_model_name(config.model.name)
    depths = align.depth or (default_depth(size, SIZES[size].depth),)
    return {
        "format": "pt",
        "written_by": f"vrpo {vrpo.__version__}",
        "layout": layout,
        "model": config.model.name,
        "network": json.dumps(loaded.network.config),
        "time": _TIMES[layout],
        "path": "DiT's 1,000 steps" if layout == "dit" else config.diffusion.path,
        "objective": align.objective,
        "alignment_depth": "none" if align.side == "none" else ", ".join(map(str, depths)),
        "run": config.name,
        "step": str(loaded.step),
        "images": str(loaded.images),
        "weights": weights,
        "class_names": json.dumps(loaded.class_names),
        **{name: json.dumps(loaded.latents[name]) for name in ("latents", "normaliser")},
    }
