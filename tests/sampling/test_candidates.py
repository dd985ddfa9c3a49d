"""Several trajectories for an image: which one goes on, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vrpo.alignment.projector import ConvProjector, MLPProjector, projector_of
from vrpo.config import RunConfig
from vrpo.config_load import validate
from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import get_path
from vrpo.diffusion.samplers import sample, sample_dit
from vrpo.models.taps import Taps
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.sampling import ImageSampler
from vrpo.sampling.candidates import Candidates, Head, Rule, Selection, choose, selection_weights

CLASSES, WIDTH, STEPS = 4, 7, 4
INDICES = [0, 1, 2, 3, 4, 5]


def network(kind: str = "SiT", num_classes: int = CLASSES) -> DiffusionTransformer:
    torch.manual_seed(5)
    built = build_transformer(f"{kind}-N/4", input_size=8, in_channels=3, num_classes=num_classes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return built.eval()


def config(sampler: str = "ode-euler", guidance: float = 1.0, **over: Any) -> RunConfig:
    values = {"sampler": sampler, "steps": STEPS, "batch_size": 6, "guidance_scale": guidance, **over}
    return validate({"sample": values}, "the test")


def heads() -> list[Head]:
    torch.manual_seed(6)
    return [Head(depth, MLPProjector(96, WIDTH, 16), torch.randn(CLASSES, WIDTH)) for depth in (1, 2)]


def candidates(count: int, time: float, rule: Rule = "best") -> Candidates:
    return Candidates(Selection(count, time, rule), heads())


def labels() -> Tensor:
    return torch.tensor(INDICES) % CLASSES


def reference_scores(tokens: dict[int, Tensor], classes: np.ndarray) -> np.ndarray:
    """Return the scores of trajectories in float64, one by one."""
    total = np.zeros(len(classes))
    for head in heads():
        projected = head.projector(tokens[head.depth]).detach().double().numpy()
        prototypes = head.prototypes.double().numpy()
        centre = prototypes.mean(0)
        for row, label in enumerate(classes):
            directions = projected[row] / np.linalg.norm(projected[row], axis=-1, keepdims=True)
            mean, wanted = directions.mean(0) - centre, prototypes[label] - centre
            total[row] += mean @ wanted / np.linalg.norm(mean) / np.linalg.norm(wanted) / 2
    return total


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "sampler", "evaluations"),
    [("SiT", "ode-euler", 2), ("SiT", "ode-heun", 4), ("SiT", "sde", 2), ("DiT", "ddim", 2), ("DiT", "ddpm", 2)],
)
def test_the_trajectory_closest_to_its_class_goes_on(
    kind: str, sampler: str, evaluations: int, guidance: float
) -> None:
    count, trunk = 3, network(kind)
    found = ImageSampler(trunk, config(sampler, guidance), device="cpu", candidates=candidates(count, 0.5))
    images = found.images(INDICES, labels(), seed=3)
    # The same by hand: every trajectory to its end, and the tokens of the last evaluation before t = 0.5.
    kept: dict[int, Tensor] = {}
    calls = 0

    def call(x: Tensor, t: Tensor, given: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        taps = Taps(tokens={depth: keeper(depth) for depth in (1, 2)} if calls == evaluations else {})
        return trunk(x, t, given, taps)

    def keeper(depth: int) -> Any:
        def keep(tokens: Tensor) -> Tensor:
            kept[depth] = tokens[: len(INDICES) * count]
            return tokens

        return keep

    noise = SampleNoise(3, INDICES, (3, 8, 8), candidates=count)
    every = labels().repeat_interleave(count)
    options: dict[str, Any] = {"sampler": sampler, "steps": STEPS, "guidance_scale": guidance}
    options |= {"null_label": CLASSES, "noise_source": noise}
    if kind == "DiT":
        final = sample_dit(call, noise.initial(), every, **options)
    else:
        final = sample(call, noise.initial(), every, path=get_path("linear"), **options)
    scores = reference_scores(kept, every.numpy()).reshape(-1, count)
    assert np.abs(np.diff(np.sort(scores), axis=1)).min() > 1e-5
    best = scores.argmax(1)
    assert len(set(best.tolist())) > 1
    expected = (final.view(-1, count, 3, 8, 8)[range(len(INDICES)), best] * 127.5 + 128).clamp(0, 255).floor()
    assert (images.float() - expected).abs().max() <= 1


@pytest.mark.parametrize("rule", ["best", "resample"])
def test_the_choice_is_the_same_whatever_the_batch(rule: Rule) -> None:
    def images(batch_size: int, indices: list[int]) -> Tensor:
        made = ImageSampler(
            network(), config("sde", 1.5, batch_size=batch_size), device="cpu", candidates=candidates(3, 0.7, rule)
        )
        return made.images(indices, torch.tensor(indices) % CLASSES, seed=3)

    whole = images(6, INDICES)
    assert torch.equal(whole, images(2, INDICES))
    assert torch.equal(whole[4:5], images(6, [4]))


def test_one_candidate_is_plain_sampling_to_the_bit() -> None:
    plain = ImageSampler(network(), config("sde", 1.5), device="cpu").images(INDICES, labels(), seed=3)
    one = ImageSampler(network(), config("sde", 1.5), device="cpu", candidates=candidates(1, 0.5))
    assert torch.equal(one.images(INDICES, labels(), seed=3), plain)


def test_the_first_step_that_reaches_the_time_chooses_once() -> None:
    made = candidates(2, 0.5)
    for depth in (1, 2):
        made.taps.tokens[depth](torch.randn(12, 4, 96))
    choose_at = made.chooser(0, INDICES, labels())
    rows = [choose_at(step, time, torch.empty(0)) for step, time in enumerate([0.75, 0.5 + 1e-12, 0.25, 0.0])]
    assert [found is not None for found in rows] == [False, True, False, False]
    assert rows[1] is not None
    assert (rows[1] // 2).tolist() == INDICES


def test_a_single_class_has_a_score_too() -> None:
    made = Candidates(Selection(2, 0.5, "best"), [Head(1, nn.Identity(), torch.tensor([[1.0, 0.0]]))])
    made.taps.tokens[1](torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]]]))
    torch.testing.assert_close(made.scores(torch.tensor([0])), torch.tensor([[0.0, 1.0]]))


def test_resampling_draws_by_the_group_relative_weight() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.4])
    advantage = (scores.numpy() - 0.3) / np.sqrt(0.025)
    expected = np.exp(advantage) / np.exp(advantage).sum()
    np.testing.assert_allclose(selection_weights(scores[None])[0].numpy(), expected, rtol=1e-5)
    count = 4000
    drawn = choose(scores.expand(count, 4), "resample", 7, range(count))
    share = drawn.bincount(minlength=4).numpy() / count
    # Four standard deviations of a binomial.
    assert np.all(np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count))
    assert torch.equal(choose(scores.expand(9, 4), "resample", 7, range(20, 29)), drawn[20:29])
    assert not torch.equal(choose(scores.expand(count, 4), "resample", 8, range(count)), drawn)
    assert choose(scores[None], "best", 7, [0]).tolist() == [1]
    assert selection_weights(torch.full((1, 4), 0.3)).tolist() == [[0.25] * 4]


def test_candidates_have_noise_of_their_own_and_the_first_the_sample_s() -> None:
    plain, several = SampleNoise(1, [4, 9], (3, 8, 8)), SampleNoise(1, [4, 9], (3, 8, 8), candidates=3)
    assert torch.equal(several.initial()[::3], plain.initial())
    draws = torch.cat([several.initial(), several.step()]).flatten(1)
    assert (torch.corrcoef(draws) - torch.eye(12)).abs().max() < 0.35
    fresh = SampleNoise(1, [4, 9], (3, 8, 8), candidates=3)
    generators = fresh.generators
    fresh.step()
    fresh.keep([2, 3])
    assert torch.equal(fresh.step(), several.step()[[2, 3]])
    assert fresh.generators is generators
    assert len(generators) == 2


@pytest.mark.parametrize("made", [MLPProjector(12, 5, 9), ConvProjector(12, 5)])
def test_a_projector_is_rebuilt_from_its_weights(made: nn.Module) -> None:
    tokens = torch.randn(2, 4, 12)
    assert torch.equal(projector_of(made.state_dict())(tokens), made(tokens))
