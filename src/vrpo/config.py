"""The configuration of a run: one typed tree, unknown keys refused, every field documented."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from tyro.constructors import PrimitiveConstructorSpec

_SUFFIXES = {"k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def parse_count(value: Any) -> Any:
    """Read a count such as 512, "2M" or "1.5k"; other types are left for pydantic to refuse.

    Raises:
        ValueError: text that is no whole number.
    """
    if isinstance(value, str):
        text = value.strip().replace("_", "").replace(",", "")
        scale = _SUFFIXES.get(text[-1:], _SUFFIXES.get(text[-1:].upper(), 1) if text[-1:] in "mb" else 1)
        digits = text[:-1] if scale != 1 else text
        try:
            # A float first: it bounds what an exponent can ask of the exact fraction.
            number = Fraction(digits) * scale if math.isfinite(float(digits)) else None
        except ValueError:
            number = None
        if number is None or number.denominator != 1:
            raise ValueError("write a count such as 50000, 50k or 2M")
        return number.numerator
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | str) else value


def _count_from_words(words: list[str]) -> int:
    return parse_count(words[0])


Count = Annotated[
    int,
    BeforeValidator(parse_count),
    Field(ge=0),
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=_count_from_words,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Moment = Annotated[float, Field(ge=0, lt=1)]


Pairing = Literal["none", "time", "noise"]


class Section(BaseModel):
    """Base of every part of the tree."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


class DataConfig(Section):
    """What is trained on: folders made by `vrpo prepare`."""

    path: Path | None = Field(None, description="Prepared data set to train on.")
    validation: Path | None = Field(None, description="Prepared data set for the held-out loss and as reference.")
    flip: bool | None = Field(None, description="Mirror at random; None: as prepared.")
    conditional: bool = Field(True, description="Train with class labels; False ignores them.")
    verify: bool = Field(True, description="Compare every byte with its hash before training.")
    prefetch: int = Field(4, ge=1, description="Batches prepared ahead of the trainer.")
    image_size: int | None = Field(None, ge=1, description="Side that the images must have; None: any.")
    latent_size: int | None = Field(None, ge=1, description="Side that the latents must have; None: any, or pixels.")


class ModelConfig(Section):
    """The transformer. Input size, channels and classes come from the data."""

    name: str = Field("SiT-S/4", description="KIND-SIZE/PATCH: SiT or DiT; N, Ti, S, B, L, XL; patch 1, 2, 4, 8.")
    qk_norm: bool = Field(False, description="Normalise queries and keys.")
    label_dropout: float = Field(0.1, ge=0, le=1, description="Share of labels replaced by the null class.")
    checkpoint_blocks: bool = Field(False, description="Recompute block activations in the backward pass.")


class DiffusionConfig(Section):
    """The noising path of SiT; DiT always uses its discrete schedule of 1,000 steps."""

    path: Literal["linear", "cosine", "vp"] = Field("linear", description="Interpolant between data and noise.")
    time: Literal["uniform", "logit-normal"] = Field("uniform", description="Distribution of training times.")
    logit_mean: float = Field(0.0, description="Mean of the logit-normal time distribution.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of the logit-normal time distribution.")


class EncoderConfig(Section):
    """A frozen encoder whose tokens are the alignment targets."""

    name: str = Field(
        "dinov2-vit-b",
        description="Short name (docs/encoders.md), timm name, transformers:NAME_OR_PATH, folder, or vrpo-conv.",
    )
    weights: str | None = Field(None, description="Local weights file; None: the library's own; 'random'.")
    feature: int | None = Field(None, description="Feature map of a convolutional network (index, may be < 0).")
    input_size: int | None = Field(None, ge=8, description="Side its input is resized to; None: fits the grid.")
    resample: bool = Field(True, description="Allow bicubic resampling of its token grid where no size fits.")
    center: bool | None = Field(None, description="Subtract the mean token; None: for convolutional networks only.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 else.")
    cache: bool = Field(False, description="Compute all tokens once and store them beside the data (fp16).")
    cache_limit: float = Field(10.0, gt=0, description="GiB of tokens that are written without another word.")


class HasteConfig(Section):
    """HASTE (arXiv 2505.16792): attention alignment, and an end to all alignment."""

    attention_weight: float = Field(0.5, ge=0, description="Weight of the attention-map alignment.")
    attention_depths: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="Blocks whose attention is aligned; empty: the two up to the alignment depth."
    )
    stop: Literal["fixed", "trigger"] = Field("fixed", description="End at a count of images or by the trigger.")
    stop_images: Count = Field(0, description="Images after which alignment ends; 0: 40% of the budget.")
    trigger_cosine: float = Field(0.0, ge=-1, le=1, description="End when the running gradient cosine falls below.")


class VrpoConfig(Section):
    """VRPO: the policy, its rewards and its trust region (docs/method.md)."""

    mode: Literal["analytic", "sampled"] = Field("analytic", description="Closed form, or sampled actions.")
    base: Literal["repa", "irepa"] = Field("repa", description="Whose projector and targets are used.")
    basis: Literal["informed", "isotropic"] = Field("informed", description="Directions that actions explore.")
    group: int = Field(8, ge=2, description="Actions a token (G), in antithetic pairs.")
    random_directions: int = Field(2, ge=0, description="Random tangent directions added to the informed basis.")
    radius: float = Field(0.3, gt=0, description="Exploration radius s; kappa = 1/s^2.")
    adapt_radius: bool = Field(True, description="Keep std(log rho) between 0.1 and 0.3 by adapting s.")
    semantic: float | dict[str, float] = Field(1.0, description="Weight of the semantic reward.")
    relational: float | dict[str, float] = Field(0.5, description="Weight of the relational reward.")
    fidelity: float | dict[str, float] = Field(1.0, description="Weight of the fidelity reward.")
    perceptual: float | dict[str, float] = Field(0.25, description="Weight of the perceptual reward.")
    rewards: dict[str, float | dict[str, float]] = Field(
        {}, description="Weights of further registered rewards, by name."
    )
    advantage: Literal["agreement", "sum", "per-reward", "centred"] = Field(
        "agreement", description="Group-relative normaliser."
    )
    sigma0: float = Field(0.25, ge=0, description="Floor of the advantage's denominator.")
    clip_low: float = Field(0.2, ge=0, le=1, description="Ratio clip below one.")
    clip_high: float = Field(0.28, ge=0, description="Ratio clip above one.")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the budget over which alpha goes from 1 to 0.")
    alpha_end: float = Field(0.0, ge=0, le=1, description="Share of REPA that stays after the warm-up.")
    trust: float = Field(0.05, ge=0, description="beta, weight of the trust region to the old policy.")
    old_decay: float = Field(0.99, ge=0, lt=1, description="EMA of the old policy's projector.")
    gate: bool = Field(True, description="Turn alignment down where it disagrees with denoising, by time bin.")
    gate_scale: float = Field(0.1, gt=0, description="c0: agreement at which the gate begins to close.")
    gate_floor: float = Field(0.1, ge=0, le=1, description="The gate's smallest value.")
    time_bins: int = Field(10, ge=1, description="Bins of time for statistics and gate.")
    shuffle_advantages: bool = Field(False, description="Ablation: permute advantages within the group.")
    noise_preferences: bool = Field(False, description="Ablation: random directions in place of preferences.")


class ImageDistanceConfig(Section):
    """A perceptual distance of the one-step prediction of an image to the image, added to the denoising loss."""

    kind: Literal["none", "lpips", "encoder"] = Field(
        "none", description="Off, LPIPS, or one minus the cosine between a frozen encoder's tokens."
    )
    network: str | None = Field(None, description="lpips: alex or vgg (None: vgg); encoder: as encoder.name.")
    network_weights: str | None = Field(None, description="Its local weights file; encoder: as encoder.weights.")
    linear_weights: str | None = Field(None, description="lpips: local file of its linear weights.")
    feature: int | None = Field(None, description="encoder: as encoder.feature.")
    input_size: int | None = Field(
        None, ge=8, description="Side images are resized to; None: lpips as they are, encoder to fit the trunk's grid."
    )
    weight: float | dict[str, float] = Field(
        0.1, description="Weight of an image's distance beside its denoising loss, or points over images seen."
    )
    start: float = Field(0.5, ge=0, le=1, description="Share of the budget before which it is off.")
    max_time: float = Field(0.3, gt=0, le=1, description="Time (0 data, 1 noise) below which images are compared.")
    fraction: float = Field(0.125, gt=0, le=1, description="Share of those images that are compared.")


class TokenConfig(Section):
    """A representation token: the encoder's class token, denoised with the image (REG, arXiv 2507.01467)."""

    use: bool | None = Field(None, description="Train and sample it; None: with objective reg.")
    weight: float = Field(0.03, ge=0, description="Weight of its velocity loss beside the image's.")
    tau: float | None = Field(
        None, gt=0, description="Temperature of weights by the image's fidelity among its noisings; None: all equal."
    )
    clip: float = Field(4.0, ge=1, description="Largest exp(A/tau).")
    sigma0: float = Field(0.25, gt=0, description="Floor of the advantage's denominator.")
    pair: Literal["auto", "none", "time", "noise"] = Field(
        "auto",
        description="What an image's noisings share: time, or time and image noise; auto: time where tau is set.",
    )

    @property
    def pairing(self) -> Pairing:
        """What an image's noisings share."""
        if self.pair == "auto":
            return "none" if self.tau is None else "time"
        return self.pair


class ScaffoldConfig(Section):
    """A block that attends to the encoder's keys and values first and to its own later (REPI; docs/method.md)."""

    supply: Literal["auto", "none", "clock", "advantage"] = Field(
        "auto",
        description="Until when the encoder supplies: clock, or while its advantage grows; auto: clock for repi.",
    )
    depth: int = Field(0, ge=0, description="The block, from 1; 0: half the alignment depth.")
    steps: Count = Field(0, description="clock: optimiser steps until the block is on its own; 0: by share.")
    share: float = Field(0.3, gt=0, le=1, description="clock: share of the budget until the block is on its own.")
    weight: float = Field(2.0, ge=0, description="Weight of the internalisation loss.")
    internalise: Literal["after", "always"] = Field(
        "after", description="When the block's own keys and values are pulled: once they are used (REPI), or always."
    )
    time_bins: int = Field(10, ge=1, description="advantage: bins of time that change hands one by one.")
    fraction: float = Field(0.0625, gt=0, le=1, description="advantage: share of the images that try both suppliers.")
    growth: float = Field(0.05, ge=0, description="advantage: growth since it last grew, as a share, that counts.")
    patience: int = Field(5, ge=1, description="advantage: looks in a row without growth before a bin changes hands.")
    earliest: float = Field(0.05, ge=0, le=1, description="advantage: share of the budget before which none does.")
    latest: float = Field(0.5, gt=0, le=1, description="advantage: share of the budget after which all have.")


class AlignConfig(Section):
    """The alignment objective: a side head, and what takes part in generation beside it."""

    objective: Literal["none", "repa", "irepa", "contrastive", "haste", "vrpo", "repi", "reg"] = Field(
        "repa", description="What is added to denoising; repi: repa and a scaffold; reg: repa and a token."
    )
    weight: float = Field(0.5, ge=0, description="lambda, weight of the alignment term.")
    depth: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="Blocks after which tokens are aligned; empty: 8 for L and XL, 4 for S and B, a third else."
    )
    projector_width: int = Field(2048, ge=1, description="Hidden width of the MLP projector.")
    gamma: float = Field(0.6, ge=0, le=1, description="irepa: share of the mean token that is subtracted.")
    temperature: float = Field(0.07, gt=0, description="contrastive: softmax temperature.")
    haste: HasteConfig = HasteConfig()
    vrpo: VrpoConfig = VrpoConfig()
    perceptual_image: ImageDistanceConfig = ImageDistanceConfig()
    scaffold: ScaffoldConfig = ScaffoldConfig()
    token: TokenConfig = TokenConfig()

    @property
    def side(self) -> str:
        """The objective of the side head: that of repi and reg is repa."""
        return {"repi": "repa", "reg": "repa"}.get(self.objective, self.objective)

    @property
    def supply(self) -> str:
        """Who decides how long the encoder supplies keys and values: "none", "clock" or "advantage"."""
        if self.scaffold.supply == "auto":
            return "clock" if self.objective == "repi" else "none"
        return self.scaffold.supply

    @property
    def uses_token(self) -> bool:
        """Whether the model has a representation token."""
        return self.objective == "reg" if self.token.use is None else self.token.use


class TrainConfig(Section):
    """The loop. Everything periodic is counted in images; 0 means never."""

    images: Count = Field(2_000_000, gt=0, description="Budget: images to train on.")
    batch_size: int = Field(256, ge=1, description="Images a step, over all processes.")
    micro_batch: int = Field(0, ge=0, description="Images a forward pass; 0: the whole step at once.")
    noisings: int = Field(1, ge=1, description="Noise levels drawn for each image of the batch.")
    lr: float = Field(1e-4, gt=0, description="AdamW learning rate.")
    lr_warmup: Count = Field(0, description="Images over which the learning rate rises from zero.")
    betas: tuple[Moment, Moment] = Field((0.9, 0.999), description="AdamW moments.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    clip: float = Field(1.0, ge=0, description="Gradient norm limit; 0: none.")
    ema: float = Field(0.9999, ge=0, lt=1, description="Decay of the averaged weights, warmed up.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Autocast precision of the trunk.")
    compile: bool = Field(False, description="Compile each block.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    parallel: Literal["ddp", "fsdp", "hybrid"] = Field(
        "ddp", description="Weights of several processes: a copy each, shards, or shards within each machine."
    )
    shard_size: int = Field(0, ge=0, description="Processes to a sharded copy when hybrid; 0: those of one machine.")
    deterministic: bool = Field(False, description="Repeat to the bit on a GPU too, by slower kernels where need be.")
    log_every: Count = Field(0, description="Images between telemetry records; 0: 50 steps.")
    validate_every: Count = Field(0, description="Images between held-out losses.")
    validation_images: Count = Field(1024, gt=0, description="Held-out images scored each time.")
    sample_every: Count = Field(0, description="Images between sample grids.")
    evaluate_every: Count = Field(0, description="Images between small evaluations of samples.")
    checkpoint_every: Count = Field(0, description="Images between checkpoints; 0: at the end only.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_every: Count = Field(0, description="Images between checkpoints that are kept for good.")
    stop_after_bad: int = Field(20, ge=1, description="Non-finite steps in a row that end the run.")


class SampleConfig(Section):
    """How samples are drawn during training, and by default afterwards."""

    sampler: Literal["ode-euler", "ode-heun", "sde", "ddpm", "ddim"] = Field("ode-euler", description="Integrator.")
    steps: int = Field(50, ge=1, description="Integration steps.")
    guidance_scale: float = Field(1.0, ge=0, description="1: no guidance.")
    guidance_interval: tuple[float, float] = Field((0.0, 1.0), description="Times in which guidance acts.")
    guidance_channels: int | None = Field(
        None, ge=1, description="Channels, from the first, that guidance acts on; None: all. DiT's and SiT's code: 3."
    )
    rows: int = Field(8, ge=1, description="Rows of a grid.")
    columns: int = Field(8, ge=1, description="Columns of a grid.")
    batch_size: int = Field(256, ge=1, description="Images that vrpo sample saves at once; no image depends on it.")
    compute_batch: int = Field(
        0, ge=0, description="Images the network sees at once, which rounding depends on; 0: as suits the device."
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="Autocast precision of sampling; None: train.precision."
    )
    decoder: str | None = Field(None, description="Where the autoencoder of the latents lies; None: as in the data.")
    any_decoder: bool = Field(False, description="Decode with that autoencoder even if it made other latents.")


class EvaluateConfig(Section):
    """The small evaluation during training."""

    features: str | None = Field(None, description="Feature network; None: no evaluation of samples.")
    weights: str | None = Field(None, description="Its local weights file.")
    input_size: int | None = Field(None, ge=8, description="Side its input is resized to; None: its own.")
    reference: Literal["training", "validation"] = Field("training", description="What samples are scored against.")
    samples: Count = Field(2_000, gt=1, description="Samples drawn.")
    labels: Literal["balanced", "random"] = Field("balanced", description="Class labels of the samples.")
    metrics: Annotated[
        tuple[Literal["fd", "sfid", "is", "kid", "precision", "recall"], ...], BeforeValidator(_as_tuple)
    ] = Field(
        ("fd", "kid", "precision", "recall"), min_length=1, description="What is computed; sfid, is: inception only."
    )


class RunConfig(Section):
    """A run, whole."""

    name: str = Field("run", description="Name shown in reports.")
    seed: Seed = Field(0, description="Seed of order, noise, times, labels and initial weights.")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    encoder: EncoderConfig = EncoderConfig()
    more_encoders: tuple[EncoderConfig, ...] = Field((), description="Further encoders (in a file only).")
    align: AlignConfig = AlignConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """The encoders the objective needs: none for plain denoising."""
        needed = self.align.side != "none" or self.align.uses_token or self.align.supply != "none"
        return (self.encoder, *self.more_encoders) if needed else ()

    def with_absolute_paths(self) -> RunConfig:
        """Return the same configuration with every folder and file as an absolute path, valid from anywhere."""
        data, evaluate, image = self.data, self.evaluate, self.align.perceptual_image
        image_paths = {
            "network_weights": _absolute_weights(image.network_weights),
            "linear_weights": _absolute_weights(image.linear_weights),
            "network": _absolute_network(image.network) if image.kind == "encoder" else image.network,
        }
        decoder = self.sample.decoder
        if decoder is not None and Path(decoder).expanduser().is_dir():
            decoder = str(Path(decoder).expanduser().absolute())
        align = self.align.model_copy(update={"perceptual_image": image.model_copy(update=image_paths)})
        return self.model_copy(
            update={
                "data": data.model_copy(
                    update={
                        "path": data.path and data.path.expanduser().absolute(),
                        "validation": data.validation and data.validation.expanduser().absolute(),
                    }
                ),
                "encoder": _absolute_encoder(self.encoder),
                "more_encoders": tuple(_absolute_encoder(encoder) for encoder in self.more_encoders),
                "align": align,
                "sample": self.sample.model_copy(update={"decoder": decoder}),
                "evaluate": evaluate.model_copy(
                    update={
                        "features": _absolute_network(evaluate.features),
                        "weights": _absolute_weights(evaluate.weights),
                    }
                ),
            }
        )


def _absolute_encoder(encoder: EncoderConfig) -> EncoderConfig:
    paths = {"name": _absolute_network(encoder.name), "weights": _absolute_weights(encoder.weights)}
    return encoder.model_copy(update=paths)


def _absolute_weights(weights: str | None) -> str | None:
    return weights if weights in (None, "random") else str(Path(weights).expanduser().absolute())


def _absolute_network(name: str | None) -> str | None:
    """Make a network's name absolute where it is a folder of the transformers library; other names stay."""
    if name is None:
        return None
    prefix = "transformers:" if name.startswith("transformers:") else ""
    folder = Path(name.removeprefix(prefix)).expanduser()
    is_folder = folder.is_dir() if prefix else (folder / "config.json").is_file()
    return f"{prefix}{folder.absolute()}" if is_folder else name
