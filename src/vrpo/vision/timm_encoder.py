"""Networks of the timm library: vision transformers by their patch tokens, all others by a feature map."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError, ConfigError, nearest
from vrpo.files import sha256_file
from vrpo.vision.backbone import Backbone
from vrpo.vision.weight_files import fit_weights, read_weights, state_hash

ALIASES = {
    f"dinov2-vit-{letter}{suffix}": f"vit_{size}_patch14_{registers}dinov2.lvd142m"
    for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
    for suffix, registers in {"": "", "-reg": "reg4_"}.items()
}
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
PROBE = 128


class TimmBackbone(Backbone):
    """A timm network without its classifier."""

    def __init__(self, name: str, network: nn.Module, *, feature: int | None, weights_hash: str) -> None:
        super().__init__()
        self.name, self.network, self.weights_hash = name, network, weights_hash
        self.index = feature
        self.feature = "last" if feature is None else str(feature)
        config: Any = network.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        if "efficientnet_lite" in config["architecture"]:
            # timm rounds the published (255 x - 127) / 128 to a mean and deviation of 0.5
            self.mean, self.std = LITE_MEAN, LITE_STD
        native = int(config["input_size"][-1])
        self.patches = hasattr(network, "num_prefix_tokens") and bool(getattr(network, "dynamic_img_size", False))
        self.default_input = native
        if self.patches:
            patch_embed: Any = network.patch_embed
            self.stride = int(patch_embed.patch_size[0])
            self.divisible = True
            if "dinov2" in config["architecture"]:
                # its 518 px are the end of training only; distances use 16 x 16 patches (arXiv 2306.04675)
                self.default_input = 16 * self.stride
        elif not hasattr(network, "forward_intermediates"):
            raise ConfigError(f"Encoder '{name}' gives no token map: choose a vision transformer or a ConvNet.")
        else:
            if config.get("fixed_input_size"):
                self.fixed_input = native
            self.stride = self._map_stride(self.fixed_input or PROBE)
        self._check_feature()

    def tokens(self, images: Tensor) -> Tensor:
        network: Any = self.network
        if self.patches and self.index is None:
            return network.forward_features(images)[:, network.num_prefix_tokens :]
        return self._map(images).flatten(2).transpose(1, 2)

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.network
        # registers alone are prefix tokens too
        if not self.patches or getattr(network, "cls_token", None) is None:
            return super().with_class_token(images)
        if self.index is None:
            states = network.forward_features(images)
            return states[:, network.num_prefix_tokens :], states[:, 0]
        tokens, prefix = network.forward_intermediates(
            images,
            indices=[self.index],
            intermediates_only=True,
            output_fmt="NLC",
            norm=True,
            return_prefix_tokens=True,
        )[-1]
        return tokens, prefix[:, 0]

    def attention_block(self) -> nn.Module | None:
        blocks: Any = getattr(self.network, "blocks", None)
        return blocks[-1 if self.index is None else self.index] if self.patches else None

    def pooled(self, images: Tensor) -> Tensor:
        """Return timm's own features before the classifier.

        For most vision transformers that is the normalised class token, and for those trained without one
        their mean or attention pooling; for ConvNets the pooled last layer.
        """
        return self.network(images)

    def _map(self, images: Tensor) -> Tensor:
        network: Any = self.network
        options = {"norm": True} if self.patches else {}
        maps = network.forward_intermediates(
            images,
            indices=[-1 if self.index is None else self.index],
            intermediates_only=True,
            output_fmt="NCHW",
            **options,
        )
        return maps[-1]

    def _map_stride(self, side: int) -> int:
        try:
            height = self._maps(side)[-1 if self.index is None else self.index].shape[-2]
        except IndexError:
            return 1  # refused by _check_feature with the valid choices
        return 2 ** round(math.log2(side / height)) if self.fixed_input is None else round(side / height)

    @torch.no_grad()
    def _maps(self, side: int) -> list[Tensor]:
        network: Any = self.network
        return network.eval().forward_intermediates(
            torch.zeros(1, 3, side, side), intermediates_only=True, output_fmt="NCHW"
        )

    def _check_feature(self) -> None:
        if self.index is None:
            return
        network: Any = self.network
        count = len(network.blocks) if self.patches else len(self._maps(self.fixed_input or PROBE))
        if not -count <= self.index < count:
            kind = "blocks" if self.patches else "feature maps"
            closest = min(max(self.index, -count), count - 1)
            raise ConfigError(
                f"Encoder '{self.name}' has {count} {kind}, so feature {self.index} does not exist: "
                f"the nearest is {closest}."
            )


def load_timm(name: str, *, weights: str | Path | None, feature: int | None) -> TimmBackbone:
    """Return the timm network ``name`` (or an alias such as ``dinov2-vit-b``) with its weights.

    ``weights`` is a local file, ``"random"``, or None for timm's published weights (needs a network or a
    filled cache).

    Raises:
        ConfigError: no such architecture or feature.
        CheckpointError: the weights cannot be had, or do not fit.
    """
    import timm

    target = ALIASES.get(name, name)
    if not timm.is_model(target):
        choices = [*ALIASES, "vrpo-conv", *timm.list_models()]
        raise ConfigError(f"There is no encoder '{name}': {nearest(name, choices)}")
    published = weights is None
    try:
        network = _create(target, pretrained=published)
    except (OSError, RuntimeError, ValueError) as error:
        if not published:
            raise
        raise CheckpointError(
            f"The published weights of '{name}' could not be had ({type(error).__name__}): "
            f"give a local file of them as the encoder's weights (.safetensors or .pth)."
        ) from error
    if weights is None or weights == "random":
        return TimmBackbone(name, network, feature=feature, weights_hash=state_hash(network))
    path = Path(weights)
    fit_weights(
        network,
        _converted(read_weights(path), network, name, path),
        architecture=name,
        source=path,
        may_be_extra=_classifier_names(network),
    )
    return TimmBackbone(name, network, feature=feature, weights_hash=sha256_file(path))


def _create(target: str, *, pretrained: bool) -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same ones each time
        try:
            network = timm.create_model(target, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError:  # not a transformer whose positions can be resized
            network = timm.create_model(target, pretrained=pretrained, num_classes=0)
    return network.eval()


def _converted(state: dict[str, Any], network: nn.Module, name: str, path: Path) -> dict[str, Any]:
    """Let timm rename the keys of the original release and resize its position table."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return convert(state, network)
    except (KeyError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold the weights of '{name}' ({type(error).__name__}: {error}); "
            "give the architecture that the file was saved from."
        ) from error


def _classifier_names(network: nn.Module) -> list[str]:
    config: Any = network.pretrained_cfg
    classifier = config.get("classifier") or ()
    return [classifier] if isinstance(classifier, str) else list(classifier)
