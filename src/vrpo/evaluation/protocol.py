"""The protocol of an evaluation: everything a metric's value depends on besides the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict
from typing_extensions import TypedDict

from vrpo.errors import EvaluationError
from vrpo.untrusted import printable
from vrpo.wording import counted

if TYPE_CHECKING:
    from vrpo.evaluation.features import FeatureNetwork

IMAGE_CONVERSION = "uint8: floor of clamp(127.5 x + 128, 0, 255)"
INCEPTION = "inception"
_MAX_RECORD = 1 << 20

METRIC_NAMES = {
    "fd": "FD",
    "sfid": "sFD",
    "is": "IS",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
}
# The first pattern that a network's name contains gives its friendly name.
_NETWORK_NAMES = (
    (r"^inception-random$", "random Inception"),
    (r"efficientnet_lite(\d)", r"EfficientNet-Lite\1"),
    (r"efficientnetv2_(\w)", r"EfficientNetV2-\1"),
    (r"efficientnet_b(\d)", r"EfficientNet-B\1"),
    (r"mobilenetv(\d)", r"MobileNetV\1"),
    (r"mobileclip", "MobileCLIP"),
    (r"convnextv2", "ConvNeXtV2"),
    (r"convnext", "ConvNeXt"),
    (r"dino[-_]?v?(\d)", r"DINOv\1"),
    (r"dino", "DINO"),
    (r"siglip", "SigLIP"),
    (r"clip", "CLIP"),
    (r"resnet(\d+)", r"ResNet-\1"),
    (r"vrpo-conv", "vrpo-conv"),
)


@dataclass(frozen=True)
class ReferenceRecord:
    """The images that samples are compared with; ``count`` is None where loaded statistics do not say."""

    name: str
    count: int | None
    fingerprint: str


@dataclass(frozen=True)
class FeaturesRecord:
    """The feature network: friendly name, architecture, weights' hash, input side in pixels, arithmetic."""

    name: str
    architecture: str
    weights_hash: str
    input_size: int
    precision: str = "float32"

    @classmethod
    def of(cls, network: FeatureNetwork) -> FeaturesRecord:
        """Describe a loaded network."""
        precision = str(getattr(network, "dtype", "float32")).removeprefix("torch.")
        label = network_label(network.name)
        return cls(label, network.name, network.weights_hash, network.input_size, precision)


@dataclass(frozen=True)
class Protocol:
    """What to state beside every metric; None where images came without a record of how they were sampled.

    ``occasion`` is "training" for the small evaluation that a run makes of itself, which is no row of a table of full
    ones. ``guidance_channels`` is None where guidance acts on all, and then left out of a record. ``selection`` says
    how each image was chosen from several candidates, where it was; ``kid``, ``manifold`` and ``inception_score`` hold
    the settings of those metrics where they were computed.
    """

    sample_count: int
    reference: ReferenceRecord
    features: FeaturesRecord
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_channels: int | None = None
    label_policy: str | None = None
    decoder: str | None = None
    weights: Literal["ema", "raw"] | None = None
    seed: int | None = None
    occasion: Literal["training"] | None = None
    image_conversion: str = IMAGE_CONVERSION
    selection: Mapping[str, Any] = field(default_factory=dict)
    kid: Mapping[str, int] = field(default_factory=dict)
    manifold: Mapping[str, int] = field(default_factory=dict)
    inception_score: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as nested dictionaries ready for JSON."""
        record = asdict(self)
        if self.guidance_interval is not None:
            record["guidance_interval"] = list(self.guidance_interval)
        if self.guidance_channels is None:
            del record["guidance_channels"]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Protocol:
        """Return the protocol that `to_dict` wrote."""
        fields = dict(record)
        fields["reference"] = ReferenceRecord(**fields["reference"])
        fields["features"] = FeaturesRecord(**fields["features"])
        if fields.get("guidance_interval") is not None:
            fields["guidance_interval"] = tuple(fields["guidance_interval"])
        return cls(**fields)

    def line(self) -> str:
        """Render the protocol in one line; control characters, which a record of samples may hold, are escaped."""
        reference, features = self.reference, self.features
        size = "moments as given" if reference.count is None else f"{reference.count:,} images"
        precision = "" if features.precision == "float32" else f", {features.precision}"
        small = "small evaluation during training of " if self.occasion == "training" else ""
        parts = [
            f"{small}{self.sample_count:,} samples",
            self._sampling(),
            f"reference {reference.name} ({size}, {reference.fingerprint[:12]})",
            f"features {features.name} ({features.architecture}) at {features.input_size} px, "
            f"weights {features.weights_hash[:12]}{precision}",
            self.image_conversion,
        ]
        if self.kid:
            drawn = f", from {self.kid['reference']:,} reference images" if "reference" in self.kid else ""
            parts.append("KID over {subsets} subsets of {subset_size}, seed {seed}".format(**self.kid) + drawn)
        if self.manifold:
            text = "manifolds of {samples:,} samples and {reference:,} reference images, k = {neighbours}"
            parts.append(text.format(**self.manifold))
        if self.inception_score:
            parts.append("IS over {chunks} contiguous chunks of {chunk:,}".format(**self.inception_score))
        return printable("; ".join(parts)).replace("\n", "\\n")

    def _sampling(self) -> str:
        if self.sampler is None:
            return "sampler not recorded"
        text = self.sampler if self.steps is None else f"{self.sampler}, {self.steps} steps"
        if self.guidance_scale is None or self.guidance_scale == 1.0:
            text += ", no guidance"
        else:
            text += f", guidance {self.guidance_scale:g}"
            if self.guidance_interval is not None:
                text += " on [{:g}, {:g}]".format(*self.guidance_interval)
            if self.guidance_channels is not None:
                text += f", of the first {counted(self.guidance_channels, 'channel', 'channels')} alone"
        if self.selection:
            how = "best" if self.selection["rule"] == "best" else "one resampled"
            text += f", {how} of {self.selection['candidates']} at t = {self.selection['time']:g}"
        if self.label_policy is not None:
            text += f", labels {self.label_policy}"
        if self.decoder is not None:
            text += f", decoder {self.decoder}"
        if self.weights is not None:
            text += f", {'EMA' if self.weights == 'ema' else self.weights} weights"
        if self.seed is not None:
            text += f", seed {self.seed}"
        return text


class SelectionFields(TypedDict):
    """How each image was chosen from several candidates."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    rule: str
    candidates: int
    time: float


class SamplingFields(TypedDict, total=False):
    """The fields of a `Protocol` that say how images were drawn."""

    sampler: str
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guidance_channels: int
    label_policy: str
    decoder: str
    weights: Literal["ema", "raw"]
    seed: int
    selection: SelectionFields


def sampling_record(source: Path) -> SamplingFields:
    """Return what `vrpo sample` recorded beside its images; empty where there is nothing.

    The record is ``sampling.json`` in a folder, and the array ``sampling`` in an ``.npz``. Raises EvaluationError
    where it is damaged.
    """
    from pydantic import TypeAdapter

    from vrpo.evaluation.npz import read_arrays
    from vrpo.untrusted import parse_json, read_text

    text = "{}"
    try:
        if (source / "sampling.json").is_file():
            text = read_text(source / "sampling.json", _MAX_RECORD)
        elif source.suffix == ".npz":
            text = str(read_arrays(source, {"sampling": ()}).get("sampling", text))
        return TypeAdapter(SamplingFields).validate_python(parse_json(text))
    except ValueError as error:
        raise EvaluationError(f"the sampling record of {source} is damaged: remove it, or sample again.") from error


def network_label(name: str) -> str:
    """Return the friendly name of a feature network, such as ``MobileNetV2`` for ``mobilenetv2_100``."""
    if name == INCEPTION:
        return "Inception"
    lowered = name.lower()
    for pattern, label in _NETWORK_NAMES:
        if match := re.search(pattern, lowered):
            return match.expand(label)
    return name


def metric_label(metric: str, network: str) -> str:
    """Return the printed name of a metric, such as ``FD-MobileNetV2``.

    Only scores in the ADM suite's Inception features may be called FID, sFID, IS or plain KID. An empty ``network`` is
    one that was not recorded.
    """
    if network == INCEPTION:
        return {"fd": "FID", "sfid": "sFID"}.get(metric, METRIC_NAMES[metric])
    name = METRIC_NAMES[metric]
    return name if metric in ("precision", "recall") or not network else f"{name}-{network_label(network)}"
