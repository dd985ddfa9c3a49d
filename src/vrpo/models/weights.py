"""Weights of the official DiT, the original SiT, REPA's and REG's SiT, to ours and back.

The four publish the same architecture under the same parameter names, which ``published_name`` translates.
They differ in this:

- ``dit`` (facebookresearch/DiT): noise and variance at integer steps. Only the names change.
- ``sit`` (willisma/SiT): time runs from noise at 0 to data at 1 and the velocity is data minus noise, the
  opposite of ours in both. ``_reverse_time`` rewrites the weights so that the model is exactly the same
  function of our time.
- ``repa`` (sihyun-yu/REPA): our conventions, plus the projectors of the alignment loss under ``projectors.``.
- ``reg`` (Martinser/REG): as REPA, plus the representation token, which stands first there and last here. Attention
  does not see the difference: its row of the position table is zero. REG's class tokens are DINOv2's as they are,
  those of our training are standardised; sampling drops them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vrpo.errors import CheckpointError, nearest
from vrpo.files import load_weights, replacing, unwrap, write_safetensors
from vrpo.models.layers import time_frequencies
from vrpo.models.transformer import DiffusionTransformer

Source = Literal["dit", "sit", "repa", "reg"]
StateDict = dict[str, Tensor]

_KINDS = {"dit": "DiT", "sit": "SiT", "repa": "SiT", "reg": "SiT"}
_TRUNK_NAMES = {
    "patch_embedding.projection": "x_embedder.proj",
    "time_embedding.expand": "t_embedder.mlp.0",
    "time_embedding.output": "t_embedder.mlp.2",
    "label_embedding.table": "y_embedder.embedding_table",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
    "representation.embedding": "cls_projectors2",
    "representation.norm": "wg_norm",
    "representation.output": "final_layer.linear_cls",
}
_BLOCK_NAMES = {
    "attention.qkv": "attn.qkv",
    "attention.query_norm": "attn.q_norm",
    "attention.key_norm": "attn.k_norm",
    "attention.output": "attn.proj",
    "feed_forward.expand": "mlp.fc1",
    "feed_forward.output": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
_LEGACY_BLOCK = re.compile(r"decoder_blocks\.(\d{1,4})\.(.+)", re.DOTALL)
_PROJECTORS = "projectors."
# Files in half precision round the position table by up to 2 ** -9.
_TABLE_TOLERANCE = 1e-2


def load_published(model: DiffusionTransformer, path: str | Path, source: Source) -> None:
    """Load a published checkpoint file into ``model`` in place.

    Raises:
        CheckpointError: an unreadable file, or weights of another architecture.
    """
    model.load_state_dict(from_published(read_tensors(path), model, source))


def save_published(
    model: DiffusionTransformer,
    path: str | Path,
    source: Source,
    projectors: Mapping[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write ``model`` so that the code of ``source`` reads it: a .pt with {"ema": weights}, or safetensors.

    ``projectors`` are as in ``to_published``; ``metadata`` goes into a safetensors file, and a .pt has none.

    Raises:
        CheckpointError: a model that ``source`` cannot express, or a suffix other than .pt and .safetensors.
        OSError: no space is left, or it cannot be written there; an earlier file of the name stays.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"Cannot tell the format of '{path}': end its name in .safetensors or .pt.")
    published = {name: value.contiguous().cpu() for name, value in to_published(model, source, projectors).items()}
    with replacing(path) as unfinished:
        if path.suffix == ".safetensors":
            write_safetensors(unfinished, published, metadata)
        else:
            # A file of Python's own raises its own errors, where torch's writer would raise others.
            with unfinished.open("wb") as file:
                torch.save({"ema": published}, file)


def from_published(published: Mapping[str, Tensor], model: DiffusionTransformer, source: Source) -> StateDict:
    """Return published weights as a state dict for ``model``, which is left alone (it may be on meta).

    REPA's projectors are not part of the transformer: ``repa_projectors`` returns them.

    Raises:
        CheckpointError: weights of another architecture; names the first difference.
    """
    _check_source(model, source)
    published = _join_legacy_blocks(published)
    expected = {published_name(name): (name, value.shape) for name, value in model.state_dict().items()}
    expected_shapes = {name: shape for name, (_, shape) in expected.items()}
    expected_shapes["pos_embed"] = _position_table(model).shape
    for name, shape in expected_shapes.items():
        if name in published and published[name].shape != shape:
            raise CheckpointError(
                f"The weights are of another architecture: '{name}' has shape {tuple(published[name].shape)} "
                f"in the file and {tuple(shape)} in the model; build the model that wrote them."
            )
    missing = [name for name in expected if name not in published]
    if missing:
        raise CheckpointError(
            f"The weights lack {len(missing)} of the model's {len(expected)} tensors, first '{missing[0]}': "
            "give a file of this architecture."
        )
    unknown = [n for n in published if n not in expected_shapes and not n.startswith(_PROJECTORS)]
    if unknown:
        raise CheckpointError(
            f"The weights have {len(unknown)} tensors that the model has not, first '{unknown[0]}': "
            "build the model that wrote them."
        )
    _check_position_table(published, model)
    state = {ours: published[theirs] for theirs, (ours, _) in expected.items()}
    return _reverse_time(state) if source == "sit" else state


def to_published(
    model: DiffusionTransformer, source: Source, projectors: Mapping[str, Tensor] | None = None
) -> StateDict:
    """Return the weights of ``model`` in the names and conventions of ``source``, position table included.

    ``projectors`` (for "repa" and "reg") are named as ``repa_projectors`` returns them; REPA's loader requires them.

    Raises:
        CheckpointError: a model that ``source`` cannot express: of the other kind, unconditional, with QK
            normalisation (only REPA and REG have it), with a learned variance (these have none), or with a
            representation token (only REG has one, and always).
    """
    _check_source(model, source)
    if model.label_embedding is None:
        raise CheckpointError(
            f"An unconditional model cannot be written as '{source}': the published ones have classes."
        )
    if model.config["qk_norm"] and source not in ("repa", "reg"):
        raise CheckpointError(f"The models of '{source}' have no QK normalisation: write this one as 'repa'.")
    if model.learn_sigma and source in ("repa", "reg"):
        raise CheckpointError(f"The models of '{source}' have no learned variance: write this one as 'sit'.")
    state: StateDict = {name: value.detach() for name, value in model.state_dict().items()}
    if source == "sit":
        state = _reverse_time(state)
    published = {published_name(name): value for name, value in state.items()}
    published["pos_embed"] = _position_table(model)
    published |= {_PROJECTORS + name: value for name, value in (projectors or {}).items()}
    return published


def repa_projectors(published: Mapping[str, Tensor]) -> StateDict:
    """Return the projectors of a REPA checkpoint under names such as "0.2.weight" (encoder 0, layer 2)."""
    return {n.removeprefix(_PROJECTORS): v for n, v in published.items() if n.startswith(_PROJECTORS)}


def published_name(name: str) -> str:
    """Translate one of our parameter names, such as "blocks.3.attention.qkv.weight", to the published one."""
    module, _, leaf = name.rpartition(".")
    if module.startswith("blocks."):
        _, index, part = module.split(".", 2)
        return f"blocks.{index}.{_BLOCK_NAMES[part]}.{leaf}"
    return f"{_TRUNK_NAMES[module]}.{leaf}"


def read_tensors(path: str | Path) -> StateDict:
    """Read named tensors from a safetensors or .pt file, the EMA weights if it holds several sets.

    Nothing in a .pt file is executed.

    Raises:
        CheckpointError: a missing or damaged file, one that holds more than tensors, or none.
    """
    path = Path(path)
    content = unwrap(load_weights(path), ("ema", "model", "state_dict"))
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"'{path}' holds no named tensors: give a state dict, as safetensors or .pt.")
    return tensors


def _check_source(model: DiffusionTransformer, source: str) -> None:
    if source not in _KINDS:
        raise CheckpointError(f"There is no weights source '{source}': {nearest(source, _KINDS)}")
    if model.kind != _KINDS[source]:
        raise CheckpointError(
            f"Weights of '{source}' belong to a {_KINDS[source]} model, and this is a {model.kind}: "
            f"build it as {_KINDS[source]}."
        )
    if (source == "reg") != (model.representation is not None):
        has, remedy = ("no", "give it one with token_width") if source == "reg" else ("a", "use the source 'reg'")
        raise CheckpointError(f"The model has {has} representation token, unlike those of '{source}': {remedy}.")


def _position_table(model: DiffusionTransformer) -> Tensor:
    """Return the position table (1, N, D) as it is published, with a row of zeros for a token before the image's."""
    table = model.get_buffer("position_table")
    if model.representation is None:
        return table
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def _join_legacy_blocks(published: Mapping[str, Tensor]) -> StateDict:
    """Number all blocks through: early REPA files call those above the alignment depth decoder_blocks."""
    below = {name.split(".")[1] for name in published if name.startswith("blocks.")}
    joined = {}
    for name, value in published.items():
        legacy = _LEGACY_BLOCK.match(name)
        if legacy:
            name = f"blocks.{int(legacy[1]) + len(below)}.{legacy[2]}"
        joined[name] = value
    return joined


def _check_position_table(published: Mapping[str, Tensor], model: DiffusionTransformer) -> None:
    table = _position_table(model)
    if "pos_embed" not in published or table.is_meta:
        return
    difference = (published["pos_embed"].to(table) - table).abs().max()
    if not difference <= _TABLE_TOLERANCE:
        raise CheckpointError(
            f"The weights' position table 'pos_embed' differs by up to {difference:.3g} from the fixed "
            "sine-cosine table, the only one this model has."
        )


def _reverse_time(state: StateDict) -> StateDict:
    """Return weights whose model at time t gives minus what these give at time 1 - t: its own inverse.

    The features [cos(f (1-t)), sin(f (1-t))] are a reflection of [cos(f t), sin(f t)], frequency by
    frequency, so the first layer of the time embedding absorbs it; the sign goes into the last layer. On
    every path of SiT (arXiv 2401.08740) reversing time only flips the velocity's sign.
    """
    state = dict(state)
    for name in ("final.linear.weight", "final.linear.bias"):
        state[name] = -state[name]
    weight = state["time_embedding.expand.weight"]
    cosine, sine = weight.double().chunk(2, dim=1)
    angle = time_frequencies(weight.device).double()
    reflected = [cosine * angle.cos() + sine * angle.sin(), cosine * angle.sin() - sine * angle.cos()]
    state["time_embedding.expand.weight"] = torch.cat(reflected, dim=1).to(weight.dtype)
    return state
