"""What a trained transformer's tokens hold, by depth and time: CKNNA against an encoder, and linear probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isnan
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vrpo.diffusion.losses import Denoising
from vrpo.diffusion.noise import SampleNoise
from vrpo.errors import EvaluationError
from vrpo.evaluation.cknna import NEIGHBOURS, cknna
from vrpo.evaluation.probe import DECAY, linear_probe
from vrpo.models.taps import Taps
from vrpo.models.transformer import DiffusionTransformer
from vrpo.pixels import to_float
from vrpo.untrusted import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[int, int], None]


class TokenEncoder(Protocol):
    """What CKNNA needs of an encoder; `vrpo.vision.encoders.load_encoder` gives one."""

    def tokens(self, images: Tensor) -> Tensor:
        """Return tokens (B, N, C) of uint8 images (B, 3, H, W)."""


class Rows(Protocol):
    """Images by number, such as a prepared data set."""

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return uint8 images (B, 3, H, W) and labels (B,) or None."""

    def labels(self) -> np.ndarray | None:
        """Return all labels, int64 (N,), or None."""

    def __len__(self) -> int:
        """Return the number of images."""


def clean_pixels(data: Rows, rows: np.ndarray, start: int) -> Tensor:
    """Return rows as pixels in [-1, 1], float32 (B, 3, H, W)."""
    return to_float(data.read(rows)[0])


@dataclass(frozen=True)
class Trunk:
    """A frozen transformer and how its inputs are made: ``clean`` gives z0 (B, C, h, w) of ``rows`` of a data set.

    ``clean`` is also told the place of the first row among those that are looked at.
    """

    network: DiffusionTransformer
    denoising: Denoising
    device: torch.device
    clean: Callable[[Any, np.ndarray, int], Tensor] = clean_pixels

    def features(
        self, data: Rows, rows: np.ndarray, depths: Sequence[int], time: float, *, seed: int, batch_size: int
    ) -> dict[int, Tensor]:
        """Return the mean token (N, D) float32 of each image after each depth, at a time in [0, 1].

        0 is data, 1 noise. The noise of an image depends on the seed and its place in ``rows``, and the class is the
        null class, so that no label leaks into the tokens.
        """
        found: dict[int, list[Tensor]] = {depth: [] for depth in depths}

        def keep(depth: int, tokens: Tensor) -> Tensor:
            found[depth].append(tokens.float().mean(dim=1).cpu())
            return tokens

        taps = Taps(tokens={depth: partial(keep, depth) for depth in depths})
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            clean = self.clean(data, part, start).to(self.device)
            noise = SampleNoise(seed, range(start, start + len(part)), tuple(clean.shape[1:]), self.device).initial()
            t = self._network_time(torch.full((len(part),), time, device=self.device))
            with torch.inference_mode():
                self.network(self.denoising.noised(clean, noise.to(clean), t), t, None, taps)
        return {depth: torch.cat(parts).clone() for depth, parts in found.items()}

    def _network_time(self, t: Tensor) -> Tensor:
        # A step number of DiT, found on the scale of its own unit time.
        last = 1 / float(self.denoising.unit_time(torch.ones(1)))
        return t if last == 1 else (t * last).round()


@dataclass(frozen=True)
class DepthTimeTable:
    """A score for each depth (rows) and time (columns), NaN where it is undefined, and what it depends on besides."""

    kind: str
    depths: tuple[int, ...]
    times: tuple[float, ...]
    values: list[list[float]]
    protocol: dict[str, Any] = field(default_factory=dict)

    def record(self, **fields: Any) -> dict[str, Any]:
        """Return all of it, with further ``fields``, ready for JSON."""
        values = [[None if isnan(value) else value for value in row] for row in self.values]
        table = {"kind": self.kind, "depths": list(self.depths), "times": list(self.times), "values": values}
        return {**fields, **table, "protocol": self.protocol}

    def table(self) -> RenderableType:
        """Return a rich table with what it depends on below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("depth", *(f"t = {time:g}" for time in self.times), title=self.kind)
        for column in table.columns:
            column.justify = "right"
        for depth, row in zip(self.depths, self.values, strict=True):
            table.add_row(str(depth), *(f"{value:.4f}" for value in row))
        text = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in self.protocol.items())
        return Group(table, Text(printable(f"Protocol: {text}")))


def cknna_by_depth(
    trunk: Trunk,
    encoder: TokenEncoder,
    data: Rows,
    *,
    depths: Sequence[int],
    times: Sequence[float],
    count: int,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> DepthTimeTable:
    """Return CKNNA between the trunk's mean tokens and the encoder's, of ``count`` images spread over the data."""
    rows = spread_rows(len(data), count)
    parts = [
        encoder.tokens(data.read(rows[start : start + batch_size])[0].to(trunk.device)).mean(dim=1).cpu()
        for start in range(0, len(rows), batch_size)
    ]
    target = torch.cat(parts)
    columns = []
    for time, features in _over_times(trunk, data, rows, depths, times, seed, batch_size, progress):
        _require_finite(features, time)
        columns.append([cknna(features[depth], target, neighbours) for depth in depths])
    protocol = {"images": len(rows), "neighbours": neighbours, "pooling": "mean over tokens", "class": "null"}
    return DepthTimeTable("CKNNA", tuple(depths), tuple(times), _transposed(columns), {**protocol, "noise_seed": seed})


def probe_by_depth(
    trunk: Trunk,
    train: Rows,
    test: Rows,
    *,
    depths: Sequence[int],
    times: Sequence[float],
    rows: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> DepthTimeTable:
    """Return the accuracy of linear probes of the trunk's mean tokens, fitted to ``train`` and scored on ``test``.

    ``rows`` are the images of each that are used.
    """
    labels = [_labels(data, part) for data, part in zip((train, test), rows, strict=True)]
    columns = []
    steps = 2 * len(times)
    for number, time in enumerate(times):
        found = []
        for side, (data, part) in enumerate(zip((train, test), rows, strict=True)):
            found.append(trunk.features(data, part, depths, time, seed=seed + side, batch_size=batch_size))
            _require_finite(found[-1], time)
            if progress is not None:
                progress(2 * number + side + 1, steps)
        columns.append(
            [linear_probe(found[0][d], labels[0], found[1][d], labels[1], num_classes=num_classes) for d in depths]
        )
    protocol: dict[str, Any] = {"training_images": len(rows[0]), "test_images": len(rows[1]), "weight_decay": DECAY}
    protocol |= {"pooling": "mean over tokens", "class": "null", "noise_seed": seed}
    return DepthTimeTable("Linear probe accuracy", tuple(depths), tuple(times), _transposed(columns), protocol)


def spread_rows(total: int, count: int) -> np.ndarray:
    """Return ``count`` row numbers spread evenly over ``total``, ascending; raises EvaluationError for too many."""
    if count > total:
        raise EvaluationError(f"There are {total:,} images and {count:,} were asked for; ask for fewer.")
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def _over_times(
    trunk: Trunk,
    data: Rows,
    rows: np.ndarray,
    depths: Sequence[int],
    times: Sequence[float],
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> Iterator[tuple[float, dict[int, Tensor]]]:
    for number, time in enumerate(times, start=1):
        yield time, trunk.features(data, rows, depths, time, seed=seed, batch_size=batch_size)
        if progress is not None:
            progress(number, len(times))


def _labels(data: Rows, rows: np.ndarray) -> Tensor:
    labels = data.labels()
    if labels is None:
        raise EvaluationError("A linear probe needs labels and the data has none; prepare it from one folder a class.")
    return torch.from_numpy(labels[rows])


def _require_finite(features: dict[int, Tensor], time: float) -> None:
    for depth, values in features.items():
        if not torch.isfinite(values).all():
            raise EvaluationError(
                f"The tokens after block {depth} are NaN or infinite at t = {time:g}; take an earlier checkpoint."
            )


def _transposed(columns: list[list[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*columns, strict=True)]
