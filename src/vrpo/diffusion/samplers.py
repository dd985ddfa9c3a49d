"""Samplers: probability-flow ODE and reverse SDE for velocity networks, DDPM and DDIM for DiT.

The state is integrated in float64; the network sees the dtype of the initial noise. Guidance is v_null + s
(v_cond - v_null) (arXiv 2207.12598), inside a closed interval of times (arXiv 2404.07724), on all channels or, as
DiT's and SiT's code does, on the first ones alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vrpo.diffusion.noise import NoiseSource
from vrpo.diffusion.paths import DiscretePath, Path, Quantity
from vrpo.errors import ConfigError, nearest
from vrpo.wording import counted

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
StepCallback = Callable[[int, float, Tensor], Tensor | None]

FLOW_SAMPLERS = ("ode-euler", "ode-heun", "sde")
DIT_SAMPLERS = ("ddpm", "ddim")

# The SDE's diffusion coefficient vanishes at the data; its last step, without noise, starts here (REPA).
SDE_LAST_TIME = 0.04

# An interval's end must be met by a grid time that differs from it by rounding alone.
TIME_TOLERANCE = 1e-9


def check_settings(
    kind: str,
    sampler: str,
    steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    *,
    classes: bool,
    guidance_channels: int | None = None,
    channels: int | None = None,
    section: str = "",
) -> None:
    """Refuse settings by which a velocity network (``kind`` "SiT") or a "DiT" cannot be sampled.

    ``classes``: whether there is a null class beside labels; ``channels``: those of the state, where they are known;
    ``section`` stands before the names of settings.

    Raises:
        ConfigError: the first that does not fit.
    """
    choices = DIT_SAMPLERS if kind == "DiT" else FLOW_SAMPLERS
    if sampler not in choices:
        raise ConfigError(f"{section}sampler '{sampler}' does not fit {kind}: {nearest(sampler, choices)}")
    if steps < 1:
        raise ConfigError(f"{section}steps {steps} is too few: use 1 or more.")
    low, high = guidance_interval
    if low > high:
        raise ConfigError(
            f"{section}guidance_interval {low:g} {high:g} ends before it starts: write {high:g} {low:g}, where 0 is "
            "the data."
        )
    if low < 0 or high > 1:
        raise ConfigError(
            f"{section}guidance_interval {low:g} {high:g} leaves the times of sampling: write two between 0, the data, "
            "and 1, the noise."
        )
    most = DiscretePath.steps
    if sampler == "ddim" and most % steps:
        closest = min((n for n in range(1, most + 1) if most % n == 0), key=lambda n: abs(n - steps))
        raise ConfigError(f"{section}steps {steps} does not divide the {most:,} steps of ddim: use {closest}.")
    if sampler == "ddpm" and steps > most:
        raise ConfigError(f"{section}steps {steps} is more than the {most:,} steps of ddpm: use {most} or fewer.")
    if guidance_scale != 1 and not classes:
        raise ConfigError(
            f"{section}guidance_scale {guidance_scale:g} needs classes, and there are none (data.conditional is "
            "false, or no labels are given): use 1."
        )
    if guidance_channels is not None and channels is not None and not 1 <= guidance_channels <= channels:
        sampled = counted(channels, "channel", "channels")
        raise ConfigError(
            f"{section}guidance_channels {guidance_channels} is not among the {sampled} that are sampled: leave it out "
            "to guide all."
        )


class _Guided:
    """A network under classifier-free guidance, with both halves in one batch inside the interval only."""

    def __init__(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        scale: float,
        interval: tuple[float, float],
        null_label: int | None,
        channels: int | None,
        state_dtype: torch.dtype,
    ) -> None:
        self._network, self._labels, self._scale = network, labels, scale
        self._batch, self._channels = len(noise), noise.shape[1] if channels is None else channels
        self._input_dtype, self._state_dtype, self._device = noise.dtype, state_dtype, noise.device
        self._low, self._high = interval[0] - TIME_TOLERANCE, interval[1] + TIME_TOLERANCE
        if scale != 1.0:
            assert labels is not None  # was checked
            assert null_label is not None
            self._both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def __call__(self, state: Tensor, t: float, unit_time: float) -> Tensor:
        """Return the guided output at network time ``t``, guided where ``unit_time`` lies in the interval.

        Channels beyond the guided ones, and beyond the state's (DiT's variance), are the conditional half's.
        """
        x = state.to(self._input_dtype)
        if self._scale == 1.0 or not self._low <= unit_time <= self._high:
            return self._network(x, self._times(self._batch, t), self._labels).to(self._state_dtype)
        output = self._network(torch.cat([x, x]), self._times(2 * self._batch, t), self._both_labels)
        conditional, null = output.to(self._state_dtype).chunk(2)
        null_part, conditional_part = null[:, : self._channels], conditional[:, : self._channels]
        guided = null_part + self._scale * (conditional_part - null_part)
        return torch.cat([guided, conditional[:, self._channels :]], dim=1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (B',) of the batch only."""
        self._batch = len(rows)
        if self._labels is not None:
            self._labels = self._labels[rows]
        if self._scale != 1.0:
            conditional, null = self._both_labels.chunk(2)
            self._both_labels = torch.cat([conditional[rows], null[rows]])

    def _times(self, count: int, t: float) -> Tensor:
        return torch.full((count,), t, dtype=self._input_dtype, device=self._device)


@torch.no_grad()
def sample(
    network: Network,
    noise: Tensor,
    labels: Tensor | None,
    *,
    path: Path,
    sampler: str,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    null_label: int | None = None,
    noise_source: NoiseSource | None = None,
    state_dtype: torch.dtype = torch.float64,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Return samples (B, C, H, W), in the dtype of ``noise``, from a velocity ``network(x, t, labels)``.

    ``ode-euler`` and ``ode-heun`` take ``steps`` equal steps from t = 1 to 0; Heun evaluates the network
    twice a step, except in its last, which is an Euler step. ``sde`` is Euler-Maruyama as in REPA (arXiv
    2410.06940): ``steps`` evaluations, at times from 1 to 0.04, diffusion coefficient 2t, then a step to 0
    without noise; it draws from ``noise_source``. Guidance applies to an evaluation whose own time lies in
    the closed ``guidance_interval``, and to the first ``guidance_channels`` channels (None: all), the others being
    conditional. ``on_step(k, t, state)`` is called after step k = 1, 2, ... with the
    time reached; where it returns rows (B',), only these of the batch go on.

    Raises ConfigError for an unknown sampler, too few steps, guidance without classes, or a missing noise
    source.
    """
    check_settings(
        "SiT",
        sampler,
        steps,
        guidance_scale,
        guidance_interval,
        classes=labels is not None and null_label is not None,
        guidance_channels=guidance_channels,
        channels=noise.shape[1],
    )
    velocity = _Guided(
        network, noise, labels, guidance_scale, guidance_interval, null_label, guidance_channels, state_dtype
    )
    state = noise.to(state_dtype)
    if sampler == "sde":
        if noise_source is None:
            raise ConfigError("the sampler 'sde' draws noise at every step: pass a noise_source.")
        state = _euler_maruyama(velocity, state, path, steps, noise_source, on_step)
    else:
        state = _probability_flow(velocity, state, steps, sampler == "ode-heun", noise_source, on_step)
    return state.to(noise.dtype)


def _probability_flow(
    velocity: _Guided,
    state: Tensor,
    steps: int,
    heun: bool,
    noise_source: NoiseSource | None,
    on_step: StepCallback | None,
) -> Tensor:
    times = [(steps - step) / steps for step in range(steps + 1)]
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        slope = velocity(state, t, t)
        # Not at t = 0, where networks are not trained and the velocity of some paths diverges.
        if heun and step < steps:
            slope = (slope + velocity(state + (t_next - t) * slope, t_next, t_next)) / 2
        state = state + (t_next - t) * slope
        if on_step is not None:
            state = _going_on(on_step(step, t_next, state), state, velocity, noise_source)
    return state


def _euler_maruyama(
    velocity: _Guided,
    state: Tensor,
    path: Path,
    steps: int,
    noise_source: NoiseSource,
    on_step: StepCallback | None,
) -> Tensor:
    times = [*torch.linspace(1.0, SDE_LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        diffusion = 2 * t
        # The score is affine in the velocity, so guiding the velocity guides the drift by the same scale.
        value = velocity(state, t, t)
        time = torch.full((), t, dtype=state.dtype, device=state.device)
        score = path.convert(value, state, time, Quantity.VELOCITY, Quantity.SCORE)
        state = state + (t_next - t) * (value - 0.5 * diffusion * score)
        if step < steps:
            state = state + (diffusion * (t - t_next)) ** 0.5 * noise_source.step().to(state.dtype)
        if on_step is not None:
            state = _going_on(on_step(step, t_next, state), state, velocity, noise_source)
    return state


def _going_on(rows: Tensor | None, state: Tensor, network: _Guided, noise_source: NoiseSource | None) -> Tensor:
    """Return the rows of the state that go on, and let network and noise forget the others."""
    if rows is None:
        return state
    network.keep(rows)
    if noise_source is not None:
        noise_source.keep(rows.tolist())
    return state[rows]


@torch.no_grad()
def sample_dit(
    network: Network,
    noise: Tensor,
    labels: Tensor | None,
    *,
    sampler: str,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    null_label: int | None = None,
    noise_source: NoiseSource | None = None,
    state_dtype: torch.dtype = torch.float64,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Return samples (B, C, H, W), in the dtype of ``noise``, from a DiT ``network(x, t, labels)``.

    The network is given step numbers 0 to 999 as floats, and predicts (B, 2 C, H, W): the noise and the
    position of the log-variance in its range. ``ddpm`` visits ``steps`` of the 1000 steps, evenly spaced with
    both ends (ADM's respacing), with the learned variance, and draws from ``noise_source.generators``;
    ``ddim`` is deterministic, ignores the variance, and its ``steps`` must divide 1000. Guidance, its
    interval (of t / 999), its channels and ``on_step`` are as in `sample`; guidance leaves the variance as the
    conditional half predicts it, as DiT does.

    Raises ConfigError as `sample` does, and for a number of steps that the schedule cannot take.
    """
    check_settings(
        "DiT",
        sampler,
        steps,
        guidance_scale,
        guidance_interval,
        classes=labels is not None and null_label is not None,
        guidance_channels=guidance_channels,
        channels=noise.shape[1],
    )
    path = DiscretePath()
    output = _Guided(
        network, noise, labels, guidance_scale, guidance_interval, null_label, guidance_channels, state_dtype
    )
    scheduler, options = _scheduler(sampler, steps, path, noise_source)
    channels = noise.shape[1]
    state = noise.to(state_dtype)
    timesteps = [int(t) for t in scheduler.timesteps]
    for step, t in enumerate(timesteps, start=1):
        value = output(state, float(t), t / (path.steps - 1))
        if sampler == "ddim":
            value = value[:, :channels]
        state = scheduler.step(value, t, state, return_dict=False, **options)[0]
        if on_step is not None:
            reached = timesteps[step] / (path.steps - 1) if step < len(timesteps) else 0.0
            state = _going_on(on_step(step, reached, state), state, output, noise_source)
    return state.to(noise.dtype)


def _scheduler(
    sampler: str, steps: int, path: DiscretePath, noise_source: NoiseSource | None
) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' scheduler, set to ``steps`` steps, and the options of its every step."""
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler: Any
    last = path.steps - 1
    if sampler == "ddim":
        scheduler = DDIMScheduler(num_train_timesteps=path.steps, clip_sample=False)
        scheduler.set_timesteps(steps)
        options: dict[str, Any] = {}
    else:
        if noise_source is None:
            raise ConfigError("the sampler 'ddpm' draws noise at every step: pass a noise_source.")
        scheduler = DDPMScheduler(num_train_timesteps=path.steps, clip_sample=False, variance_type="learned_range")
        visited = [round(last - last * k / (steps - 1)) for k in range(steps)] if steps > 1 else [last]
        scheduler.set_timesteps(timesteps=visited)
        options = {"generator": noise_source.generators}
    # diffusers keeps float32 products, which are off by up to 3e-4 in 1 - alpha_bar near the data.
    scheduler.alphas_cumprod = path.tables.alpha_bars
    return scheduler, options
