"""The Inception network of the field's FID: the TensorFlow graph of 2015 as torch-fidelity ports it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrpo.errors import CheckpointError, ConfigError
from vrpo.files import sha256_file, tensors_hash
from vrpo.vision.weight_files import fit_weights, read_weights

NAME = "inception"
INPUT_SIZE = 299
# The first digits of the file's SHA-256 are part of its name, by the convention of torch.hub.
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_DIGEST = "6726825d"
SPATIAL_CHANNELS = 7


def spatial_features(feature_map: Tensor) -> Tensor:
    """Return sFID's features (B, 7 H W) of a map (B, C, H, W): its first 7 channels, flattened in NHWC order.

    ADM's evaluator takes them from the map ``Mixed_6d`` of 17 x 17 positions, so there are 2,023 of them
    (Nash et al. 2021, arXiv 2103.03841).
    """
    return feature_map[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


class InceptionNetwork(nn.Module):
    """Inception-v3 of 2015, frozen, with the resize, padding and pooling of TensorFlow 1.

    Attributes: ``name`` (``inception`` or ``inception-random``), ``family``, ``input_size``, ``weights_hash``.
    """

    family = "conv"
    input_size = INPUT_SIZE
    dtype = torch.float32

    def __init__(self, extractor: nn.Module, *, name: str, weights_hash: str) -> None:
        super().__init__()
        self.extractor: Any = extractor
        self.name, self.weights_hash = name, weights_hash
        self.requires_grad_(False)
        self.eval()
        self._map: Tensor | None = None
        extractor.get_submodule("Mixed_6d").register_forward_hook(self._take_map)

    def _take_map(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output

    def train(self, mode: bool = True) -> InceptionNetwork:
        """Stay in evaluation mode: the network is frozen."""
        return super().train(False)

    def pooled(self, images: Tensor) -> Tensor:
        """Return ``pool_3``, float32 (B, 2048), of uint8 images (B, 3, H, W)."""
        return self.pooled_and_spatial(images)[0]

    def pooled_and_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``pool_3`` (B, 2048) and sFID's features (B, 2023), float32, of uint8 images (B, 3, H, W)."""
        cudnn = torch.backends.cudnn
        # TF32 would keep 10 bits of the published float32 features.
        shielded = cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )
        with torch.inference_mode(), torch.autocast(images.device.type, enabled=False), shielded:
            (pooled,) = self.extractor(images)
            if self._map is None:
                raise RuntimeError("Mixed_6d did not run")
            spatial, self._map = spatial_features(self._map), None
        return pooled.clone(), spatial.clone()

    def logits(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, 1008) of pooled features (B, 2048) without the classifier's bias, as IS takes them."""
        return pooled @ self.extractor.fc.weight.to(pooled.device).T


def cached_weights() -> Path:
    """Return where torch-fidelity keeps the weights file, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def load_inception(
    *, weights: str | Path | None = None, input_size: int | None = None, device: str | torch.device = "cpu"
) -> InceptionNetwork:
    """Return the Inception network with the weights of a local file, or of torch-fidelity's cache.

    ``weights`` may also be ``"random"``; scores in such features are not named FID.

    Raises:
        ConfigError: another input size than 299.
        CheckpointError: the weights file is missing, or is not the published one.
    """
    if input_size not in (None, INPUT_SIZE):
        raise ConfigError(
            f"The Inception network takes images at {INPUT_SIZE} px, not {input_size}: leave its size out."
        )
    extractor = _build()
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in extractor.modules():
                if isinstance(module, nn.Conv2d):
                    # Other initialisations let the features of an untrained network shrink to nothing.
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        name, digest = f"{NAME}-random", tensors_hash(extractor.state_dict())
    else:
        name, digest = NAME, _load_published(extractor, cached_weights() if weights is None else Path(weights))
    return InceptionNetwork(extractor, name=name, weights_hash=digest).to(device)


def _build() -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Extractor(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any, *arguments: Any, **options: Any) -> Any:
            # The constructor unpickles whatever file it is given: here it gets an empty table, and the weights
            # come later by a reader that runs no code.
            return super().load_state_dict(state, *arguments, **options) if state else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Extractor(NAME, ["2048"], feature_extractor_weights_path=empty)


def _load_published(extractor: nn.Module, path: Path) -> str:
    """Load the published weights, and return the file's hash."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if not path.is_file():
        raise CheckpointError(
            f"There are no Inception weights at {path}: fetch {URL_INCEPTION_V3} (91 MB) and give the file as the "
            "weights of the feature network, or put it there."
        )
    digest = sha256_file(path)
    if not digest.startswith(WEIGHTS_DIGEST):
        raise CheckpointError(
            f"{path} is not the Inception network of the published scores (its SHA-256 begins with {digest[:8]}, not "
            f"{WEIGHTS_DIGEST}): fetch {URL_INCEPTION_V3}."
        )
    fit_weights(extractor, read_weights(path), architecture=NAME, source=path)
    return digest
