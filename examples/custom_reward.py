"""Rewards of your own: one that only scores, one that also prefers; then a run that uses both."""

import argparse
import json
import tempfile
from pathlib import Path

from torch import Tensor

from vrpo.alignment import Reward, register_reward
from vrpo.alignment.policy import Actions
from vrpo.alignment.projector import unit
from vrpo.alignment.rewards import RewardContext


@register_reward("signs")
def signs(actions: Actions, context: RewardContext) -> Tensor:
    """Share of channels whose sign is the target's: no gradient anywhere, so actions must be sampled."""
    return (actions.tensor().sign() == context.target.sign().unsqueeze(2)).float().mean(-1)


@register_reward("distinct")
class Distinct(Reward):
    """Keep away from what all tokens of the image have in common: linear, so it knows what it prefers."""

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        return actions.dot(self.preference(context))

    def preference(self, context: RewardContext) -> Tensor:
        return -unit(context.target.mean(1, keepdim=True)).expand_as(context.target)


def main(images: int, folder: Path) -> None:
    from vrpo.config_load import load_preset, merge, validate
    from vrpo.data.prepare import prepare
    from vrpo.data.shards import ShardedDataset
    from vrpo.demo import digits
    from vrpo.training.trainer import train
    from vrpo.vision.convnet import fit_encoder

    prepare(digits(), folder / "digits", size=16, workers=1, progress=False)
    encoder = folder / "encoder.safetensors"
    fit_encoder(ShardedDataset(folder / "digits"), encoder, steps=30, width=32, grid=4, progress=None)
    align = {
        "objective": "vrpo",
        "vrpo": {"mode": "sampled", "semantic": 0.5, "rewards": {"signs": 2.0, "distinct": 0.5}},
    }
    values = {
        "data": {"path": str(folder / "digits")},
        "encoder": {"weights": str(encoder)},
        "align": align,
        "train": {"images": images, "batch_size": 32, "lr": 2e-3, "log_every": max(32, images // 8)},
    }
    run = folder / "run"
    train(validate(merge(load_preset("demo-vrpo"), values), "the example"), run)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            means = {name: _mean(record[f"objective/reward_{name}"]) for name in ("signs", "distinct")}
            print(f"images {record['images']:6d}  signs {means['signs']:.3f}  distinct {means['distinct']:.3f}")


def _mean(by_time: list[float | None]) -> float:
    seen = [value for value in by_time if value is not None]
    return sum(seen) / len(seen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6_400)
    parser.add_argument("--out", type=Path, help="folder for data and run; a temporary one unless given")
    given = parser.parse_args()
    if given.out is not None:
        main(given.images, given.out)
    else:
        with tempfile.TemporaryDirectory() as name:
            main(given.images, Path(name))
