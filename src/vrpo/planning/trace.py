"""A training step on shapes alone: what it computes and keeps is counted, and nothing is computed or kept.

Torch's fake tensors have sizes and types but no values, so a step of the largest model is followed in seconds,
operation by operation, by the very code that trains. The counts are therefore right for every objective and option.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.alignment.image_distance import load_distance
from vrpo.alignment.objective import Objective, TargetBatch
from vrpo.alignment.scaffold import WithScaffold
from vrpo.config import EncoderConfig, RunConfig
from vrpo.devices import DTYPES
from vrpo.models.transformer import DiffusionTransformer, build_transformer, parse_model_name
from vrpo.planning.live_bytes import LiveBytes, storages
from vrpo.sampling import build_denoising
from vrpo.training.step import DenoisingStep, draw_step
from vrpo.vision.catalogue import ENCODERS
from vrpo.vision.encoders import CONV_NAME, Encoder, load_backbone, load_encoder


class _ShapesOnly(FakeTensorMode):
    """Shapes alone; of a mask's entries the share ``true`` counts as true."""

    def __init__(self, true: float = 1.0) -> None:
        # A frozen network that was loaded outside stands for its shapes.
        super().__init__(allow_non_fake_inputs=True)
        self.true = true

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        if func is torch.ops.aten.nonzero.default:
            (mask,) = args
            return torch.empty(ceil(self.true * mask.numel()), mask.ndim, dtype=torch.int64, device=mask.device)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ShapesOnly:
        return self  # a copied network belongs to the same mode


@dataclass(frozen=True)
class DataShape:
    """What a run is trained on: images in pixels, the trunk's input (C, H, W), classes, and whether it has labels."""

    image_size: int
    input_size: int
    in_channels: int
    num_classes: int


@dataclass(frozen=True)
class StepTrace:
    """Counts of one process's share of a step.

    ``flops`` is of the whole share; the peaks are in bytes beside weights, buffers and moments. ``peak`` includes
    ``gradients_at_peak``; ``peak_beside_gradients`` is the most that all but gradients takes at any time.
    """

    flops: int
    peak: int
    gradients_at_peak: int
    peak_beside_gradients: int
    trunk_parameters: int
    objective_parameters: int
    trunk_bytes: int
    objective_bytes: int
    distance_bytes: int


@dataclass(frozen=True)
class EncoderTrace:
    """Counts of one encoder: channels, weights, and for one image its operations and the bytes that it works in."""

    name: str
    width: int
    input_size: int
    parameters: int
    bytes: int
    flops: int
    working_bytes: int


class _PeakBytes(LiveBytes):
    """Live bytes, with the gradients among them told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = self.gradients_at_peak = self.peak_beside_gradients = 0
        self._highest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.live - self.gradients)
        if self.peak > self._highest:
            self._highest, self.gradients_at_peak = self.peak, self.gradients
        return output

    def watch(self, parameters: Iterator[nn.Parameter], collect: Callable[[], Any]) -> None:
        """Count the gradients of ``parameters`` as they come, and call ``collect`` each time."""

        def arrived(parameter: Tensor) -> None:
            collect()
            if parameter.grad is not None and parameter not in seen:
                seen.add(parameter)
                self.gradients += parameter.grad.nbytes

        seen: set[Tensor] = set()
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(arrived)


def trace_step(
    config: RunConfig, shape: DataShape, encoder_widths: tuple[int, ...], *, share: int, micro: int
) -> StepTrace:
    """Follow a step of ``share`` noised images, ``micro`` at a time, in one of several processes or the only one."""
    distance = random_distance(config, shape, torch.device("cpu"))
    compared = config.align.perceptual_image
    with _ShapesOnly(compared.max_time * compared.fraction), warnings.catch_warnings():
        # Copying a network asks whether its tensors have memory; these have none.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        trunk, objective = build_networks(config, shape, encoder_widths, distance)
        for part in objective.modules():
            if isinstance(part, WithScaffold):
                part.begin()
        module = DenoisingStep(trunk, objective, build_denoising(trunk.kind, config.diffusion), precision_of(config))
        count = flop_counter()
        with _PeakBytes() as live, count, _prompt_collection(config.model.checkpoint_blocks) as collect:
            live.watch(module.parameters(), collect)
            run_step(module, config, shape, encoder_widths, share=share, micro=micro, device=torch.device("cpu"))
        return StepTrace(
            flops=count.get_total_flops(),
            peak=live.peak,
            gradients_at_peak=live.gradients_at_peak,
            peak_beside_gradients=live.peak_beside_gradients,
            trunk_parameters=_trainable(trunk),
            objective_parameters=_trainable(objective),
            trunk_bytes=_bytes(trunk),
            objective_bytes=_bytes(objective),
            distance_bytes=0 if distance is None else _bytes(distance),
        )


def build_networks(
    config: RunConfig, shape: DataShape, encoder_widths: tuple[int, ...], distance: nn.Module | None
) -> tuple[DiffusionTransformer, Objective]:
    """Return the trunk and the objective of a run on data of that shape, with ``random_distance``'s distance.

    The distance is there from the beginning, so that it is counted together with what ends early.
    """
    trunk = build_transformer(
        config.model.name,
        input_size=shape.input_size,
        in_channels=shape.in_channels,
        num_classes=shape.num_classes,
        qk_norm=config.model.qk_norm,
        checkpoint_blocks=config.model.checkpoint_blocks,
    ).train()
    if config.align.uses_token:
        trunk.add_token(encoder_widths[0])
    # Keys and values of a vision transformer are as wide as its tokens, all heads together.
    key_value_widths = (encoder_widths[0], encoder_widths[0]) if config.align.supply != "none" else (0, 0)
    shape_of_trunk = TrunkShape.of(trunk, config.model.name)
    always = config.align.perceptual_image.model_copy(update={"start": 0.0, "weight": 1.0})
    align = config.align.model_copy(update={"perceptual_image": always})
    return trunk, build_objective(align, shape_of_trunk, encoder_widths, key_value_widths, distance)


def random_distance(config: RunConfig, shape: DataShape, device: torch.device) -> nn.Module | None:
    """Return the image distance of a run with weights of no meaning, or None where it has none.

    Raises:
        ConfigError: as ``load_distance``.
    """
    settings = config.align.perceptual_image
    patch_size = parse_model_name(config.model.name).patch_size
    own = settings.kind == "encoder" and settings.network == CONV_NAME  # whose file says what it is
    weights = settings.network_weights if own else "random"
    return load_distance(
        settings.model_copy(update={"network_weights": weights, "linear_weights": "random"}),
        channels=shape.in_channels,
        image_size=shape.input_size,
        tokens=(shape.input_size // patch_size) ** 2,
        device=device,
    )


def precision_of(config: RunConfig) -> torch.dtype:
    """Return the autocast precision of the trunk."""
    return DTYPES[config.train.precision]


def run_step(
    module: DenoisingStep,
    config: RunConfig,
    shape: DataShape,
    encoder_widths: tuple[int, ...],
    *,
    share: int,
    micro: int,
    device: torch.device,
    targets_of: Callable[[Tensor], TargetBatch] | None = None,
) -> None:
    """Run the forward and backward passes of one step on random images, as the trainer does.

    ``targets_of`` computes the encoders' tokens of uint8 images; None stands for tokens at random.
    """
    noisings = config.train.noisings
    images, tokens = share // noisings, module.trunk.num_tokens
    pixels = torch.zeros(images, 3, shape.image_size, shape.image_size, dtype=torch.uint8, device=device)
    clean = torch.randn(images, shape.in_channels, shape.input_size, shape.input_size, device=device)
    labels = torch.zeros(images, dtype=torch.int64, device=device) if shape.num_classes else None
    if targets_of is None:
        found = [torch.randn(images, tokens, width, device=device) for width in encoder_widths]
        targets = targets_like(tuple(found), config)
    else:
        targets = targets_of(pixels)
    draws = draw_step(
        0,
        0,
        count=share,
        shape=(shape.in_channels, shape.input_size, shape.input_size),
        noisings=noisings,
        label_dropout=config.model.label_dropout,
        device=device,
        token_width=module.trunk.token_width,
        pairing=config.align.token.pairing if module.trunk.token_width else "none",
    )

    ends_early = config.align.side == "haste" or config.align.supply != "none"

    def repeated(x: Tensor) -> Tensor:
        return x[rows].repeat_interleave(noisings, 0) if noisings > 1 else x[rows]

    for start in range(0, share, micro):
        rows = slice(start // noisings, (start + micro) // noisings)
        output = module(
            repeated(clean),
            None if labels is None else repeated(labels),
            draws.part(start, start + micro),
            targets.map(repeated),
            repeated(pixels) if targets.tokens else None,
            # HASTE and scaffolds act from the start and end later; VRPO's own share begins after a warm-up.
            images_seen=0 if ends_early else config.train.images // 2,
            budget=config.train.images,
            sample_weight=torch.ones((), device=device) / share,
        )
        output.loss.backward()
        del output


def targets_like(tokens: tuple[Tensor, ...], config: RunConfig) -> TargetBatch:
    """Return what an objective reads of the encoders, in shapes: keys, values and class tokens are made of tokens."""
    attended = tokens if config.align.supply != "none" else ()
    classes = tuple(token.mean(1) for token in tokens) if config.align.uses_token else ()
    return TargetBatch(tokens, keys=attended, values=attended, class_tokens=classes)


def trace_encoder(config: EncoderConfig, *, grid: int, reduced: bool) -> EncoderTrace:
    """Follow one encoder over one image; ``reduced`` for bfloat16.

    Networks with a short name are followed on shapes alone; others are built, with random weights where they are not
    ``vrpo-conv``, whose file says what it is.

    Raises:
        ConfigError, CheckpointError: as ``load_encoder``.
    """
    alone = config.name in ENCODERS
    if alone:
        with torch.device("meta"):
            backbone = load_backbone(config.name, weights="random", feature=config.feature)
        size = config.input_size or grid * backbone.stride
    else:
        encoder = random_encoder(config, grid=grid, device=torch.device("cpu"), dtype=torch.float32)
        backbone, size = encoder.backbone, encoder.input_size
    with _ShapesOnly() if alone else nullcontext(), torch.no_grad():
        if alone:
            _enter_mode(backbone)
        count = flop_counter()
        with LiveBytes() as live, count, torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            tokens = backbone.tokens(torch.zeros(1, 3, size, size))
        return EncoderTrace(
            name=config.name,
            width=tokens.shape[-1],
            input_size=size,
            parameters=sum(parameter.numel() for parameter in backbone.parameters()),
            bytes=_bytes(backbone),
            flops=count.get_total_flops(),
            working_bytes=live.peak,
        )


def random_encoder(config: EncoderConfig, *, grid: int, device: torch.device, dtype: torch.dtype) -> Encoder:
    """Return the encoder of a run with weights of no meaning, which none need be fetched for."""
    return load_encoder(
        config.name,
        weights=config.weights if config.name == CONV_NAME else "random",
        grid=grid,
        feature=config.feature,
        input_size=config.input_size,
        device=device,
        dtype=dtype,
        allow_resample=config.resample,
    )


@contextmanager
def _prompt_collection(needed: bool) -> Iterator[Callable[[], Any]]:
    """Yield what frees the recomputed tensors of a checkpointed block.

    Real ones are freed as soon as they are used; fake ones are held in reference cycles until Python looks for those.
    What there was before is set aside, so that looking is quick.
    """
    if not needed:
        yield lambda: None
        return
    gc.collect()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()


def _enter_mode(network: nn.Module) -> None:
    """Replace the tensors of a network on the meta device by those of the mode that is on."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def flop_counter() -> FlopCounterMode:
    """Return a counter that also knows attention on a CPU, which torch's own does not."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        },
    )


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _bytes(module: nn.Module) -> int:
    found = storages([*module.parameters(), *module.buffers()])
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())
