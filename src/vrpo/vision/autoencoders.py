"""Autoencoders between pixels and the latents that are diffused: pixels as they are, AutoencoderKL, AutoencoderTiny.

A latent is stored as the network gives it. What the diffusion sees is ``(latent - shift) * scale``; the two come from
the autoencoder's configuration, or from the data's channel statistics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vrpo.devices import DTYPES
from vrpo.errors import CheckpointError, ConfigError, nearest
from vrpo.files import tensors_hash
from vrpo.pixels import to_float
from vrpo.vision.hub import asking_hub, why_not

# Short names of published autoencoders on the hub.
HUB_NAMES = {
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "taesd": "madebyollin/taesd",
}
KINDS = ("AutoencoderKL", "AutoencoderTiny")
# Images that are decoded at once: fixed, so that an image does not depend on how many are asked for.
DECODE_BATCH = 16


class Decoder(Protocol):
    """From normalised latents to images."""

    @property
    def description(self) -> str:
        """What a protocol says of it."""

    def __call__(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in about [-1, 1] of the diffusion's latents (B, C, h, w)."""


class Pixels:
    """The identity: a diffusion model of pixels needs no autoencoder."""

    description = "none (pixels)"

    def __call__(self, latents: Tensor) -> Tensor:
        """Return the images as they are."""
        return latents


class Autoencoder:
    """A frozen autoencoder of diffusers.

    Attributes: ``name`` (as it was asked for), ``kind`` (its class), ``channels`` and ``downsampling`` of its latents,
    ``posterior`` (whether it gives mean and standard deviation), ``shift`` and ``scale`` of its configuration,
    ``fingerprint`` (SHA-256 over configuration and weights).
    """

    def __init__(self, name: str, network: nn.Module, device: torch.device, precision: str = "fp32") -> None:
        """Take a network of one of ``KINDS`` in float32."""
        config: Any = network.config
        self.name, self.kind, self.device = name, type(network).__name__, device
        self.posterior = self.kind == "AutoencoderKL"
        self.channels = int(config.latent_channels)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.scale = float(config.get("scaling_factor") or 1.0)
        shaping = json.dumps([self.kind, self.shift, self.scale])
        self.fingerprint = hashlib.sha256((shaping + tensors_hash(network.state_dict())).encode()).hexdigest()
        self._dtype = DTYPES[precision]
        # The plain module's method: that of diffusers warns whenever a dtype is given.
        self._network: Any = nn.Module.to(network, device=device, dtype=self._dtype).eval().requires_grad_(False)
        self.downsampling = self._downsampling()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents float32 (B, C, h, w) of uint8 pixels (B, 3, H, W).

        With ``posterior`` they are mean and standard deviation, (B, 2C, h, w).

        Raises:
            CheckpointError: they are not finite in float16, in which they are stored.
        """
        images = to_float(pixels.to(self.device)).to(self._dtype)
        if self.posterior:
            distribution = self._network.encode(images).latent_dist
            latents = torch.cat([distribution.mean.float(), (0.5 * distribution.logvar.float()).exp()], dim=1)
        else:
            latents = self._network.encode(images).latents.float()
        if not torch.isfinite(latents.half()).all():
            raise CheckpointError(
                f"the autoencoder '{self.name}' gives latents that are not finite in half precision: use --precision "
                "fp32, or another autoencoder."
            )
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images float32 (B, 3, H, W) in about [-1, 1] of latents (B, C, h, w) as the network gives them."""
        parts = [
            self._network.decode(part.to(self.device, self._dtype)).sample.float()
            for part in latents.split(DECODE_BATCH)
        ]
        return torch.cat(parts)

    def _downsampling(self) -> int:
        # Both classes halve once a block but the last.
        config = self._network.config
        blocks = config.block_out_channels if self.posterior else config.encoder_block_out_channels
        return 2 ** (len(blocks) - 1)


class LatentDecoder:
    """Undoes the normalisation and decodes."""

    def __init__(self, autoencoder: Autoencoder, shift: Tensor, scale: Tensor) -> None:
        """Take the autoencoder and the normaliser's shift and scale (C,)."""
        self.autoencoder = autoencoder
        self._shift = shift.to(autoencoder.device).float()[:, None, None]
        self._scale = scale.to(autoencoder.device).float()[:, None, None]

    @property
    def description(self) -> str:
        """Kind, name and the beginning of the fingerprint; of a folder its last part."""
        name = Path(self.autoencoder.name).name if Path(self.autoencoder.name).is_absolute() else self.autoencoder.name
        return f"{self.autoencoder.kind} {name} ({self.autoencoder.fingerprint[:12]})"

    def __call__(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of normalised latents (B, C, h, w)."""
        latents = latents.to(self.autoencoder.device).float()
        return self.autoencoder.decode(latents / self._scale + self._shift)


def load_autoencoder(name: str, device: torch.device | str = "cpu", precision: str = "fp32") -> Autoencoder:
    """Load an autoencoder by a short name, a hub id or the path of a folder in diffusers' layout.

    A pipeline's folder is searched for its part ``vae``.

    Raises:
        ConfigError: there is nothing of that name.
        CheckpointError: it is of another kind, or its weights cannot be read.
    """
    import diffusers
    from diffusers.utils import logging

    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = next(_parts(folder), folder)
        source: str = str(folder.absolute())
        name = source
    elif name in HUB_NAMES or _is_hub_id(name):
        source = HUB_NAMES.get(name, name)
    else:
        raise ConfigError(
            f"there is no autoencoder '{name}': give the path of a folder in diffusers' layout, a hub id such as "
            f"OWNER/NAME, or a name; {nearest(name, HUB_NAMES)}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    reached = True
    try:
        with asking_hub(source) as reached:
            kind = _read_kind(source)
            if kind not in KINDS:
                raise CheckpointError(
                    f"'{name}' is a {kind}, which is no autoencoder that can be used here: give one of "
                    f"{', '.join(KINDS)}."
                )
            network = getattr(diffusers, kind).from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False)
    except CheckpointError:
        raise
    except Exception as error:  # the hub, the file system, the format and the shapes all have errors of their own
        said = why_not(error, reached)
        raise CheckpointError(
            f"the autoencoder '{name}' cannot be loaded ({said}): check the name and the network, or give the path of "
            "a local folder with config.json and its .safetensors file."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return Autoencoder(name, network, torch.device(device), precision)


def _parts(folder: Path) -> Iterator[Path]:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        yield folder / "vae"


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and not name.startswith((".", "~", "/"))


def _read_kind(source: str) -> str:
    if Path(source).is_dir():
        file = Path(source) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(source, "config.json"))
    kind = json.loads(file.read_text("utf-8"))["_class_name"]
    return str(kind)
