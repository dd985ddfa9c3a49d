"""What a run takes: parameters, operations, memory by part, disk, and time on a machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vrpo.config import RunConfig
from vrpo.errors import ConfigError
from vrpo.models.transformer import SIZES, parse_model_name
from vrpo.planning.flops import autoencoder_flops, trunk_flops
from vrpo.planning.machines import PER_MACHINE
from vrpo.planning.trace import DataShape, EncoderTrace, StepTrace, trace_encoder, trace_step

# Beside what tensors take: the context of the driver, and what the allocator cannot use for their odd sizes.
RESERVE_BYTES, RESERVE_SHARE = 1e9, 0.05
LATENT_CHANNELS = 4
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class DataFacts:
    """The data of a run, prepared or only described; ``flips`` where mirror images have latents of their own.

    ``bytes`` is what prepared data takes on disk, and None where it is only described. Of latents, ``posterior`` says
    whether mean and standard deviation are stored, or one value, and ``autoencoder`` what made them, None if unknown.
    """

    shape: DataShape
    images: int
    flips: bool
    latents: bool
    bytes: int | None = None
    posterior: bool = True
    autoencoder: str | None = "sd-vae-ft-ema"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the highest moment of a step.

    ``objective`` holds the weights and moments of projectors and the like; ``encoders`` their weights,
    those of an image distance and, where that is more than the step needs, what they work in.
    """

    weights: int
    ema: int
    moments: int
    objective: int
    encoders: int
    gradients: int
    activations: int

    @property
    def persistent(self) -> int:
        """What is there throughout."""
        return self.weights + self.ema + self.moments + self.objective + self.encoders

    @property
    def total(self) -> int:
        """All of it."""
        return self.persistent + self.gradients + self.activations

    def fits(self, available: float) -> bool:
        """Return whether it fits into ``available`` bytes beside the driver's own."""
        return self.total * (1 + RESERVE_SHARE) + RESERVE_BYTES <= available


@dataclass(frozen=True)
class Flops:
    """Operations for one image: each counts two for a multiply-add.

    ``trunk_training``, ``objective`` and ``encoders`` are spent on each training image (the encoder's share, where one
    image is noised several times), ``autoencoder_encode`` once in preparing it, ``autoencoder_decode`` on each sample;
    these two are Stable Diffusion's, whichever autoencoder made the latents.
    """

    trunk_forward: int
    trunk_training: int
    objective: int
    encoders: int
    autoencoder_encode: int
    autoencoder_decode: int


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the prepared data, the checkpoints that are kept, and a token cache if one were kept.

    ``latents`` is the share of the data that is trained on; the rest of it is pixels, for encoders.
    """

    data: int
    latents: int
    checkpoints: int
    token_cache: int


@dataclass(frozen=True)
class Plan:
    """What a run takes on each of ``count`` processes, whatever the machine."""

    name: str
    model: str
    objective: str
    precision: str
    budget: int
    batch: int
    count: int
    share: int
    micro: int
    grid: int
    parameters: dict[str, int]
    flops: Flops
    memory: Memory
    disk: Disk
    encoder_names: tuple[str, ...]
    caches_tokens: bool

    def seconds(self, trunk_rate: float, encoder_rate: float) -> float:
        """Return the time of all training steps where each process reaches these rates (FLOP/s)."""
        own = (self.flops.trunk_training + self.flops.objective) / trunk_rate
        aligned = 0 if self.caches_tokens else self.flops.encoders / encoder_rate
        return self.budget * (own + aligned) / self.count

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as nested dictionaries ready for JSON."""
        record = asdict(self)
        record["memory"] |= {"persistent": self.memory.persistent, "total": self.memory.total}
        return record


def make_plan(
    config: RunConfig, data: DataFacts, *, count: int, reduced_encoders: bool, per_machine: int = PER_MACHINE
) -> Plan:
    """Return what the run ``config`` takes on ``count`` processes, ``per_machine`` of them on each machine.

    ``reduced_encoders`` where their precision "auto" is bfloat16.

    Raises:
        ConfigError: batch or processes cannot be divided, or model, data and encoder do not fit.
    """
    train, shape = config.train, data.shape
    share, micro = _share(config, count)
    shards = _shards(config, count, per_machine)
    trunk = trunk_flops(config.model.name, shape.input_size, shape.in_channels)
    grid = shape.input_size // parse_model_name(config.model.name).patch_size
    encoders = [
        trace_encoder(
            encoder,
            grid=grid,
            reduced=reduced_encoders if encoder.precision == "auto" else encoder.precision == "bf16",
        )
        for encoder in config.encoders
    ]
    step = trace_step(config, shape, tuple(encoder.width for encoder in encoders), share=share, micro=micro)
    training = trunk.training(checkpoint_blocks=config.model.checkpoint_blocks)
    encode, decode = autoencoder_flops(shape.image_size) if data.latents else (0, 0)
    return Plan(
        name=config.name,
        model=config.model.name,
        objective=config.align.objective,
        precision=train.precision,
        budget=train.images,
        batch=train.batch_size,
        count=count,
        share=share,
        micro=micro,
        grid=grid,
        parameters={
            "trunk": step.trunk_parameters,
            "objective": step.objective_parameters,
            **{f"encoder {encoder.name}": encoder.parameters for encoder in encoders},
        },
        flops=Flops(
            trunk_forward=trunk.forward,
            trunk_training=training,
            objective=max(0, round(step.flops / share) - training),
            encoders=sum(encoder.flops for encoder in encoders) // train.noisings,
            autoencoder_encode=encode,
            autoencoder_decode=decode,
        ),
        memory=_memory(config, step, encoders, count=count, shards=shards, share=share, micro=micro),
        disk=_disk(config, data, step, encoders, grid),
        encoder_names=tuple(encoder.name for encoder in encoders),
        caches_tokens=all(encoder.cache for encoder in config.encoders),
    )


def _share(config: RunConfig, count: int) -> tuple[int, int]:
    train = config.train
    share = train.batch_size // count
    if train.batch_size % count or share % train.noisings:
        fitting = [n for n in range(1, train.batch_size + 1) if train.batch_size % (n * train.noisings) == 0]
        closest = min(fitting, key=lambda n: abs(n - count))
        raise ConfigError(
            f"--count {count} does not divide train.batch_size {train.batch_size} evenly: use --count {closest}, or "
            "another batch."
        )
    micro = train.micro_batch or share
    return share, min(micro, share)


def _shards(config: RunConfig, count: int, per_machine: int) -> int:
    """Return among how many processes one copy of the weights is divided."""
    train = config.train
    if train.parallel == "ddp":
        return 1
    if train.parallel == "fsdp":
        return count
    size = train.shard_size or min(count, per_machine)
    if count % size:
        key = f"train.shard_size {size}" if train.shard_size else f"--per-machine {size}"
        closest = max(n for n in range(1, size + 1) if count % n == 0)
        raise ConfigError(f"{key} does not divide --count {count} into equal groups: use {closest}, or another count.")
    return size


def _memory(
    config: RunConfig,
    step: StepTrace,
    encoders: list[EncoderTrace],
    *,
    count: int,
    shards: int,
    share: int,
    micro: int,
) -> Memory:
    images, parallel = share // config.train.noisings, config.train.parallel
    trunk_gradients, other_gradients = FLOAT * step.trunk_parameters, FLOAT * step.objective_parameters
    gradients, activations = step.gradients_at_peak, step.peak - step.gradients_at_peak
    if count > 1:
        activations = step.peak_beside_gradients
        if parallel == "ddp":
            # Gradients that several processes exchange live in buckets of their own throughout.
            gradients = trunk_gradients + other_gradients
        else:
            # Gradients meet in the last of several passes; until then each process keeps its own, whole.
            gradients = trunk_gradients // (1 if micro < share else shards) + other_gradients
            # A block that runs is whole, and so are the next one's weights and its own gradient.
            activations += 3 * step.trunk_bytes // SIZES[parse_model_name(config.model.name).size].depth
    working = max((images * encoder.working_bytes for encoder in encoders), default=0)
    beyond = max(0, working - activations - (0 if count > 1 else gradients))
    return Memory(
        weights=step.trunk_bytes // shards,
        ema=step.trunk_bytes // shards,
        moments=2 * FLOAT * step.trunk_parameters // shards,
        objective=step.objective_bytes + 2 * FLOAT * step.objective_parameters,
        encoders=sum(encoder.bytes for encoder in encoders) + step.distance_bytes + beyond,
        gradients=gradients,
        activations=activations,
    )


def _disk(config: RunConfig, data: DataFacts, step: StepTrace, encoders: list[EncoderTrace], grid: int) -> Disk:
    shape, views = data.shape, 2 if data.flips else 1
    row = HALF * (2 if data.posterior else 1) * shape.in_channels * shape.input_size**2
    latents = data.images * views * row if data.latents else 0
    described = data.images * 3 * shape.image_size**2 + latents
    moments = 2 * FLOAT * (step.trunk_parameters + step.objective_parameters)
    checkpoint = FLOAT * 2 * step.trunk_parameters + step.objective_bytes + moments
    tokens = sum(2 * grid**2 * encoder.width for encoder in encoders)
    train = config.train
    saved = -(-train.images // train.checkpoint_every) if train.checkpoint_every else 1
    lasting = train.images // train.keep_every if train.keep_every else 0
    return Disk(
        data=described if data.bytes is None else data.bytes,
        latents=latents,
        checkpoints=min(saved, train.keep_checkpoints + lasting) * checkpoint,
        token_cache=data.images * views * tokens,
    )
