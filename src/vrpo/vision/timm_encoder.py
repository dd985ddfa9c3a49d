"""Networks of the timm library: vision transformers by their patch tokens, all others by a feature map."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError, ConfigError, nearest
from vrpo.files import misfit, sha256_file, tensors_hash
from vrpo.untrusted import read_json
from vrpo.vision.backbone import Backbone
from vrpo.vision.catalogue import ENCODERS, Entry
from vrpo.vision.checkpoint_keys import plain_keys
from vrpo.vision.hub import asking_hub
from vrpo.vision.weight_files import fit_weights, read_weights

TIMM_SOURCE = "local-dir:"
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
PROBE = 128
# What timm's renaming of keys raises where it meets another architecture's.
CONVERSION_ERRORS = (KeyError, RuntimeError, ValueError, AssertionError, AttributeError)


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

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
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


def is_timm_folder(name: str) -> bool:
    """Return whether ``name`` is a folder in timm's layout: config.json with an architecture, model.safetensors."""
    file = Path(name) / "config.json"
    if not file.is_file():
        return False
    try:
        settings = read_json(file)
    except (ValueError, OSError):
        return False
    return isinstance(settings, dict) and "architecture" in settings and "model_type" not in settings


def load_timm(name: str, *, weights: str | Path | None, feature: int | None) -> TimmBackbone:
    """Return the timm network ``name``: a short name such as ``dinov2-vit-b``, timm's own, or a folder.

    ``weights`` is a local file, ``"random"``, or None for a folder's own or timm's published weights (which need
    a network or a filled cache).

    Raises:
        ConfigError: no such architecture or feature.
        CheckpointError: the weights cannot be had, or do not fit.
    """
    import timm

    entry, folder = ENCODERS.get(name), Path(name) if is_timm_folder(name) else None
    if folder is not None:
        target = f"{TIMM_SOURCE}{folder}"
        weights = folder / "model.safetensors" if weights is None else weights
    else:
        target = name if entry is None else entry.timm
        if not timm.is_model(target):
            choices = [*ENCODERS, "vrpo-conv", *timm.list_models()]
            raise ConfigError(f"There is no encoder '{name}': {nearest(name, choices)}")
    if weights is None and entry is not None and not entry.published:
        raise CheckpointError(
            f"timm has no weights of '{name}': give its published file as the encoder's weights (.safetensors or "
            ".pth); its keys are converted."
        )
    published = weights is None
    try:
        with asking_hub(target) if published else nullcontext():
            network = _create(target, entry, pretrained=published)
    except Exception as error:  # the hub, the file system, the formats and the shapes all have errors of their own
        if folder is not None:
            raise CheckpointError(
                f"The folder {folder} does not describe a network that timm can build "
                f"({type(error).__name__}): get its config.json again."
            ) from error
        if not published:
            raise
        also = f", or the folder of '{entry.hub}' as the encoder's name" if entry is not None and entry.hub else ""
        raise CheckpointError(
            f"The published weights of '{name}' could not be had ({type(error).__name__}): "
            f"give a local file of them as the encoder's weights (.safetensors or .pth){also}."
        ) from error
    if weights is None or weights == "random":
        return TimmBackbone(name, network, feature=feature, weights_hash=tensors_hash(network.state_dict()))
    path = Path(weights)
    state = plain_keys(read_weights(path))
    try:
        converted = _convert(state, network)
    except CONVERSION_ERRORS as error:
        raise CheckpointError(
            f"{path} does not hold the weights of '{name}' ({type(error).__name__}: {error}); {what_fits(state)}"
        ) from error
    fit_weights(
        network,
        converted,
        architecture=name,
        source=path,
        may_be_extra=_classifier_names(network),
        remedy=lambda: what_fits(state),
    )
    return TimmBackbone(name, network, feature=feature, weights_hash=sha256_file(path))


def what_fits(state: dict[str, Any]) -> str:
    """Return a clause that names the short names whose networks take ``state`` whole."""
    kernel = state.get("patch_embed.proj.weight")
    if isinstance(kernel, Tensor) and kernel.ndim == 4:
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        shape = (kernel.shape[0], kernel.shape[-1], depth)
        alike = [name for name, entry in ENCODERS.items() if (entry.width, entry.patch, entry.depth) == shape]
        found = [name for name in alike if _takes(ENCODERS[name], state)]
        if found:
            return f"the file fits {' or '.join(found)}."
        return f"it is a ViT of width {shape[0]}, patch {shape[1]} and {depth} blocks: name that architecture."
    return "give the architecture that the file was saved from."


def _takes(entry: Entry, state: dict[str, Any]) -> bool:
    with torch.device("meta"):
        network = _create(entry.timm, entry, pretrained=False)
    try:
        converted = _convert(state, network)
    except CONVERSION_ERRORS:
        return False
    return misfit(network, converted, _classifier_names(network)) is None


def _create(target: str, entry: Entry | None, *, pretrained: bool) -> nn.Module:
    import timm

    arguments: dict[str, Any] = {"num_classes": 0}
    if entry is not None and entry.heads is not None:
        arguments["num_heads"] = entry.heads
    if entry is not None and entry.statistics is not None:
        mean, std = entry.statistics
        arguments["pretrained_cfg_overlay"] = {"mean": mean, "std": std}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same ones each time
        try:
            network = timm.create_model(target, pretrained=pretrained, dynamic_img_size=True, **arguments)
        except TypeError:  # not a transformer whose positions can be resized
            network = timm.create_model(target, pretrained=pretrained, **arguments)
    return network.eval()


def _convert(state: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Let timm rename the keys of the original release and resize its position table."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    kernel, own = state.get("patch_embed.proj.weight"), network.state_dict().get("patch_embed.proj.weight")
    # Patches of another size, which timm would resize without a word, are another network's.
    other_patch = isinstance(kernel, Tensor) and own is not None and kernel.shape[-1] != own.shape[-1]
    return state if convert is None or other_patch else convert(dict(state), network)


def _classifier_names(network: nn.Module) -> list[str]:
    config: Any = network.pretrained_cfg
    classifier = config.get("classifier") or ()
    return [classifier] if isinstance(classifier, str) else list(classifier)
