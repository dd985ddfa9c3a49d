"""Alignment for trainers that are not ours: an objective on the blocks of any transformer, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any, Protocol, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.alignment.hooks import BlockHook, Select, find_block
from vrpo.alignment.objective import AlignmentBatch
from vrpo.config import AlignConfig
from vrpo.errors import ConfigError, nearest
from vrpo.models.taps import TokenTap
from vrpo.pixels import to_float
from vrpo.randomness import STREAM_OBJECTIVE, step_generator

# Objectives that also act inside a block, where a hook on its output has no access.
READS_ATTENTION = ("haste",)


class TokenEncoder(Protocol):
    """What serves as an encoder: ``vrpo.vision.encoders.Encoder``, or anything with these two."""

    width: int

    def tokens(self, images: Tensor) -> Tensor:
        """Return tokens (B, N, width), without gradient, of uint8 images (B, 3, H, W)."""


class Aligner(nn.Module):
    """An alignment objective attached to a transformer that somebody else trains::

        aligner = Aligner(model, "blocks.3", hidden_size=384, tokens=256, encoders="dinov2-vit-b", budget=10_000_000)
        optimizer = torch.optim.AdamW([*model.parameters(), *aligner.parameters()])
        ...
        with aligner.step(images, time, clean):
            output = model(noised, time)
        loss = mse(output, target) + aligner.loss()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        aligner.update()

    Its parameters are the projectors (and probes), its state dict what a resumed run needs; neither the
    model's code nor its state dict changes, and outside ``step`` the model runs as it always did.

    The factor of ``loss()`` in what is differentiated is read off in the backward pass. So the loss may be
    divided for gradient accumulation, which needs nothing more than one ``step`` a micro-batch and one
    ``update`` an optimiser step, and scaled for fp16. Blocks may be compiled singly (not with ``fullgraph``;
    a model compiled whole may let equal blocks share their code, hooks forgotten, which ``loss`` reports) and
    checkpointed (not with reentrant checkpointing). Under DistributedDataParallel either wrap one module that
    holds both model and aligner, or wrap the model alone and call ``average_gradients`` before the
    optimiser's step.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str | Sequence[str],
        *,
        hidden_size: int,
        tokens: int,
        encoders: TokenEncoder | str | Sequence[TokenEncoder | str],
        budget: int,
        objective: str | AlignConfig = "vrpo",
        select: Select | None = None,
        output: int = 0,
        seed: int = 0,
    ) -> None:
        """Build the objective on the model's device and hook it to the model's blocks.

        Args:
            model: the transformer.
            blocks: the names, as in ``model.named_modules()``, of the modules whose output is aligned.
            hidden_size: channels D of their tokens.
            tokens: N, the tokens of an image on the encoders' grid, row by row.
            encoders: frozen encoders, or names for ``load_encoder`` with their published weights.
            budget: images the run will train on in all, which the warm-up is a share of.
            objective: "none", "repa", "irepa", "contrastive" or "vrpo", or its whole configuration; what acts inside
                blocks ("haste", "repi", "reg", a scaffold, a token) is refused.
            select: which of the model's tokens, in which order, lie on that grid: ``slice(1, None)`` leaves
                out one prefix token, indices reorder. The others pass untouched.
            output: which element of a block's output holds the tokens, where that is a tuple.
            seed: of the objective's own random numbers; better another one in each process.

        Raises:
            ConfigError: a block that the model does not have, or an objective that cannot be attached so.
            CheckpointError: an encoder's weights that cannot be had.
        """
        super().__init__()
        names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
        modules = [find_block(model, name) for name in names]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"Aligner's blocks {', '.join(names) or '()'} must name one block or several, each once.")
        config = _configuration(objective)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        sources = [encoders] if isinstance(encoders, str) or hasattr(encoders, "tokens") else encoders
        # A plain tuple: encoders are neither trained nor saved with the run.
        self.encoders = tuple(_encoder(source, tokens, device) for source in cast(Sequence[Any], sources))
        self.blocks, self.tokens, self.budget, self.seed = names, tokens, budget, seed
        self.objective = build_objective(
            config.model_copy(update={"depth": tuple(range(1, len(names) + 1))}),
            TrunkShape(hidden_size, depth=len(names), num_heads=1, tokens=tokens),
            [encoder.width for encoder in self.encoders],
        )
        for index, encoder in enumerate(self.encoders):
            self.register_buffer(f"mean{index}", torch.zeros(encoder.width))
        self.to(device)
        self.images_seen, self.updates = 0, 0
        self._images = 0
        self._steps = 0
        self._generator: torch.Generator | None = None
        self._forward: _Forward | None = None
        if _distributed():
            for value in (*self.parameters(), *self.buffers()):
                dist.broadcast(value.detach(), 0)
        make_hook = partial(BlockHook, hidden_size=hidden_size, tokens=tokens, select=select, output=output)
        self._hooks = [
            module.register_forward_hook(make_hook(name, partial(self._tap, depth)))
            for depth, (name, module) in enumerate(zip(names, modules, strict=True), start=1)
        ]

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return each encoder's tokens (B, N, C_e) of uint8 images (B, 3, H, W), mean token subtracted.

        ``step`` calls it; call it yourself to keep the result, or to repeat it for several noisings.
        """
        means = [self.get_buffer(f"mean{index}") for index in range(len(self.encoders))]
        return tuple(tokens - mean for tokens, mean in zip(self._encode(images), means, strict=True))

    @torch.no_grad()
    def center(self, images: Tensor) -> None:
        """From now on subtract from targets their mean token over these uint8 images (B, 3, H, W).

        Advisable once, with some hundred images, for encoders that end in a rectifier: all their tokens have
        a large cosine. Vision transformers are taken as they are, as REPA does.
        """
        for index, tokens in enumerate(self._encode(images)):
            self.get_buffer(f"mean{index}").copy_(tokens.double().mean((0, 1)))

    @contextmanager
    def step(
        self,
        images: Tensor | None,
        time: Tensor,
        clean: Tensor | None = None,
        *,
        targets: Sequence[Tensor] | None = None,
    ) -> Iterator[None]:
        """Align what the model computes within this context: one forward pass of a micro-batch, with gradients.

        Args:
            images: the clean images, uint8 (B, 3, H, W); None where ``targets`` and ``clean`` are given.
            time: (B,) in [0, 1], 0 = data, 1 = noise, whatever scale the model itself takes.
            clean: the clean latents (B, C, h, w); None: the images in [-1, 1].
            targets: what ``targets(images)`` returned, or tokens stored earlier.

        Raises:
            ConfigError: arguments that do not fit each other, or a block whose output is not (B, N, D) tokens.
        """
        if not time.is_floating_point():
            raise ConfigError(
                "aligner.step was given integer times: give them in [0, 1], 0 = data and 1 = noise, such as t / 999."
            )
        if images is None and (targets is None or clean is None):
            raise ConfigError("aligner.step was given no images: give them, or both targets and clean.")
        if targets is None:
            targets = self.targets(cast(Tensor, images))
        if clean is None:
            clean = to_float(cast(Tensor, images))
        if not all(len(part) == len(time) for part in (clean, *targets)):
            raise ConfigError(
                f"aligner.step was given {len(time)} times for {len(clean)} images: give one for each image."
            )
        if self._generator is None:
            self._generator = step_generator(self.seed, self.updates, STREAM_OBJECTIVE, time.device)
        # A mean over the micro-batch, until the backward pass says what factor it enters with.
        weight = torch.full((), 1 / len(time), device=time.device)
        batch = AlignmentBatch(
            targets=tuple(targets),
            time=time,
            clean=clean,
            images=images,
            images_seen=self.images_seen,
            budget=self.budget,
            sample_weight=weight,
            generator=self._generator,
        )
        self._forward = forward = _Forward(self.objective.taps(batch).tokens, weight, len(time))
        self._steps += 1
        try:
            yield
        finally:
            forward.open = False

    def loss(self, predict_clean: Callable[[], Tensor] | None = None) -> Tensor:
        """Return the scalar to add to the mean denoising loss of the step's micro-batch.

        ``predict_clean()`` gives the one-step prediction of ``clean`` from the model's output, for objectives
        that look at it. Part of the alignment acts on the model's gradient alone and has no share in the value.

        Raises:
            ConfigError: an aligned block did not run, with gradients, inside ``step``.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            raise ConfigError("aligner.loss() goes with a step: call it once after each `with aligner.step(...)`.")
        missing = [name for depth, name in enumerate(self.blocks, 1) if depth in forward.taps.keys() - forward.done]
        if missing:
            raise ConfigError(
                f"the block '{missing[0]}' did not run with gradients inside aligner.step(): call the model there, "
                "name a block rather than a list, compile blocks singly, and checkpoint with use_reentrant=False."
            )
        extra = self.objective.loss(predict_clean or _no_prediction)
        if extra is None:
            extra = torch.zeros((), device=forward.weight.device, requires_grad=True)
        self._images += forward.images
        return _Weigh.apply(extra, forward.weight, forward.images)

    def average_gradients(self) -> None:
        """Average the gradients over all processes: before the optimiser's step, where no wrapper does it."""
        if not _distributed():
            return
        for parameter in self.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def update(self) -> None:
        """Advance running statistics and the count of images, once after each optimiser step.

        Raises:
            ConfigError: there were steps since the last update, but none with a ``loss``.
        """
        if self._steps and not self._images:
            raise ConfigError("aligner.update() found steps without a loss: add aligner.loss() to each step's loss.")
        self.objective.update()
        self.images_seen += self._images * (dist.get_world_size() if _distributed() else 1)
        self.updates += 1
        self._images = self._steps = 0
        self._generator = None

    def logs(self) -> dict[str, Tensor]:
        """Return what the objective saw since the last call: scalars, or vectors by time bin, on the device."""
        return self.objective.logs()

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def get_extra_state(self) -> Tensor:
        """Return the counts of images and updates, for ``state_dict``."""
        return torch.tensor([self.images_seen, self.updates])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back what ``get_extra_state`` returned."""
        self.images_seen, self.updates = (int(value) for value in state)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tap(self, depth: int) -> TokenTap | None:
        """Return what a block's tokens are to pass through now, once a step and with gradients only."""
        forward = self._forward
        if forward is None or not forward.open or depth in forward.done or not torch.is_grad_enabled():
            return None
        forward.done.add(depth)
        return forward.taps.get(depth)

    def _encode(self, images: Tensor) -> list[Tensor]:
        if images.dtype != torch.uint8:
            raise ConfigError(
                f"aligner was given images of type {images.dtype}: give uint8 pixels (B, 3, H, W), from 0 to 255."
            )
        found = [encoder.tokens(images).float() for encoder in self.encoders]
        for tokens in found:
            if tokens.shape[1] != self.tokens:
                raise ConfigError(
                    f"an encoder gives {tokens.shape[1]} tokens an image, and Aligner was built for {self.tokens}: "
                    "load it with the grid of the model's tokens."
                )
        return found


@dataclass
class _Forward:
    """One micro-batch between ``step`` and ``loss``."""

    taps: Mapping[int, TokenTap]
    weight: Tensor
    images: int
    open: bool = True
    done: set[int] = field(default_factory=set)


class _Weigh(torch.autograd.Function):
    """Identity on the loss; backward writes one image's share of what is differentiated into ``weight``.

    Autograd runs the node made last first, among those that are ready, so this one comes before any node of
    the model and thus before the seam that reads ``weight``.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor, images: int) -> Tensor:
        ctx.weight, ctx.images = weight, images
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weight.copy_(gradients[0] / ctx.images)
        return gradients[0], None, None


def _configuration(objective: str | AlignConfig) -> AlignConfig:
    if isinstance(objective, str):
        choices = list(get_args(AlignConfig.model_fields["objective"].annotation))
        if objective not in choices:
            raise ConfigError(f"Aligner has no objective '{objective}': {nearest(objective, choices)}")
        objective = AlignConfig.model_validate({"objective": objective})
    if objective.objective in READS_ATTENTION:
        raise ConfigError(
            f"objective '{objective.objective}' reads queries and keys, which a hook on a block's output cannot see: "
            "train it with `vrpo train`, or choose vrpo."
        )
    if objective.uses_token:
        raise ConfigError(
            "align.token is one more token of the transformer, which a hook cannot add: set align.token.use False and "
            "another objective than reg, or train with `vrpo train`."
        )
    if objective.supply != "none":
        raise ConfigError(
            "align.scaffold acts on keys and values inside a block, which a hook on its output cannot reach: set "
            "align.scaffold.supply none and another objective than repi, or train with `vrpo train`."
        )
    if objective.perceptual_image.kind != "none":
        raise ConfigError(
            "align.perceptual_image is a loss on the network's output, which Aligner does not see: add it to the loss "
            "of your loop, or train with `vrpo train`."
        )
    if objective.depth:
        raise ConfigError("align.depth is set, but Aligner is told its blocks by name: leave it empty.")
    return objective


def _encoder(source: TokenEncoder | str, tokens: int, device: torch.device) -> TokenEncoder:
    if not isinstance(source, str):
        return source
    from vrpo.vision.encoders import load_encoder

    if isqrt(tokens) ** 2 != tokens:
        raise ConfigError(
            f"encoder '{source}' needs a square grid but there are {tokens} tokens: pass an object of your own with "
            "`width` and `tokens(images)`."
        )
    return load_encoder(source, grid=isqrt(tokens), device=device)


def _no_prediction() -> Tensor:
    raise ConfigError("this objective looks at the predicted images: pass aligner.loss(predict_clean).")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
