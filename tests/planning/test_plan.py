"""`vrpo plan`: what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoencoder_files import save_autoencoder, save_tiny
from latent_sources import write_lightning
from vrpo.cli import main
from vrpo.config_load import validate
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource
from vrpo.errors import ConfigError
from vrpo.planning.machines import MACHINES, find_machine
from vrpo.planning.plan import DataFacts, make_plan
from vrpo.planning.trace import DataShape

SMALL = "--preset cifar10-sit-ti-4-none --data.image-size 32 --classes 10 --data-images 50k"


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words.split()])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_a_plan_for_a_machine_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, f"{SMALL} --gpu h100 --count 2 --price 2 --utilisation 0.5 --json")
    plan = json.loads(out)
    assert code == 0
    flops = plan["flops"]["trunk_training"] + plan["flops"]["objective"]
    assert plan["time"]["seconds"] == pytest.approx(64_000 * flops / (0.5 * 989e12 * 2))
    assert plan["time"]["cost"] == pytest.approx(2 * 2 * plan["time"]["seconds"] / 3600)
    assert plan["parameters"] == {"trunk": pytest.approx(5.5e6, rel=0.1), "objective": 0}
    assert plan["disk"]["data"] == 50_000 * 3 * 32 * 32
    assert plan["machine"]["fits"] is True
    parts = [plan["memory"][name] for name in ("weights", "ema", "moments", "objective", "encoders")]
    assert sum(parts) == plan["memory"]["persistent"]
    assert plan["memory"]["total"] == plan["memory"]["persistent"] + sum(
        plan["memory"][name] for name in ("gradients", "activations")
    )


def test_an_image_distance_is_counted_without_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    distance = "--align.perceptual-image.kind lpips --align.perceptual-image.network alex"
    plain, beside = (json.loads(run(capsys, f"{SMALL} {words} --json")[1]) for words in ("", distance))
    held = [plan["memory"]["encoders"] for plan in (plain, beside)]
    assert held[1] - held[0] > 4 * 2.4e6  # AlexNet's convolutions
    assert beside["flops"]["objective"] > plain["flops"]["objective"] == 0


def test_the_table_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, SMALL)
    assert code == 0
    for words in (
        "parameters, trunk",
        "memory, activations",
        "disk, checkpoints",
        "35% of the peak of 1 x H100",
        "time",
    ):
        assert words in out


def test_the_table_says_what_a_budget_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    """The published network at the published size: 118.64 G multiply-adds, 675 M parameters, 400,000 steps."""
    words = "--preset imagenet256-sit-xl-2-repa --gpu a100 --count 8 --price 1.5"
    _, out, _ = run(capsys, words)
    plan = json.loads(run(capsys, f"{words} --json")[1])
    rows = {}
    for line in out.splitlines():
        if line.startswith("│"):
            name, value, note = (part.strip() for part in line.strip("│").split("│"))
            rows[name] = (value, note)
    assert rows["FLOPs an image, sampling"][0] == "237.2 GFLOP"
    assert rows["FLOPs an image, trunk"][1].endswith("a multiply-add is two")
    assert rows["parameters, trunk"][0] == "674.8 M"
    assert rows["parameters, encoder dinov2-vit-b"][0] == "86.6 M"
    assert rows["time"][1] == "400,000 steps of 256 images, 32 a process"
    assert rows["speed"][1] == "assumed: 35% of the peak of 8 x A100 SXM 80 GB"

    flops, seconds = plan["flops"], plan["time"]["seconds"]
    each = flops["trunk_training"] + flops["objective"] + flops["encoders"]
    assert seconds == pytest.approx(102_400_000 * each / (0.35 * 312e12 * 8))
    assert rows["machine hours"][0] == f"{8 * seconds / 3600:,.1f} h"
    assert rows["cost"][0] == f"{1.5 * 8 * seconds / 3600:,.2f}"
    row = 3 * 256**2 + 2 * 2 * 8 * 32**2  # pixels; mean and deviation in two bytes, mirrored too
    assert plan["disk"]["data"] == 1_281_167 * row
    assert rows["disk, prepared data"] == ("293.87 GB", "1,281,167 images, mirrored too; latents 41.98 GB")
    assert plan["disk"]["token_cache"] == 1_281_167 * 2 * 2 * 256 * 768
    held = [
        float(value.removesuffix(" GB").replace(",", "")) for name, (value, _) in rows.items() if "memory, " in name
    ]
    assert sum(held[:-1]) == pytest.approx(held[-1], abs=0.04)


@pytest.mark.parametrize("kind", ["lightning", "tiny", "kl"])
def test_prepared_latents_are_counted_as_they_are_stored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    """Mean and deviation, or one value; and the operations of which autoencoder are counted is said."""
    rows = 10
    if kind == "lightning":
        write_lightning(tmp_path / "latents")
        prepare(tmp_path / "latents", tmp_path / "set", size=32, flip=True, workers=1, progress=False)
    else:
        images = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        made = (save_tiny if kind == "tiny" else save_autoencoder)(tmp_path / kind)
        told = LatentOptions(str(made), keep_pixels=False)
        source = ArraySource(images, np.arange(rows) % 2, ("a", "b"), "x")
        prepare(source, tmp_path / "set", size=32, flip=True, workers=1, progress=False, latents=told)
    words = f"--preset cifar10-sit-ti-4-none --data {tmp_path / 'set'} --data.validation none --sample.decoder none"
    _, out, err = run(capsys, f"{words} --json")
    assert out, err
    plan = json.loads(out)
    channels, side = {"lightning": (6, 4), "tiny": (4, 16), "kl": (8, 16)}[kind]
    assert plan["disk"]["latents"] == rows * 2 * 2 * channels * side**2
    assert plan["disk"]["latents"] <= plan["disk"]["data"]
    recorded = "not recorded" if kind == "lightning" else f"'{kind}'"
    _, out, _ = run(capsys, words)
    assert f"Stable Diffusion's; the data's: {recorded}" in " ".join(out.split())


def test_prepared_data_is_counted_as_it_lies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    prepare(ArraySource(images, np.arange(20) % 2, ("a", "b"), "x"), tmp_path, size=32, workers=1, progress=False)
    _, out, _ = run(capsys, f"--preset cifar10-sit-ti-4-none --data {tmp_path} --json")
    plan = json.loads(out)
    assert plan["disk"]["data"] == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert plan["data"]["images"] == 20


def test_a_plan_for_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--preset cifar10-sit-ti-4-repa --data.image-size 16 --model.name SiT-N/8 --here --json --train.device cpu "
        "--encoder.name vit_tiny_patch16_224 --align.depth 2 --train.batch-size 4 --train.precision fp32"
    )
    code, out, _ = run(capsys, words)
    plan = json.loads(out)
    assert code == 0
    assert plan["time"]["basis"].startswith("measured here with")
    assert 0.1 < plan["time"]["images_per_second"] < 1e5
    assert plan["machine"]["memory_bytes"] > 1e8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "vrpo plan needs --preset NAME or --config FILE"),
        ("--preset cifar10-sit-ti-4-none", "does not know the size of the images: give --data FOLDER"),
        (f"{SMALL} --gpu h10", "--gpu 'h10' is not in the table of machines: did you mean 'h100'?"),
        (f"{SMALL} --gpu h100 --here", "give --gpu or --here, not both"),
        (f"{SMALL} --count 3", "--count 3 does not divide train.batch_size 64 evenly: use --count 2"),
        (f"{SMALL} --utilisation 2", "--utilisation"),
        (f"{SMALL} --prise 2", "did you mean '--price'"),
        (f"{SMALL} --price inf", "--price cannot be inf"),
        (f"{SMALL} --here --utilisation 0.5", "leave it out, --here measures the speed"),
        (
            f"{SMALL} --data.path /nowhere",
            "--data-images describes data that is not prepared yet, and '/nowhere' is given",
        ),
        ("--preset cifar10-sit-ti-4-none --data /nowhere", "'/nowhere' holds no prepared data set"),
    ],
)
def test_what_cannot_be_planned(capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    code, _, err = run(capsys, words)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_machines_are_found_however_they_are_written() -> None:
    assert find_machine("RTX 4090") is MACHINES["rtx4090"]
    assert find_machine("A100-40") is MACHINES["a100-40"]
    with pytest.raises(ConfigError):
        find_machine("abacus")


def planned(count: int, parallel: str = "ddp", *, per_machine: int = 8, **train: Any) -> Any:
    train = {"batch_size": 64, "parallel": parallel, **train}
    values = {"model": {"name": "SiT-N/2"}, "align": {"objective": "none"}, "train": train}
    facts = DataFacts(DataShape(16, 16, 3, 3), images=100, flips=False, latents=False)
    return make_plan(validate(values, "the test"), facts, count=count, reduced_encoders=False, per_machine=per_machine)


def test_more_processes_hold_less_and_take_less_time() -> None:
    one, four = planned(1), planned(4)
    assert (one.share, four.share) == (64, 16)
    assert four.memory.activations < 0.5 * one.memory.activations
    assert four.memory.gradients == 4 * four.parameters["trunk"]
    assert four.seconds(1e12, 1e12) == pytest.approx(one.seconds(1e12, 1e12) / 4)


def test_sharded_networks_are_divided() -> None:
    whole, parts = planned(4).memory, planned(4, "fsdp").memory
    for name in ("weights", "ema", "moments", "gradients"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name) / 4, rel=1e-6)
    block = whole.weights / 4  # SiT-N has four
    assert whole.activations < parts.activations <= whole.activations + 3 * block


def test_hybrid_sharding_divides_within_a_machine() -> None:
    whole = planned(64).memory
    for plan, shards in (
        (planned(64, "hybrid"), 8),
        (planned(64, "hybrid", per_machine=4), 4),
        (planned(64, "hybrid", shard_size=16), 16),
        (planned(4, "hybrid"), 4),
    ):
        for name in ("weights", "ema", "moments"):
            assert getattr(plan.memory, name) == pytest.approx(getattr(whole, name) / shards, rel=1e-6)
    with pytest.raises(ConfigError, match=r"--per-machine 6 does not divide --count 64 into equal groups: use 4,"):
        planned(64, "hybrid", per_machine=6)
    with pytest.raises(ConfigError, match=r"train.shard_size 3 does not divide --count 64 into equal groups: use 2,"):
        planned(64, "hybrid", shard_size=3)


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, 1),  # the last alone
        ({"checkpoint_every": 6_400}, 2),
        ({"checkpoint_every": 6_400, "keep_checkpoints": 3, "keep_every": 16_000}, 3 + 4),
        ({"checkpoint_every": 16_000, "keep_every": 6_400}, 4),  # all of them
    ],
)
def test_every_checkpoint_that_stays_is_counted(keys: dict[str, int], kept: int) -> None:
    one = planned(1, images=64_000)
    assert planned(1, images=64_000, **keys).disk.checkpoints == kept * one.disk.checkpoints


def test_one_machine_s_memory_is_refused_when_it_is_too_small() -> None:
    plan = planned(1)
    assert plan.memory.fits(80e9)
    assert not plan.memory.fits(plan.memory.total)  # nothing would be left for the driver
