"""A small convolutional encoder, trained on any labelled data set in about a minute."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrpo.errors import CheckpointError, ConfigError, DataError
from vrpo.files import explain_os_error, replacing, sha256_file, write_safetensors
from vrpo.untrusted import parse_json
from vrpo.vision.backbone import HALF, Backbone
from vrpo.vision.rows import ImageRows
from vrpo.vision.weight_files import fit_weights, read_metadata, read_weights

ARCHITECTURE = "vrpo-conv"
METADATA_KEY = "vrpo_encoder"
STRIDE = 4
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 2000
LEAST_IMAGES = 20
MAX_INPUT = 4096
BATCH_SIZE = 128
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.1, 0.05


@dataclass(frozen=True)
class ConvConfig:
    """What is needed to build a ``ConvEncoder`` again: channels, residual blocks, training size."""

    width: int = 64
    blocks: int = 2
    input_size: int = 32
    num_classes: int = 0


@dataclass(frozen=True)
class FitResult:
    """What came of ``fit_encoder``: held-out accuracy (0 to 1), seconds, steps, and the file."""

    accuracy: float
    seconds: float
    steps: int
    path: Path


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection, pre-activation (arXiv 1603.05027)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W) plus its residual."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class ConvEncoder(nn.Module):
    """A residual network whose only map has stride 4, so that semantics and position lie in the same place.

    Images (B, 3, S, S) in [-1, 1] give a map (B, width, S/4, S/4); its mean over positions feeds the
    classifier.
    """

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.config = config
        half = config.width // 2
        self.stem = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.early = ResidualBlock(half)
        self.down = nn.Sequential(
            nn.BatchNorm2d(half),
            nn.SiLU(),
            nn.Conv2d(half, config.width, 3, stride=2, padding=1, bias=False),
        )
        self.late = nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.blocks)))
        self.norm = nn.BatchNorm2d(config.width)
        self.classifier = nn.Linear(config.width, config.num_classes)

    def map(self, images: Tensor) -> Tensor:
        """Return the map before its last activation: of zero mean, so that directions are spread."""
        return self.norm(self.late(self.down(self.early(self.stem(images)))))

    def pooled(self, images: Tensor) -> Tensor:
        """Return the features (B, width) that the classifier sees."""
        return F.silu(self.map(images)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores (B, num_classes)."""
        return self.classifier(self.pooled(images))


class ConvBackbone(Backbone):
    """A fitted ``ConvEncoder`` as a backbone."""

    stride = STRIDE
    feature = "last"
    mean, std = HALF, HALF

    def __init__(self, network: ConvEncoder, weights_hash: str) -> None:
        super().__init__()
        self.name, self.network, self.weights_hash = ARCHITECTURE, network, weights_hash
        self.default_input = network.config.input_size

    def tokens(self, images: Tensor) -> Tensor:
        return self.network.map(images).flatten(2).transpose(1, 2)

    def pooled(self, images: Tensor) -> Tensor:
        return self.network.pooled(images)


def load_conv(weights: str | Path | None, *, feature: int | None = None) -> ConvBackbone:
    """Return the encoder in a file that ``fit_encoder`` wrote.

    Raises:
        CheckpointError: no file is given, or it is another kind of file.
        ConfigError: a feature is asked for; this network has one map only.
    """
    if weights is None or weights == "random":
        raise CheckpointError(
            f"Encoder '{ARCHITECTURE}' has no published weights: fit it with `vrpo encoder fit DATA` and give "
            "that file."
        )
    if feature not in (None, 0, -1):
        raise ConfigError(f"Encoder '{ARCHITECTURE}' has one feature map, so feature {feature} does not exist: use 0.")
    path = Path(weights)
    if not path.is_file():
        raise CheckpointError(
            f"There is no encoder file at {path}: fit one with `vrpo encoder fit DATA` and give its path."
        )
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path} was not written by `vrpo encoder fit`: name its architecture, not '{ARCHITECTURE}'."
        )
    state = read_weights(path)
    network = ConvEncoder(_recorded_config(text, state, path))
    fit_weights(network, state, architecture=ARCHITECTURE, source=path)
    return ConvBackbone(network.eval(), sha256_file(path))


def _recorded_config(text: str, state: Mapping[str, Any], path: Path) -> ConvConfig:
    """Return the configuration in a file's metadata, held to the sizes of its tensors before any is built."""
    try:
        config = ConvConfig(**parse_json(text)["config"])
        sizes = (config.num_classes, config.width)
        fits = all(type(value) is int and value >= 0 for value in vars(config).values())
        fits = fits and tuple(state["classifier.weight"].shape) == sizes
        fits = fits and config.blocks <= len(state) and 0 < config.input_size <= MAX_INPUT
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}): fit the encoder again.") from error
    if not fits:
        raise CheckpointError(f"{path} has metadata that contradict its tensors: fit the encoder again.")
    return config


def fit_encoder(
    dataset: ImageRows,
    out: str | Path,
    *,
    minutes: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    width: int = 64,
    grid: int | None = None,
    flips: bool = False,
    progress: Callable[[str], None] | None = print,
) -> FitResult:
    """Train a ``ConvEncoder`` to classify a labelled data set and write it to ``out`` (safetensors).

    A tenth of the images (2,000 at most, chosen by ``seed``) is held out for the accuracy. Training ends
    after ``minutes``, or after exactly ``steps`` steps of 128 images, which gives the same weights every time
    on one machine.

    Args:
        dataset: labelled images.
        out: the file to write; it appears only when whole.
        minutes: training time, accuracy and writing excluded.
        steps: training steps, in place of minutes.
        seed: of weights, order and augmentation.
        device: where it trains.
        width: channels of the map, C_e.
        grid: the trunk's grid, which sets the training size to 4 pixels a token; None takes it from the image
            size (32 px below 48, else 64).
        flips: whether images are mirrored at random; wrong for digits and letters.
        progress: receives a line of text now and then; None for silence.

    Raises:
        DataError: the data set is unlabelled, has one class only, or fewer than 20 images.
    """
    _check_data(dataset)
    device = torch.device(device)
    default_size = 32 if dataset.image_size < 48 else 64
    size = default_size if grid is None else grid * STRIDE
    config = ConvConfig(width=width, input_size=size, num_classes=dataset.num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConvEncoder(config)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = torch.randperm(len(dataset), generator=generator).numpy()
    held_out = max(1, min(HELD_OUT_MOST, int(len(dataset) * HELD_OUT_SHARE)))
    test_rows, train_rows = np.sort(order[:held_out]), order[held_out:]
    batch_size = min(BATCH_SIZE, len(train_rows))
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    start = reported = time.perf_counter()
    step, done, queue = 0, 0.0, np.empty(0, dtype=np.int64)
    network.train()
    while done < 1:
        if len(queue) < batch_size:
            shuffled = train_rows[torch.randperm(len(train_rows), generator=generator).numpy()]
            queue = np.concatenate([queue, shuffled])
        rows, queue = queue[:batch_size], queue[batch_size:]
        images, labels = _batch(dataset, rows, size, device)
        images = _augment(images, generator, flips)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _schedule(done)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(network(images).float(), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        now = time.perf_counter()
        done = step / steps if steps is not None else (now - start) / (60 * minutes)
        if progress is not None and now - reported > 10:
            reported = now
            progress(f"encoder: {min(done, 1):.0%}, {step} steps, loss {loss.item():.3f}")
    seconds = time.perf_counter() - start
    accuracy = _accuracy(network, dataset, test_rows, size, device)
    if progress is not None:
        progress(
            f"encoder: {accuracy:.1%} of {held_out} held-out images right "
            f"({dataset.num_classes} classes, {step} steps, {seconds:.0f} s)"
        )
    path = Path(out)
    record = {
        "config": asdict(config),
        "accuracy": accuracy,
        "steps": step,
        "seed": seed,
        "dataset": dataset.fingerprint,
    }
    _save(network, path, json.dumps(record, sort_keys=True))
    return FitResult(accuracy=accuracy, seconds=seconds, steps=step, path=path)


def _check_data(dataset: ImageRows) -> None:
    if dataset.num_classes == 0:
        raise DataError("The data set is unlabelled, and fitting an encoder needs classes: use a published encoder.")
    if dataset.num_classes == 1:
        raise DataError("The data set has one class only, and fitting an encoder needs two: use a published encoder.")
    if len(dataset) < LEAST_IMAGES:
        raise DataError(f"The data set has {len(dataset)} images, fitting an encoder needs {LEAST_IMAGES}: add images.")


def _schedule(done: float) -> float:
    """Return the learning rate's factor: linear warm-up, then half a cosine to zero."""
    if done < WARM_UP:
        return 0.05 + 0.95 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def _batch(dataset: ImageRows, rows: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, size, size) in [-1, 1] and their labels."""
    images, labels = dataset.read(rows)
    assert labels is not None  # num_classes says so
    scaled = images.to(device).float() / 127.5 - 1
    if scaled.shape[-1] != size:
        scaled = F.interpolate(scaled, size=(size, size), mode="bicubic", antialias=True)
    return scaled.contiguous(memory_format=torch.channels_last), labels.to(device)


def _augment(images: Tensor, generator: torch.Generator, flips: bool) -> Tensor:
    """Shift each image by up to an eighth of its side, and mirror it half of the time if allowed."""
    side = images.shape[-1]
    reach = side // 8
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    count = len(images)
    down, right = torch.randint(0, 2 * reach + 1, (2, count), generator=generator).to(images.device)
    span = torch.arange(side, device=images.device)
    lines = (down[:, None] + span)[:, None, :, None]
    columns = (right[:, None] + span)[:, None, None, :]
    if flips:
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        columns = torch.where(mirrored[:, None, None, None], columns.flip(-1), columns)
    rows = torch.arange(count, device=images.device)[:, None, None, None]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    return padded[rows, channels, lines, columns].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _accuracy(network: ConvEncoder, dataset: ImageRows, rows: np.ndarray, size: int, device: torch.device) -> float:
    network.eval()
    right = 0
    for start in range(0, len(rows), 256):
        images, labels = _batch(dataset, rows[start : start + 256], size, device)
        right += int((network(images).argmax(dim=1) == labels).sum())
    return right / len(rows)


def _save(network: ConvEncoder, path: Path, record: str) -> None:
    """Write the file beside its place and move it there, so that it is whole or not there."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            write_safetensors(unfinished, state, {METADATA_KEY: record})
    except OSError as error:
        raise DataError(
            f"The encoder could not be written to {path} ({explain_os_error(error)}): choose another place."
        ) from error
