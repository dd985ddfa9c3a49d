"""A perceptual distance of the one-step prediction to the image, beside any objective.

Its gradient reaches the weights through the network's output. Where an objective reads what arrives at the aligned
tokens, as VRPO's fidelity and gate do, it is part of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo.alignment.objective import AlignmentBatch, Objective, Wrapper
from vrpo.alignment.schedule import Schedule
from vrpo.config import ImageDistanceConfig
from vrpo.errors import ConfigError
from vrpo.models.taps import Taps
from vrpo.randomness import mix

FIELD = "align.perceptual_image"
# A prime that is coprime to the 999 intervals between DiT's times, large enough to tell neighbouring times apart.
SPREAD = 4801

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) of predicted images to images, both (B, 3, H, W) in [-1, 1], differentiable in the first.

The precision is its own, whatever autocast it is called under.
"""


def choose(time: Tensor, images_seen: int, max_time: float, fraction: float) -> Tensor:
    """Return which images (B,) are compared: about ``fraction`` of those with ``time`` below ``max_time``.

    A function of each image's own time and of the step, so that the split into micro-batches or processes does not
    matter. Multiples of a time by a large number have fractional parts that are spread evenly, whatever its bin.
    """
    phase = mix(images_seen) / 2**64
    return (time < max_time) & ((time.double() * SPREAD + phase) % 1 < fraction)


@dataclass(frozen=True)
class _Choice:
    """The images of a micro-batch that are to be compared, between ``taps`` and ``loss``.

    The choice is copied to the host behind the trunk's back: by the time it is read the forward pass has been queued,
    so the device has work while the host waits, and only the images chosen go through the frozen network.
    """

    batch: AlignmentBatch
    weight: float
    mask: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: AlignmentBatch, weight: float, mask: Tensor) -> _Choice:
        if not mask.is_cuda:
            return cls(batch, weight, mask, None)
        host = mask.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(mask.device))
        return cls(batch, weight, host, arrived)

    def rows(self) -> Tensor:
        """Return the chosen positions in the micro-batch, on its device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.mask.nonzero().squeeze(1).to(self.batch.time.device)


class WithImageDistance(Wrapper):
    """An objective and, besides, ``weight`` times the distance of z0's one-step prediction to z0 at low noise.

    Each image compared adds ``weight`` times its distance to its own denoising loss; the others add nothing, so
    that at a lower fraction there is less of it. The frozen network of ``distance`` is not part of the module.
    """

    def __init__(self, objective: Objective, distance: Distance, config: ImageDistanceConfig) -> None:
        """Raises ConfigError where the weight is no schedule."""
        super().__init__(objective)
        self.config = config
        self.weight = Schedule(config.weight, f"{FIELD}.weight")
        self._distance = (distance,)
        self._choice: _Choice | None = None
        # Sum of the distances and their number since the last report: (2,); None while nothing is to be compared.
        self._seen: Tensor | None = None

    def taps(self, batch: AlignmentBatch) -> Taps:
        """Return the objective's taps, and choose the images to compare."""
        weight = self.weight(batch.images_seen)
        self._choice = None
        if weight and batch.images_seen >= self.config.start * batch.budget:
            mask = choose(batch.time, batch.images_seen, self.config.max_time, self.config.fraction)
            self._choice = _Choice.of(batch, weight, mask)
            # Whatever images are chosen: the step decides, so all processes will have something to report, or none.
            if self._seen is None:
                self._seen = torch.zeros(2, device=batch.time.device)
        return self.objective.taps(batch)

    def loss(self, predict_clean: Callable[[], Tensor]) -> Tensor | None:
        """Return the objective's loss plus the weighted distances, a mean over all images of the micro-batch."""
        total = self.objective.loss(predict_clean)
        choice, self._choice = self._choice, None
        if choice is None:
            return total
        clean = choice.batch.clean
        if total is None:
            total = clean.new_zeros(())
        rows = choice.rows()
        if not len(rows):
            return total
        (distance,) = self._distance
        distances = distance(predict_clean().index_select(0, rows), clean.index_select(0, rows))
        assert self._seen is not None
        self._seen[0] += distances.detach().sum()
        self._seen[1] += len(rows)
        return total + choice.weight * distances.sum() / len(clean)

    def logs(self) -> dict[str, Tensor]:
        """Return the objective's logs and, once it has begun, the mean distance of the images that all processes
        compared since the last call; not a number where there were none. All processes ask together.
        """
        logs = self.objective.logs()
        seen, self._seen = self._seen, None
        if seen is not None:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(seen)
            logs["image_distance"] = seen[0] / seen[1]
        return logs


def load_distance(
    config: ImageDistanceConfig, *, channels: int, image_size: int, tokens: int, device: torch.device
) -> nn.Module | None:
    """Return the ``Distance`` that ``config`` asks for, its weights those of a module, or None where it asks for none.

    Its ``fingerprint`` is a text that changes whenever its network does.

    ``channels`` and ``image_size`` are those of the latents, ``tokens`` the N of the trunk's grid, ``device`` where
    the frozen network runs. Raises ConfigError for latents that are not images and for settings that do not fit,
    CheckpointError for weights that cannot be used.
    """
    if config.kind == "none":
        return None
    if channels != 3:
        raise ConfigError(
            f"{FIELD}.kind '{config.kind}' compares images, but the latents have {channels} channels: train on pixels, "
            f"or set {FIELD}.kind none."
        )
    make = _lpips if config.kind == "lpips" else _encoder_distance
    return make(config, image_size, tokens, device)


def _lpips(config: ImageDistanceConfig, image_size: int, tokens: int, device: torch.device) -> nn.Module:
    from vrpo.vision.perceptual import Lpips

    if config.network_weights is None or config.linear_weights is None:
        missing = "network_weights" if config.network_weights is None else "linear_weights"
        raise ConfigError(f"{FIELD}.kind 'lpips' needs local weights: set {FIELD}.{missing} to their file.")
    network = config.network or "vgg"
    distance = Lpips(config.network_weights, config.linear_weights, network, config.input_size)
    side = config.input_size or image_size
    if side < distance.smallest:
        raise ConfigError(
            f"LPIPS with {network} cannot take images of {side} px: set {FIELD}.input_size to "
            f"{distance.smallest} or more."
        )
    return distance.to(device)


def _encoder_distance(config: ImageDistanceConfig, image_size: int, tokens: int, device: torch.device) -> nn.Module:
    from vrpo.vision.encoders import load_encoder
    from vrpo.vision.perceptual import EncoderDistance, token_features

    if config.network is None:
        raise ConfigError(f"{FIELD}.kind 'encoder' needs a network: set {FIELD}.network to an encoder's name.")
    encoder = load_encoder(
        config.network,
        weights=config.network_weights,
        grid=isqrt(tokens),
        feature=config.feature,
        input_size=config.input_size,
        device=device,
        # A gradient through a whole network is worth float32, and few images are compared.
        dtype=torch.float32,
    )
    distance = EncoderDistance(token_features(encoder), encoder.fingerprint)
    distance.add_module("encoder", encoder)  # which is nobody else's
    return distance
