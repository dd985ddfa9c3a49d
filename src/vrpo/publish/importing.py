"""Making a run of a published checkpoint of DiT, SiT, REPA or REG, which is sampled and evaluated as a trained one."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vrpo
from vrpo.checkpoints import Checkpoint
from vrpo.config import RunConfig
from vrpo.config_load import merge, to_yaml, validate
from vrpo.data.manifest import LatentRecord, Normaliser
from vrpo.errors import CheckpointError, ConfigError
from vrpo.files import sha256_file, sync_folder, write_text
from vrpo.models.transformer import SIZES, DiffusionTransformer, build_transformer, parameter_count, parse_model_name
from vrpo.models.weights import Source, from_published, read_tensors, repa_projectors
from vrpo.publish.projectors import count, from_repa
from vrpo.sampling import check_sampling
from vrpo.training.checkpoint import save_checkpoint
from vrpo.untrusted import parse_json, read_text, seal, seal_text
from vrpo.vision.weight_files import read_metadata

_KINDS = {"dit": "DiT", "sit": "SiT", "repa": "SiT", "reg": "SiT"}
_OBJECTIVES = {"dit": "none", "sit": "none", "repa": "repa", "reg": "reg"}

# Of Stable Diffusion's first autoencoder, in whose latents all four were published.
SD_AUTOENCODER, SD_CHANNELS, SD_SCALE = "sd-vae-ft-ema", 4, 0.18215
_MAX_NAMES_BYTES = 1 << 20


@dataclass(frozen=True)
class _Sizes:
    """What the tensors of a published file say of their model; ``side`` None where there is no position table."""

    hidden_size: int
    depth: int
    patch_size: int
    channels: int
    classes: int
    side: int | None
    qk_norm: bool
    learn_sigma: bool
    token_width: int

    @classmethod
    def of(cls, published: Mapping[str, Tensor], layout: Source) -> _Sizes:
        """Read them; raises KeyError, IndexError or ValueError where a tensor is missing or has another form."""
        hidden_size, channels, patch_size, _ = published["x_embedder.proj.weight"].shape
        blocks = {tuple(n.split(".")[:2]) for n in published if n.startswith(("blocks.", "decoder_blocks."))}
        side = None
        if "pos_embed" in published:
            side = isqrt(published["pos_embed"].shape[1] - (layout == "reg")) * patch_size
        return cls(
            hidden_size=hidden_size,
            depth=len(blocks),
            patch_size=patch_size,
            channels=channels,
            classes=published["y_embedder.embedding_table.weight"].shape[0] - 1,
            side=side,
            qk_norm="blocks.0.attn.q_norm.weight" in published,
            learn_sigma=published["final_layer.linear.bias"].shape[0] == 2 * channels * patch_size**2,
            token_width=published["cls_projectors2.weight"].shape[1] if layout == "reg" else 0,
        )

    @property
    def name(self) -> str:
        """The model's name without its kind, such as XL/2, or its blocks and channels."""
        for name, size in SIZES.items():
            if (size.hidden_size, size.depth) == (self.hidden_size, self.depth):
                return f"{name}/{self.patch_size}"
        return f"{self.depth} blocks of {self.hidden_size} channels/{self.patch_size}"


@dataclass(frozen=True)
class Imported:
    """The run that was made: its configuration, number of classes, and the projectors it took along."""

    config: RunConfig
    classes: int
    projectors: int


def import_run(
    file: Path,
    layout: Source,
    values: Mapping[str, Any],
    where: str,
    out: Path,
    class_names: Path | None = None,
) -> Imported:
    """Make a run of a published checkpoint, which is sampled and evaluated as a trained one, and not trained further.

    ``values`` are those of a configuration, ``where`` its name in errors. The file decides what it can: classes,
    channels, QK normalisation. Both sets of weights are those of the file. Without metadata of ours, four channels
    under ``data.latent_size`` are latents of ``SD_AUTOENCODER``, with weights that are not known.

    Raises:
        ConfigError: a configuration of another model, class names that do not fit, or an ``out`` that is not empty.
        CheckpointError: an unreadable file, or one of another architecture or layout.
        OSError: the run cannot be written; then nothing of it is left.
    """
    check_new_run(out)
    published = {name: value.float() for name, value in read_tensors(file).items()}
    about = read_metadata(file) if file.suffix == ".safetensors" else {}
    sizes = _check_file(file, layout, published, about)
    config = _configure(file, layout, values, where, sizes, about)
    side = sizes.side or config.data.latent_size or config.data.image_size
    if side is None:
        raise ConfigError(f"{file} does not say its input's size, nor does {where}: set data.latent_size.")
    record, normaliser = _latents(file, config, sizes.channels, side, about)
    names = _class_names(file, class_names, sizes.classes, about)
    network = _network(file, layout, published, config, sizes, side)
    projectors = from_repa(published)
    origin = {"file": file.name, "sha256": sha256_file(file), "layout": layout}
    parameters = {"trunk": parameter_count(network), "objective": sum(map(Tensor.numel, projectors.values()))}
    facts = {
        "name": config.name,
        "objective": config.align.objective,
        "status": "imported",
        "vrpo": vrpo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": parameters,
        "encoders": [],
        "data": {"classes": sizes.classes, "class_names": list(names)},
        "imported": origin,
    }
    state = {
        "step": 0,
        "images": 0,
        "seconds": 0.0,
        "network": network.config,
        "class_names": list(names),
        "latents": None if record is None else record.model_dump(),
        "normaliser": None if normaliser is None else normaliser.model_dump(),
        "seed": config.seed,
        "imported": origin,
    }
    weights = network.state_dict()
    tensors = {"model": weights, "ema": weights, "objective": projectors, "optimizer": {}}
    _write_run(out, config, facts, Checkpoint(tensors, state))
    return Imported(config, sizes.classes, count(projectors))


def check_new_run(out: Path) -> None:
    """Refuse a file, or a folder that holds anything, in the place of a new run.

    Raises:
        ConfigError: as said.
    """
    if out.is_file():
        raise ConfigError(f"--out {out} is a file: give the name of a folder.")
    if out.is_dir() and any(out.iterdir()):
        held = "holds a run already" if (out / "config.yaml").is_file() else "is not empty"
        raise ConfigError(f"--out {out} {held}: choose another.")


def _check_file(file: Path, layout: Source, published: Mapping[str, Tensor], about: Mapping[str, str]) -> _Sizes:
    """Return the sizes of a file's model; refuse a file that is told to be of another layout."""
    told = about.get("layout", layout)
    if told != layout:
        raise CheckpointError(f"{file} was exported with the layout {told}, not {layout}: give --layout {told}.")
    if layout in ("dit", "sit") and repa_projectors(published):
        raise CheckpointError(f"{file} has projectors, which no file of {layout} has: give --layout repa or reg.")
    try:
        sizes = _Sizes.of(published, layout)
    except (KeyError, IndexError, ValueError) as error:
        lacks = f"it has no tensor {error}" if isinstance(error, KeyError) else "a tensor is of another form"
        raise CheckpointError(
            f"{file} is no checkpoint of the layout {layout} ({lacks}): give a file that the original code wrote, or "
            "another --layout."
        ) from error
    if layout in ("repa", "reg") and sizes.learn_sigma:
        raise CheckpointError(
            f"{file} has channels for a variance, which no file of {layout} has and those of DiT and SiT have: give "
            "--layout dit or sit."
        )
    return sizes


def _configure(
    file: Path, layout: Source, values: Mapping[str, Any], where: str, sizes: _Sizes, about: Mapping[str, str]
) -> RunConfig:
    """Return the configuration of the run, of which the file decides what it can; refuse one of another model."""
    known = validate(values, where)
    align = {} if "objective" in (values.get("align") or {}) else {"align": {"objective": _OBJECTIVES[layout]}}
    decided = {"model": {"qk_norm": sizes.qk_norm}, "data": {"conditional": True}, **align}
    config = validate(merge(known.model_dump(mode="json"), decided), where).with_absolute_paths()
    kind, size, patch = parse_model_name(config.model.name)
    asked, found = f"{kind}-{size}/{patch}", f"{_KINDS[layout]}-{sizes.name}"
    if asked != found:
        raise CheckpointError(
            f"{file} holds, as {layout}, a {found}, and {where} is of a {asked}: give the --preset or --config of that "
            "model, or another --layout."
        )
    if config.align.uses_token != (layout == "reg"):
        remedy = "give one with align.objective reg." if layout == "reg" else "give --layout reg or another one."
        has = "a" if config.align.uses_token else "no"
        raise ConfigError(f"{where} has {has} representation token, unlike files of {layout}: {remedy}")
    if layout != "dit" and about.get("path", config.diffusion.path) != config.diffusion.path:
        raise ConfigError(
            f"{file} was trained on the path {about['path']}, and diffusion.path of {where} is "
            f"{config.diffusion.path}: give --config with that path."
        )
    wanted = config.data.latent_size or config.data.image_size
    if sizes.side is not None and wanted is not None and sizes.side != wanted:
        raise ConfigError(
            f"{file} is a model of inputs of {sizes.side} x {sizes.side}, and {where} is of {wanted} x {wanted}: give "
            "a preset of that size."
        )
    check_sampling(kind, config.sample, True, config.model.label_dropout)
    return config


def _latents(
    file: Path, config: RunConfig, channels: int, side: int, about: Mapping[str, str]
) -> tuple[LatentRecord | None, Normaliser | None]:
    """Return the latents that the file's model makes, None and None for pixels: as told, or those of ``SD_SCALE``."""
    if "latents" in about:
        told = _parsed(file, about, "latents")
        if told is None:
            return None, None
        try:
            record = LatentRecord.model_validate(told)
            normaliser = Normaliser.model_validate(_parsed(file, about, "normaliser"))
        except ValueError as error:
            raise CheckpointError(f"{file} has damaged metadata about its latents: use another copy.") from error
        if {record.channels, len(normaliser.shift), len(normaliser.scale)} != {channels} or record.size != side:
            raise CheckpointError(f"{file} has metadata about latents of another shape: use another copy.")
        return record, normaliser
    if config.data.latent_size is None and channels == 3:
        return None, None
    if channels != SD_CHANNELS or config.data.latent_size is None:
        raise ConfigError(
            f"{file} does not say how its {channels} channels are decoded: give one that `vrpo export` wrote as "
            f"safetensors, or, for {SD_CHANNELS} channels of {SD_AUTOENCODER}, a configuration with data.latent_size."
        )
    record = LatentRecord(
        autoencoder=SD_AUTOENCODER,
        weights=None,
        channels=channels,
        size=side,
        posterior=True,
        precision="source",
        normalisation="autoencoder",
        pixels=False,
    )
    return record, Normaliser(shift=(0.0,) * channels, scale=(SD_SCALE,) * channels)


def _class_names(file: Path, listed: Path | None, classes: int, about: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the classes from a file of one a line, or as the metadata has them, or none."""
    if listed is not None:
        try:
            names = read_text(listed, _MAX_NAMES_BYTES).rstrip("\n").split("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--class-names {listed} cannot be read ({reason}): give a text file.") from error
        if len(names) != classes:
            raise ConfigError(
                f"--class-names {listed} has {len(names)} lines, and {file} has {classes} classes: give one a line."
            )
        return tuple(names)
    names = _parsed(file, about, "class_names") if "class_names" in about else []
    fits = isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names)
    return tuple(names) if fits else ()


def _parsed(file: Path, about: Mapping[str, str], key: str) -> Any:
    try:
        return parse_json(about[key])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file} has damaged metadata ('{key}'): use another copy.") from error


def _network(
    file: Path, layout: Source, published: Mapping[str, Tensor], config: RunConfig, sizes: _Sizes, side: int
) -> DiffusionTransformer:
    """Return the transformer with the file's weights; refuse a file that differs from it in any tensor."""
    network = build_transformer(
        config.model.name,
        input_size=side,
        in_channels=sizes.channels,
        num_classes=sizes.classes,
        qk_norm=sizes.qk_norm,
        learn_sigma=layout == "dit" or sizes.learn_sigma,
    )
    if sizes.token_width:
        network.add_token(sizes.token_width)
    try:
        network.load_state_dict(from_published(published, network, layout))
    except CheckpointError as error:
        raise CheckpointError(f"{file} cannot be read as {layout}: {_clause(error)}") from error
    return network


def _write_run(out: Path, config: RunConfig, facts: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Make a run's folder, which has its name only when all of it is on the disk."""
    target = out.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        write_text(temporary / "config.yaml", seal_text(to_yaml(config)))
        write_text(temporary / "run.json", json.dumps(seal(facts), indent=1))
        save_checkpoint(temporary, checkpoint, keep=1)
        sync_folder(temporary)
        temporary.rename(target)  # refused by the system where something was put there meanwhile
        sync_folder(target.parent)
    except (OSError, CheckpointError) as error:
        # A checkpoint's own sentence is about a run that goes on, and here there is none yet.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        cause.filename, cause.filename2 = str(out), None
        raise cause from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clause(error: Exception) -> str:
    text = str(error)
    return text[:1].lower() + text[1:]
