"""Frozen encoders: images to tokens on the trunk's grid, and images to one feature vector each."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrpo.errors import ConfigError
from vrpo.vision import inception
from vrpo.vision.backbone import Backbone, EncoderOutput

CONV_NAME = "vrpo-conv"
# The network that the field's FD-DINOv2 is computed in (arXiv 2306.04675).
_FEATURE_NAMES = {"dinov2": "dinov2-vit-l"}

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)


class FeatureNetwork(nn.Module):
    """A frozen network that turns an image into one feature vector.

    Attributes: ``name``, ``family``, ``input_size`` (pixels), ``weights_hash`` (SHA-256).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, *, input_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = backbone
        self.name, self.family = backbone.name, backbone.family
        self.weights_hash = backbone.weights_hash
        self.input_size = input_size
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.to(device)
        if not backbone.patches:
            # depthwise convolutions are nearly twice as fast with channels last on a CPU
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the features do: name, weights, input size."""
        return f"{self.name} weights={self.weights_hash} input={self.input_size} feature=pooled"

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode: the network is frozen."""
        return super().train(False)

    def pooled(self, images: Tensor) -> Tensor:
        """Return float32 features (B, C_pool) of uint8 images (B, 3, H, W).

        ConvNets give their pooled features before the classifier, vision transformers their class token
        (or, trained without one, their own pooling or the mean of their patch tokens).
        """
        with torch.inference_mode(), self._precision(images.device):
            features = self.backbone.pooled(self._prepare(images))
        return features.to(torch.float32, copy=True)

    def _prepare(self, images: Tensor) -> Tensor:
        """Return normalised images (B, 3, S, S); bicubic with antialiasing where the size differs."""
        # normalising is affine, so it commutes with resizing and is cheaper on the smaller image
        normalised = (images.float() - self.mean) / self.std
        if images.shape[-2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            normalised = F.interpolate(normalised, size=size, mode="bicubic", antialias=True)
        return normalised if self.backbone.patches else normalised.contiguous(memory_format=torch.channels_last)

    def _precision(self, device: torch.device) -> torch.autocast:
        # enabled or not, this shields the encoder from the caller's autocast
        reduced = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype if reduced else None, enabled=reduced)


class Encoder(FeatureNetwork):
    """A frozen network that turns an image into tokens on the trunk's grid.

    Attributes (beside those of :class:`FeatureNetwork`): ``width`` (C_e), ``grid`` (tokens along a side),
    ``native_grid`` (the network's own at ``input_size``), ``resampled`` (whether the two differ),
    ``feature``, ``class_token`` and ``keys_values`` (whether ``outputs`` gives them), ``key_width`` (C_k) and
    ``value_width`` (C_v), 0 without them, ``has_attention`` and ``has_class_token`` (whether those are more than the
    tokens again and their mean).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        grid: int,
        input_size: int,
        device: torch.device,
        dtype: torch.dtype,
        keys_values: bool = False,
        class_token: bool = False,
    ) -> None:
        super().__init__(backbone, input_size=input_size, device=device, dtype=dtype)
        self.grid = grid
        self.feature = backbone.feature
        self.keys_values, self.class_token = keys_values, class_token
        black = torch.zeros(1, 3, input_size, input_size, dtype=torch.uint8, device=device)
        with torch.inference_mode(), self._precision(device):
            found = backbone.outputs(self._prepare(black), keys_values=keys_values)
        _, count, self.width = found.tokens.shape
        self.has_attention, self.has_class_token = found.keys is not None, found.class_token is not None
        whole = self.completed(found)
        self.key_width = 0 if whole.keys is None else whole.keys.shape[-1]
        self.value_width = 0 if whole.values is None else whole.values.shape[-1]
        self.native_grid = round(count**0.5)
        self.resampled = self.native_grid != grid

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the tokens do: name, weights, input size, feature, grid, precision."""
        return (
            f"{self.name} weights={self.weights_hash} input={self.input_size} feature={self.feature} "
            f"grid={self.grid} precision={str(self.dtype).removeprefix('torch.')}"
        )

    def tokens(self, images: Tensor) -> Tensor:
        """Return float32 tokens (B, grid*grid, width), row by row, of uint8 images (B, 3, H, W).

        The tokens are the network's own, not normalised; an ordinary tensor without gradient, which a loss
        may keep for its backward pass.
        """
        with torch.inference_mode(), self._precision(images.device):
            tokens = self._on_grid(self.backbone.tokens(self._prepare(images)))
        return _own(tokens)

    def outputs(self, images: Tensor) -> EncoderOutput:
        """Return, float32, what the encoder was loaded for, of uint8 images (B, 3, H, W), from one forward pass.

        Tokens are those of :meth:`tokens`; keys and values are resampled as they are.
        """
        with torch.inference_mode(), self._precision(images.device):
            found = self.backbone.outputs(self._prepare(images), keys_values=self.keys_values)
            tokens = self._on_grid(found.tokens)
            keys, values = self._on_grid(found.keys), self._on_grid(found.values)
        class_token = found.class_token if self.class_token else None
        return self.completed(EncoderOutput(_own(tokens), _own(keys), _own(values), _own(class_token)))

    def completed(self, found: EncoderOutput) -> EncoderOutput:
        """Return what was found with what its tokens serve for: keys, values, and by their mean the class token."""
        if self.keys_values and found.keys is None:
            found = found._replace(keys=found.tokens, values=found.tokens)
        if self.class_token and found.class_token is None:
            found = found._replace(class_token=found.tokens.mean(dim=1, dtype=torch.float32))
        return found

    def _on_grid(self, tokens: _MaybeTensor) -> _MaybeTensor:
        return tokens if tokens is None or not self.resampled else resample_tokens(tokens, self.grid)

    def forward(self, images: Tensor) -> Tensor:
        """Return :meth:`tokens`."""
        return self.tokens(images)


def _own(tensor: _MaybeTensor) -> _MaybeTensor:
    """Return an ordinary float32 tensor of its own, which a loss may keep for its backward pass."""
    return None if tensor is None else tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def resample_tokens(tokens: Tensor, grid: int) -> Tensor:
    """Resample tokens (B, n*n, C) to (B, grid*grid, C), bicubic with antialiasing, in float32."""
    batch, count, width = tokens.shape
    side = round(count**0.5)
    maps = tokens.float().transpose(1, 2).reshape(batch, width, side, side)
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", antialias=True)
    return maps.flatten(2).transpose(1, 2)


def load_encoder(
    name: str,
    *,
    weights: str | Path | None = None,
    grid: int,
    feature: int | None = None,
    input_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    allow_resample: bool = True,
    keys_values: bool = False,
    class_token: bool = False,
) -> Encoder:
    """Return the frozen encoder ``name`` with tokens on a ``grid`` x ``grid`` grid.

    Args:
        name: a short name such as ``dinov2-vit-b`` (``vrpo.vision.catalogue``), a timm architecture,
            ``transformers:NAME_OR_PATH``, a folder of either library's layout, or ``vrpo-conv``.
        weights: a local file; ``"random"``; or None for the published weights.
        grid: tokens along a side, as the trunk has them.
        feature: which block's tokens or which feature map is read (0-based, or negative from the end);
            None for the network's output.
        input_size: side in pixels at which the encoder sees an image; None chooses the one that gives
            ``grid`` exactly.
        device: where it runs.
        dtype: autocast precision; None for bfloat16 on CUDA and float32 elsewhere.
        allow_resample: whether the token grid may be resampled where no input size gives it exactly
            (``Encoder.resampled`` says that it is).
        keys_values: whether ``outputs`` also gives the keys and values of the layer that makes the tokens.
        class_token: whether ``outputs`` also gives the class token.

    Raises:
        ConfigError: unknown name, feature, an input size that does not lead to the grid, or keys and values
            that cannot be read.
        CheckpointError: weights that cannot be had, or of another architecture.
    """
    backbone = load_backbone(name, weights=weights, feature=feature)
    exact = grid * backbone.stride
    size = _checked_input(backbone, input_size if input_size is not None else backbone.fixed_input or exact)
    encoder = Encoder(
        backbone,
        grid=grid,
        input_size=size,
        keys_values=keys_values,
        class_token=class_token,
        **_placement(device, dtype),
    )
    if encoder.resampled and not allow_resample:
        own = f"{encoder.native_grid}x{encoder.native_grid}"
        remedy = (
            f"it takes no other size, so let the token grid be resampled or choose a trunk with {own} tokens."
            if backbone.fixed_input is not None
            else f"set the encoder's input size to {exact}."
        )
        raise ConfigError(
            f"Encoder '{name}' at {size} px gives {own} tokens, and the trunk has {grid}x{grid}: {remedy}"
        )
    return encoder


def load_feature_network(
    name: str,
    *,
    weights: str | Path | None = None,
    input_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> FeatureNetwork | inception.InceptionNetwork:
    """Return the frozen network ``name`` for pooled features, at its own input size unless told another.

    Arguments and errors are those of :func:`load_encoder`; ``inception`` is the network of FID, in float32 always,
    ``dinov2`` is that of FD-DINOv2, and a file of :func:`vrpo.vision.convnet.fit_encoder` may stand for its own name.
    """
    if name == inception.NAME:
        return inception.load_inception(weights=weights, input_size=input_size, device=device)
    if Path(name).suffix == ".safetensors" and weights is None:
        name, weights = CONV_NAME, name
    backbone = load_backbone(_FEATURE_NAMES.get(name, name), weights=weights, feature=None)
    size = _checked_input(backbone, input_size if input_size is not None else backbone.default_input)
    return FeatureNetwork(backbone, input_size=size, **_placement(device, dtype))


def load_backbone(name: str, *, weights: str | Path | None, feature: int | None) -> Backbone:
    """Return the network of an encoder, not yet fitted to a grid; arguments and errors as ``load_encoder``'s."""
    from vrpo.vision.convnet import load_conv
    from vrpo.vision.timm_encoder import is_timm_folder, load_timm
    from vrpo.vision.transformers_encoder import is_transformers, load_transformers

    if name == CONV_NAME:
        return load_conv(weights, feature=feature)
    if is_transformers(name) and not is_timm_folder(name):
        return load_transformers(name, weights=weights, feature=feature)
    if Path(name).suffix in {".safetensors", ".pt", ".pth"}:
        raise ConfigError(
            f"'{name}' is a weights file, not an encoder's name: name its architecture and give the file as "
            "its weights."
        )
    return load_timm(name, weights=weights, feature=feature)


def _checked_input(backbone: Backbone, size: int) -> int:
    fixed = backbone.fixed_input
    if fixed is not None and size != fixed:
        raise ConfigError(f"Encoder '{backbone.name}' takes images of {fixed} px only, not {size}: use {fixed}.")
    if size < backbone.stride or (backbone.divisible and size % backbone.stride):
        closest = max(1, round(size / backbone.stride)) * backbone.stride
        raise ConfigError(
            f"Encoder '{backbone.name}' cannot take images of {size} px, which are no multiple of its stride "
            f"of {backbone.stride}: the nearest that fits is {closest}."
        )
    return size


def _placement(device: str | torch.device, dtype: torch.dtype | None) -> dict:
    device = torch.device(device)
    if dtype is None:
        reduced = device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if reduced else torch.float32
    return {"device": device, "dtype": dtype}
