"""Images from a network: pixels of sample i are a function of (seed, i) and of its label alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vrpo.config import DiffusionConfig, RunConfig, SampleConfig
from vrpo.devices import DTYPES
from vrpo.diffusion.losses import Denoising, FlowMatching, NoisePrediction
from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import get_path
from vrpo.diffusion.samplers import check_settings, sample, sample_dit
from vrpo.diffusion.state import Layout, State
from vrpo.errors import ConfigError
from vrpo.models.taps import NO_TAPS
from vrpo.models.transformer import DiffusionTransformer
from vrpo.pixels import to_uint8
from vrpo.sampling.candidates import Candidates
from vrpo.vision.autoencoders import Decoder, Pixels


def build_denoising(kind: str, config: DiffusionConfig) -> Denoising:
    """Return what a transformer of ``kind`` ("SiT" or "DiT") learns to denoise."""
    if kind == "DiT":
        return NoisePrediction()
    return FlowMatching(get_path(config.path), config.time, config.logit_mean, config.logit_std)


def check_sampling(
    kind: str,
    settings: SampleConfig,
    conditional: bool,
    label_dropout: float,
    channels: int | None = None,
    token: bool = False,
) -> None:
    """Refuse settings that a transformer of ``kind``, with classes or without, cannot be sampled by.

    ``label_dropout``: share of labels that training replaced by the null class, which guidance asks for;
    ``channels``: those of an image or its latents, where they are known; ``token``: whether one is sampled beside it.

    Raises:
        ConfigError: the first that does not fit.
    """
    check_settings(
        kind,
        settings.sampler,
        settings.steps,
        settings.guidance_scale,
        settings.guidance_interval,
        classes=conditional,
        guidance_channels=settings.guidance_channels,
        channels=channels,
        section="sample.",
    )
    if settings.guidance_channels is not None and token:
        raise ConfigError(
            f"sample.guidance_channels {settings.guidance_channels} leaves open what becomes of the token that this "
            "model samples beside the image: leave it out to guide all."
        )
    if settings.guidance_scale != 1 and label_dropout == 0:
        raise ConfigError(
            f"sample.guidance_scale {settings.guidance_scale:g} needs a null class, which training with "
            "model.label_dropout 0 never sees: use 1, or train with --model.label-dropout 0.1."
        )


def default_compute_batch(device: torch.device, tokens: int) -> int:
    """Return how many images of ``tokens`` tokens occupy a device: a power of two, at most 16 on a CPU.

    More would cost memory, and time where few images are wanted, and gain nothing: on a CPU products of 1,024 rows
    run at full speed and stay in its cache, on a GPU those of 16,384 rows.
    """
    least, most, rows = (4, 16, 1024) if device.type == "cpu" else (8, 512, 16_384)
    return min(most, max(least, 1 << ((rows // tokens) or 1).bit_length() - 1))


class ImageSampler:
    """Draws images from a transformer by one protocol.

    How a product of matrices is rounded depends on its number of rows, and may depend on a row's place. Therefore the
    network always sees ``compute_batch`` images, of which image i is number i modulo ``compute_batch``: an image
    depends neither on what else is drawn, nor on how many at a time, nor by how many processes.
    """

    def __init__(
        self,
        network: DiffusionTransformer,
        config: RunConfig,
        *,
        device: torch.device | str,
        settings: SampleConfig | None = None,
        decoder: Decoder | None = None,
        candidates: Candidates | None = None,
    ) -> None:
        """Take a network, the run's configuration and, if they differ from its own, sampling settings.

        ``decoder`` turns latents into images; None: they are pixels. With ``candidates`` several trajectories begin
        for each image and one goes on.

        Raises:
            ConfigError: settings that the network cannot be sampled by.
        """
        self.settings = settings or config.sample
        check_sampling(
            network.kind,
            self.settings,
            network.num_classes > 0,
            config.model.label_dropout,
            network.in_channels,
            network.token_width > 0,
        )
        self.network = network
        self.config = config
        self.device = torch.device(device)
        self.decoder: Decoder = decoder or Pixels()
        self.precision = self.settings.precision or config.train.precision
        self.compute_batch = self.settings.compute_batch or default_compute_batch(self.device, network.num_tokens)
        self._candidates = candidates
        self._taps = NO_TAPS if candidates is None else candidates.taps
        self._path = get_path(config.diffusion.path)
        side = network.input_size
        self._layout = Layout((network.in_channels, side, side), network.token_width)

    @property
    def protocol(self) -> dict[str, Any]:
        """The part of a number's protocol that sampling decides."""
        settings = self.settings
        # Named only where it acts, so that what was recorded without it is the same protocol.
        some = settings.guidance_scale != 1 and settings.guidance_channels not in (None, self.network.in_channels)
        return {
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_interval": list(settings.guidance_interval),
            **({"guidance_channels": settings.guidance_channels} if some else {}),
            "decoder": self.decoder.description,
            **({} if self._candidates is None else {"selection": self._candidates.selection.protocol}),
        }

    def images(self, indices: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        """Return samples ``indices`` with ``labels`` (B,) as uint8 (B, 3, H, W) on the CPU."""
        return torch.cat(list(self.batches(indices, labels, seed)))

    def batches(
        self,
        indices: Sequence[int],
        labels: Tensor | None,
        seed: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the images of ``images`` as they are done, at most ``compute_batch`` at once, in their order.

        ``on_batch`` is told how many are done.
        """
        done = 0
        for positions in _groups(indices, self.compute_batch):
            done += len(positions)
            yield self._group(positions, indices, labels, seed)
            if on_batch is not None:
                on_batch(done)

    def _group(self, positions: list[int], indices: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        """Return the images at ``positions``, all of one group, each computed in its own row of the full batch."""
        rows = [indices[position] % self.compute_batch for position in positions]
        # Rows that nobody asked for repeat the first image asked for.
        filled = [positions[0]] * self.compute_batch
        for row, position in zip(rows, positions, strict=True):
            filled[row] = position
        chosen = None if labels is None else labels[filled].to(self.device)
        latents = self._latents([indices[position] for position in filled], chosen, seed)
        # One by one: a decoder takes far more memory than the network, and its rounding depends on the batch, too.
        images = torch.cat([self.decoder(latent) for latent in latents[rows].split(1)])
        return to_uint8(images).cpu()

    @property
    def _trajectories(self) -> int:
        """Trajectories that begin for each image."""
        return 1 if self._candidates is None else self._candidates.selection.count

    def _latents(self, indices: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        network = self.network
        noise = SampleNoise(seed, indices, self._layout.shape, self.device, self._trajectories)
        settings = self.settings
        options: dict[str, Any] = {
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_interval": settings.guidance_interval,
            "guidance_channels": settings.guidance_channels,
            "null_label": network.num_classes if network.num_classes else None,
            "noise_source": noise,
            "state_dtype": torch.float32 if self.device.type == "mps" else torch.float64,
        }
        if self._candidates is not None and labels is not None:
            options["on_step"] = self._candidates.chooser(seed, indices, labels)
            labels = labels.repeat_interleave(self._trajectories)
        if network.kind == "DiT":
            return sample_dit(self._call, noise.initial(), labels, **options)
        final = sample(self._call, noise.initial(), labels, path=self._path, **options)
        return self._layout.split(final).image

    def _call(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        image, token = self._layout.split(x)
        with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            if token is None:
                return self.network(image, t, labels, self._taps).float()
            velocity = self.network(image, t, labels, self._taps, token=token)
        return self._layout.join(State(velocity[0].float(), velocity[1].float()))


def _groups(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split the positions of ``indices`` into runs that fit one batch of ``size`` with every image in its row."""
    positions: list[int] = []
    for position, index in enumerate(indices):
        held = {indices[other] for other in positions}
        if positions and (index // size != indices[positions[0]] // size or index in held):
            yield positions
            positions = []
        positions.append(position)
    if positions:
        yield positions
