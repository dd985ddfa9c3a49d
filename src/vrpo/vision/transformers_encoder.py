"""Networks of the transformers library, by hub name or local folder."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError, ConfigError
from vrpo.files import sha256_file, tensors_hash
from vrpo.untrusted import read_json
from vrpo.vision.backbone import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Backbone
from vrpo.vision.hub import asking_hub
from vrpo.vision.weight_files import fit_weights, read_weights

PREFIX = "transformers:"
FAMILY_STATISTICS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "siglip": (HALF, HALF),
    "siglip2": (HALF, HALF),
    "siglip_vision_model": (HALF, HALF),
    "siglip2_vision_model": (HALF, HALF),
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "vit": (HALF, HALF),
    "beit": (HALF, HALF),
}
MAP_PROBE = 128
# What families call the normalisation after their last layer.
NORMS = ("post_layernorm", "layernorm", "norm")
# What the tokens do without, so that published files may lack it.
SPARE = ("pooler", "mask_token")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class TransformersBackbone(Backbone):
    """The vision tower of a transformers model."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        feature: int | None,
        weights_hash: str,
        statistics: Statistics,
        pooler: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.network, self.weights_hash = name, network, weights_hash
        self.pooler = pooler  # whether the network's own pooling has weights
        self.index = feature
        self.mean, self.std = statistics
        config: Any = network.config
        patch = getattr(config, "patch_size", None)
        self.patches = isinstance(patch, int)
        self.default_input = int(getattr(config, "image_size", None) or 224)
        self.kind = str(config.model_type)
        self.norm: nn.Module = nn.Identity()
        self.options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
            self.options["interpolate_pos_encoding"] = True
        if self.patches:
            self.stride, self.divisible = int(patch), True  # type: ignore[arg-type]
            try:
                self.prefix = self._states(4 * self.stride).shape[1] - 4 * 4
            except (ValueError, RuntimeError):
                self.fixed_input = self.default_input
                count = self._states(self.fixed_input).shape[1]
                self.prefix = count - (self.fixed_input // self.stride) ** 2
            if config.model_type in {"dinov2", "dinov2_with_registers"}:
                self.default_input = 16 * self.stride
            self._find_norm(self.fixed_input or 4 * self.stride)
        else:
            states = self._states(MAP_PROBE)
            if states.ndim != 4:
                raise ConfigError(f"Encoder '{name}' gives no token map: choose an image model.")
            self.stride = round(MAP_PROBE / states.shape[-1])
            self.prefix = 0
        # Part of the fingerprint: tokens are others where the library leaves the normalisation out.
        own = isinstance(self.norm, nn.Identity)
        self.feature = ("last" if feature is None else str(feature)) + ("" if own else ", normalised")

    def tokens(self, images: Tensor) -> Tensor:
        states = self._forward(images)
        return states[:, self.prefix :] if states.ndim == 3 else states.flatten(2).transpose(1, 2)

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.prefix:
            return super().with_class_token(images)
        states = self._forward(images)
        return states[:, self.prefix :], states[:, 0]

    def attention_block(self) -> nn.Module | None:
        if not self.patches:
            return None
        config: Any = self.network.config
        stacks = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
        layers = next((stack for stack in stacks if len(stack) == config.num_hidden_layers), None)
        # a network without such a stack is refused as a whole, with its name
        return self.network if layers is None else layers[-1 if self.index is None else self.index]

    def pooled(self, images: Tensor) -> Tensor:
        """Return the last layer's class token where there is one, else the model's pooling or the mean.

        The pooling layer on top of a class token is not used: many published files lack its weights.
        """
        output = self._run(images)
        states = output.last_hidden_state
        if self.prefix:
            return (states if self.index is not None else self.norm(states))[:, 0]
        own = getattr(output, "pooler_output", None) if self.pooler else None
        if own is not None:
            return own.flatten(1)
        return states.mean(dim=1) if states.ndim == 3 else states.mean(dim=(2, 3))

    def _forward(self, images: Tensor) -> Tensor:
        if self.index is None:
            return self.norm(self._run(images).last_hidden_state)
        states = self._run(images, output_hidden_states=True).hidden_states[1:]
        count = len(states)
        if not -count <= self.index < count:
            closest = min(max(self.index, -count), count - 1)
            raise ConfigError(
                f"Encoder '{self.name}' has {count} layers, so feature {self.index} does not exist: "
                f"the nearest is {closest}."
            )
        return self.norm(states[self.index])

    @torch.no_grad()
    def _find_norm(self, side: int) -> None:
        """Keep the network's last normalisation where the library's states that are read come without it.

        Some families normalise all last states, CLIP only the class token that it pools, and none those of a layer
        before; whether the last of all layers' states is normalised differs by family and version.
        """
        found = next((getattr(self.network, name) for name in NORMS if hasattr(self.network, name)), None)
        if not isinstance(found, nn.LayerNorm):
            return
        given: list[Tensor] = []
        hook = found.register_forward_hook(lambda _, __, output: given.append(output))
        try:
            states = self._forward(torch.zeros(1, 3, side, side))
        finally:
            hook.remove()
        done = any(output.shape == states.shape and torch.equal(output, states) for output in given)
        if not done and found.normalized_shape == states.shape[-1:]:
            self.norm = found

    def _run(self, images: Tensor, **options: Any) -> Any:
        """Call the network so that it sees every patch of ``images``, in their order."""
        options = {**self.options, **options}
        count = (images.shape[-1] // self.stride) ** 2 if self.patches else 0
        if self.kind == "vit_mae":
            # With nothing hidden the noise is only an order, and rising noise is the order of the image.
            order = torch.arange(count, device=images.device).expand(len(images), count)
            return self.network(images, noise=order, **options)
        if self.kind == "siglip2_vision_model":
            side = self.stride
            patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
            shape = torch.tensor(patches.shape[1:3], device=images.device).expand(len(images), 2)
            seen = torch.ones(len(images), count, dtype=torch.int32, device=images.device)
            return self.network(patches.flatten(3).flatten(1, 2), seen, shape, **options)
        return self.network(images, **options)

    @torch.no_grad()
    def _states(self, side: int) -> Tensor:
        return self._forward(torch.zeros(1, 3, side, side))


def is_transformers(name: str) -> bool:
    """Return whether ``name`` is ``transformers:NAME`` or a folder with config.json."""
    return name.startswith(PREFIX) or (Path(name) / "config.json").is_file()


def load_transformers(name: str, *, weights: str | Path | None, feature: int | None) -> TransformersBackbone:
    """Return the vision tower of the transformers model ``name`` (``transformers:NAME_OR_PATH`` or a folder).

    ``weights`` is None for the model's own, a local file of other weights for it, or ``"random"``.

    Raises:
        ConfigError: it is not an image model, or lacks the feature.
        CheckpointError: the model cannot be had, or the weights do not fit.
    """
    source = name.removeprefix(PREFIX)
    with asking_hub(source):
        model, missing, statistics = _fetch(source, own=weights is None)
    network = getattr(model, "vision_model", model).eval()
    if getattr(network, "main_input_name", "pixel_values") != "pixel_values":
        raise ConfigError(f"Encoder '{name}' does not take images: choose an image model.")
    lacking = _lacking(name, missing, "vision_model." if network is not model else "")
    digest = None
    if weights is not None and weights != "random":
        path = Path(weights)
        fit_weights(network, read_weights(path), architecture=name, source=path, may_be_extra=("classifier", "pooler"))
        digest = sha256_file(path)
    return TransformersBackbone(
        name,
        network,
        feature=feature,
        # What the file lacks is no part of what the weights are told by.
        weights_hash=digest
        or tensors_hash({key: value for key, value in network.state_dict().items() if key not in lacking}),
        statistics=statistics,
        pooler=not any("pooler" in key for key in lacking),
    )


def _lacking(name: str, missing: set[str], prefix: str) -> set[str]:
    """Return which weights of the network, whose names begin with ``prefix`` in the model, its file lacks.

    Raises:
        CheckpointError: the tokens depend on one of them.
    """
    own = {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}
    needed = sorted(key for key in own if not any(part in SPARE for part in key.split(".")))
    if needed:
        raise CheckpointError(
            f"The weights of the transformers model '{name}' lack '{needed[0]}': get its model.safetensors again, or "
            "another model."
        )
    return own


def _fetch(source: str, *, own: bool) -> tuple[nn.Module, set[str], Statistics]:
    """Return a model, with its ``own`` weights or random ones, which of its own are missing, and its statistics."""
    from transformers import AutoConfig, AutoModel

    missing: set[str] = set()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what is random, all or what a file lacks, is the same each time
            if own:
                model, found = AutoModel.from_pretrained(
                    source, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
                )
                missing = set(found["missing_keys"])
            else:
                model = AutoModel.from_config(config, trust_remote_code=False)
        return model, missing, _statistics(source, config.model_type)
    except Exception as error:  # the hub, the file system, the formats and the shapes all have errors of their own
        raise CheckpointError(
            f"The transformers model '{source}' could not be had ({type(error).__name__}): give a local "
            "folder that holds its config.json and model.safetensors, whole, as the encoder's name."
        ) from error


def _statistics(source: str, model_type: str) -> Statistics:
    """Return the channel statistics beside the model, or its family's; damaged ones raise errors of several types."""
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        found = None
    settings = read_json(Path(found)) if found else {}
    mean, std = FAMILY_STATISTICS.get(model_type, (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = settings.get("image_mean") or mean, settings.get("image_std") or std
    if not settings.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    # Ours are of an image in [0, 1]; a processor may scale bytes to another range, or not at all.
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
