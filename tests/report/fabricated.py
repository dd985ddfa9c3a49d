"""Run folders as `vrpo train` leaves them, with plausible curves, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

BINS = 10
PROTOCOL = {
    "sample_count": 2000,
    "reference": {"name": "cifar10-test", "count": 10000, "fingerprint": "ab12" * 16},
    "features": {
        "name": "MobileNetV2",
        "architecture": "mobilenetv2_100",
        "weights_hash": "9f3c" * 16,
        "input_size": 224,
        "precision": "float32",
    },
    "sampler": "ode-euler",
    "steps": 50,
    "guidance_scale": 1.0,
    "guidance_interval": [0.0, 1.0],
    "label_policy": "balanced",
    "decoder": "pixels",
    "weights": "ema",
    "seed": 0,
    "image_conversion": "uint8: floor of clamp(127.5 x + 128, 0, 255)",
    "kid": {"subsets": 100, "subset_size": 1000, "seed": 0},
    "manifold": {"samples": 2000, "reference": 10000, "neighbours": 3},
}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# How fast each objective learns, and what a step of it costs.
RATES = {"none": (1.0, 1.0), "repa": (1.7, 1.09), "vrpo": (1.9, 1.12), "irepa": (1.5, 1.1)}


def fabricate(
    folder: Path,
    objective: str = "none",
    seed: int = 0,
    *,
    images: int = 51_200,
    evaluations: int = 8,
    protocol: dict[str, Any] | None = None,
    config: dict[str, dict[str, Any]] | None = None,
    class_names: list[str] | None = None,
    samples: bool = True,
    name: str | None = None,
) -> Path:
    """Write a run whose curves are plausible: loss and distance fall as a power of the images seen."""
    rng = np.random.default_rng(seed * 101 + len(objective) + 7 * len(str(config)))
    folder.mkdir(parents=True)
    names = CLASSES if class_names is None else class_names
    tree: dict[str, Any] = {
        "name": name or f"{objective}-{seed}",
        "seed": seed,
        "data": {"path": "prepared/cifar10", "validation": "prepared/cifar10-test", "flip": True},
        "model": {"name": "SiT-Ti/4", "label_dropout": 0.1},
        "diffusion": {"path": "linear", "time": "uniform"},
        "encoder": {"name": "tf_efficientnet_lite0", "weights": None},
        "align": {"objective": objective, "weight": 0.5, "depth": [], "vrpo": {"gate": True, "sigma0": 0.25}},
        "train": {"images": images, "batch_size": 64, "lr": 6e-4, "validation_images": 1024},
        "evaluate": {"features": "mobilenetv2_100", "samples": 2000},
    }
    for section, values in (config or {}).items():
        tree[section] = {**tree[section], **values}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    facts = {
        "name": tree["name"],
        "objective": objective,
        "status": "finished",
        "vrpo": "0.1.0",
        "torch": "2.11.0",
        "python": "3.11.9",
        "machine": "x86_64, 2 threads, linux",
        "device": "cpu",
        "parameters": {"trunk": 5_900_000, "objective": 0 if objective == "none" else 900_000},
        "data": {
            "path": "prepared/cifar10",
            "fingerprint": "c0ffee" * 8,
            "images": 50_000,
            "classes": len(names),
            "class_names": names,
        },
    }
    (folder / "run.json").write_text(json.dumps(facts))
    rate, cost = RATES.get(objective, (1.3, 1.05))
    seconds_per_image = 0.0118 * cost

    def loss(seen: float) -> float:
        return 0.19 + 0.85 * (1 + rate * seen / 600) ** -0.55

    def row(kind: str, seen: float, **values: Any) -> dict[str, Any]:
        clock = {"images": int(seen), "seconds": round(seen * seconds_per_image, 3)}
        return {"kind": kind, "step": int(seen) // 64, **clock, **values}

    rows: list[dict[str, Any]] = []
    centres = (np.arange(BINS) + 0.5) / BINS
    for index in range(1, 101):
        seen = images * index // 100 // 64 * 64
        share = seen / images
        by_time = loss(seen) * (0.5 + 1.8 * np.abs(centres - 0.45) ** 1.5) / 0.85
        record = row(
            "train",
            seen,
            loss=loss(seen) + rng.normal(0, 0.012),
            denoising=loss(seen) + rng.normal(0, 0.012),
            grad_norm=0.5,
            lr=6e-4,
            images_per_second=1 / seconds_per_image * rng.normal(1, 0.02),
            data_wait=abs(rng.normal(0.004, 0.001)),
            memory_mb=1890.0 if objective == "none" else 2110.0,
            skipped=0,
            denoising_by_time=(by_time + rng.normal(0, 0.004, BINS)).tolist(),
        )
        if objective != "none":
            record["alignment"] = 0.62 * (1 - np.exp(-rate * seen / 9000)) + rng.normal(0, 0.006)
            record["objective_share"] = cost - 1 + rng.normal(0, 0.003)
            record["target_share"] = 0.05
        if objective == "vrpo":
            agreement = 0.09 * np.sin(3.1 * centres) * (1 - 1.5 * share * centres) + rng.normal(0, 0.006, BINS)
            record["objective/agreement"] = agreement.tolist()
            record["objective/gate"] = np.clip(1 + np.minimum(agreement, 0) / 0.1, 0.1, 1).tolist()
            for k, reward in enumerate(("semantic", "relational", "fidelity", "perceptual")):
                level = (0.6, -0.4, 0.15, -0.8)[k] * (1 - 0.7 * np.exp(-4 * share)) * (1.2 - 0.5 * centres)
                spread = (0.21, 0.12, 0.05, 0.08)[k] * (1 - 0.4 * share) * (0.7 + 0.5 * centres)
                record[f"objective/reward_{reward}"] = [*(level + rng.normal(0, 0.02, BINS))[:-1], None]
                record[f"objective/spread_{reward}"] = (spread + rng.normal(0, 0.004, BINS)).tolist()
                record[f"objective/dropped_{reward}"] = 0.0
            record["objective/clip_fraction"] = 0.08 + 0.05 * share + rng.normal(0, 0.008)
            record["objective/ratio_std"] = 0.2 + rng.normal(0, 0.012)
        rows.append(record)
    for index in range(1, 2 * evaluations + 1):
        seen = images * index // (2 * evaluations)
        values = {"denoising": loss(seen) + rng.normal(0, 0.0012)}
        if objective != "none":
            values["alignment"] = 0.6 * (1 - np.exp(-rate * seen / 9000))
        rows.append(row("validation", seen, **values))
    for index in range(1, evaluations + 1):
        seen = images * index // evaluations
        distance = 210 + 1100 * (1 + rate * seen / 2500) ** -0.6 + rng.normal(0, 6)
        metrics = {
            "fd": distance,
            "kid": distance / 6300,
            "precision": 0.75 - distance / 1500,
            "recall": 0.5 - distance / 1400 + rng.normal(0, 0.004),
        }
        rows.append(row("evaluation", seen, metrics=metrics, protocol={**(protocol or PROTOCOL), "seed": seed}))
    if samples:
        (folder / "samples").mkdir()
        for index in (0, 1, 2, 4, 8):
            seen = images * index // 8
            file = f"samples/{seen:012d}.png"
            _grid(folder / file, seed, seen / images * min(1.0, rate / 1.9))
            layout = {"rows": 6, "columns": 8, "labels": [i % 8 % len(names) for i in range(48)]}
            rows.append(row("samples", seen, file=file, **layout))
    rows.sort(key=lambda record: record["images"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows))
    return folder


def _grid(file: Path, seed: int, quality: float) -> None:
    """Draw 6 x 8 pictures of 32 pixels: soft shapes that rise out of noise as quality goes to one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32] / 31
    tiles = []
    for _ in range(48):
        sky, land, thing = rng.uniform(30, 230, (3, 3))
        horizon, cx, cy, r = rng.uniform((0.4, 0.3, 0.35, 0.12), (0.7, 0.7, 0.65, 0.28))
        picture = np.where((y < horizon)[..., None], sky, land) * (0.8 + 0.2 * y)[..., None]
        inside = ((x - cx) ** 2 + ((y - cy) * 1.4) ** 2 < r**2)[..., None]
        picture = np.where(inside, thing, picture)
        noise = rng.normal(128, 70, (32, 32, 3))
        tiles.append(np.clip(quality * picture + (1 - quality) * noise, 0, 255))
    rows = [np.concatenate(tiles[start : start + 8], axis=1) for start in range(0, 48, 8)]
    Image.fromarray(np.concatenate(rows).astype(np.uint8)).save(file)
