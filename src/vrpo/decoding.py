"""From a run's samples to images: the autoencoder that made its latents, and no other unless told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo.data.manifest import LatentRecord, Manifest, Normaliser
from vrpo.data.shards import ShardedDataset
from vrpo.errors import ConfigError
from vrpo.pixels import to_uint8
from vrpo.vision.autoencoders import Autoencoder, Decoder, LatentDecoder, Pixels, load_autoencoder


def load_decoder(
    record: LatentRecord | None,
    normaliser: Normaliser | None,
    *,
    named: str | None,
    any_decoder: bool,
    device: torch.device | str,
) -> Decoder:
    """Return what turns a run's samples into images: the autoencoder that made its latents.

    ``named`` says where it lies, if not where the data says, or with ``any_decoder`` another one.

    Raises:
        ConfigError: it is not known, or another one than that of the latents.
        CheckpointError: it cannot be loaded.
    """
    if record is None or normaliser is None:
        if named is not None:
            raise ConfigError("sample.decoder is set, but the run was trained on pixels: leave it out.")
        return Pixels()
    name = named or record.autoencoder
    if name is None:
        raise ConfigError(
            "the data does not say which autoencoder made its latents: name it with --sample.decoder (or --decoder)."
        )
    autoencoder = load_autoencoder(name, device)
    if not any_decoder:
        refuse_other(record, autoencoder, name)
    if autoencoder.channels != record.channels:
        raise ConfigError(
            f"the autoencoder '{name}' decodes latents of {autoencoder.channels} channels, and these have "
            f"{record.channels}: give the one that made them."
        )
    return LatentDecoder(autoencoder, torch.tensor(normaliser.shift), torch.tensor(normaliser.scale))


def refuse_other(record: LatentRecord, autoencoder: Autoencoder, name: str) -> None:
    """Raise ConfigError if the autoencoder ``name`` is not, by all that is known, the one that made the latents.

    Where its weights are not known, as of latents that were taken over, it goes by its name: that of the record, or a
    folder of that name.
    """
    force = "say --sample.any-decoder True (--any-decoder)"
    if record.weights is not None:
        if autoencoder.fingerprint != record.weights:
            raise ConfigError(
                f"the autoencoder '{autoencoder.name}' ({autoencoder.fingerprint[:12]}) is not the one that made the "
                f"latents ('{record.autoencoder}', {record.weights[:12]}): give that one, or {force} to decode with "
                "this one all the same."
            )
        return
    if record.posterior and not autoencoder.posterior:
        raise ConfigError(
            f"'{name}', an {autoencoder.kind}, gives one value and no mean and standard deviation, as the latents are: "
            f"give the autoencoder that made them, or {force} to decode with this one all the same."
        )
    if record.autoencoder is not None and _last(record.autoencoder) not in (_last(name), _last(autoencoder.name)):
        raise ConfigError(
            f"the latents are said to be of '{record.autoencoder}', with weights that are not known, and '{name}' has "
            f"another name: give that one, in a folder of its name, or {force} if this one made them; 'vrpo prepare "
            "--latents' compares them and records its weights."
        )


def _last(name: str) -> str:
    """Return the last part of a hub id or path; a pipeline's folder "vae" has the name of the pipeline's."""
    path = Path(name)
    return path.parent.name if path.name == "vae" else path.name


def decode_stored(
    dataset: ShardedDataset, *, named: str | None, any_decoder: bool, device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """Return what turns a data set's stored latents (B, C, h, w) into uint8 images (B, 3, H, W) on the CPU.

    Of posteriors the mean is decoded. Errors are those of ``load_decoder``, and ConfigError where there are no latents.
    """
    record, normaliser = dataset.latents, dataset.manifest.normaliser
    if record is None or normaliser is None:
        raise ConfigError(f"'{dataset.path}' holds no latents to decode: leave out --decode and --decoder.")
    decoder = load_decoder(record, normaliser, named=named, any_decoder=any_decoder, device=device)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (normaliser.shift, normaliser.scale))

    def decode(stored: Tensor) -> Tensor:
        return to_uint8(decoder((stored[:, : record.channels].float() - shift) * scale)).cpu()

    return decode


def latent_state(manifest: Manifest) -> dict[str, Any]:
    """Return what a checkpoint says of the latents it was trained on."""
    return {
        "latents": None if manifest.latents is None else manifest.latents.model_dump(),
        "normaliser": None if manifest.normaliser is None else manifest.normaliser.model_dump(),
    }


def latents_of_state(state: dict[str, Any]) -> tuple[LatentRecord | None, Normaliser | None]:
    """Return what ``latent_state`` recorded: the latents a checkpoint was trained on; None and None for pixels."""
    record, normaliser = state.get("latents"), state.get("normaliser")
    return (
        None if record is None else LatentRecord.model_validate(record),
        None if normaliser is None else Normaliser.model_validate(normaliser),
    )


def decoder_of_state(
    state: dict[str, Any], *, named: str | None, any_decoder: bool, device: torch.device | str
) -> Decoder:
    """Return the decoder of a checkpoint with ``latent_state``; one without is of pixels."""
    record, normaliser = latents_of_state(state)
    return load_decoder(record, normaliser, named=named, any_decoder=any_decoder, device=device)
