"""The small evaluation of samples during training, always named as such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vrpo.config import RunConfig
from vrpo.data.shards import ShardedDataset
from vrpo.evaluation.evaluate import chosen_metrics, evaluate_images
from vrpo.evaluation.reference import load_reference
from vrpo.processes import ALONE, World
from vrpo.sampling import ImageSampler, sample_labels
from vrpo.training.observe import draw_together
from vrpo.vision.encoders import load_feature_network


class Scorer:
    """Scores samples of the averaged weights against a reference set; draws nothing from the training random state."""

    def __init__(
        self,
        config: RunConfig,
        sampler: ImageSampler,
        reference: ShardedDataset,
        num_classes: int,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        settings = config.evaluate
        if settings.features is None:
            raise ValueError("evaluate.features is not set")
        self._config, self._sampler, self._num_classes = config, sampler, num_classes
        self._world = world
        if not world.first:
            return  # the others help to draw the samples
        self._network = load_feature_network(
            settings.features,
            weights=settings.weights,
            input_size=settings.input_size,
            device=device,
            dtype=torch.float32,
        )
        chosen_metrics(settings.metrics, self._network)
        self._reference = load_reference(reference, self._network)

    def __call__(self, go_on: Callable[[], None]) -> dict[str, Any]:
        """Return metrics and protocol of the current averaged weights; ``go_on`` is called after every batch drawn."""
        config = self._config
        indices = range(config.evaluate.samples)
        labels = sample_labels(indices, self._num_classes, config.evaluate.labels, config.seed)
        images = draw_together(self._sampler, indices, labels, config.seed, self._world, go_on)
        return self._world.ask_first(lambda: self._score(images))

    def _score(self, images: Tensor) -> dict[str, Any]:
        config = self._config
        result = evaluate_images(
            images,
            self._reference,
            self._network,
            metrics=config.evaluate.metrics,
            protocol_fields={
                **self._sampler.protocol,
                "label_policy": config.evaluate.labels if self._num_classes else "unconditional",
                "weights": "ema",
                "seed": config.seed,
                "occasion": "training",
            },
        )
        return {"metrics": result.metrics, "protocol": result.protocol}
