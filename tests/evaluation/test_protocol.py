"""The protocol record, its line, and how metrics are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vrpo.errors import EvaluationError
from vrpo.evaluation.protocol import (
    FeaturesRecord,
    Protocol,
    ReferenceRecord,
    metric_label,
    network_label,
    sampling_record,
)

PROTOCOL = Protocol(
    sample_count=50_000,
    reference=ReferenceRecord("cifar10-test", 10_000, "ab" * 32),
    features=FeaturesRecord("MobileNetV2", "mobilenetv2_100", "cd" * 32, 224),
    sampler="sde",
    steps=250,
    guidance_scale=1.8,
    guidance_interval=(0.0, 0.7),
    label_policy="balanced",
    decoder="none (pixels)",
    weights="ema",
    seed=3,
    kid={"subsets": 100, "subset_size": 1000, "seed": 2020},
    manifold={"samples": 50_000, "reference": 10_000, "neighbours": 3},
)


def test_line_states_every_field() -> None:
    line = PROTOCOL.line()

    for part in (
        "50,000 samples",
        "sde, 250 steps",
        "guidance 1.8 on [0, 0.7]",
        "labels balanced",
        "decoder none (pixels)",
        "EMA weights",
        "seed 3",
        "cifar10-test (10,000 images, abababababab)",
        "MobileNetV2 (mobilenetv2_100) at 224 px",
        "weights cdcdcdcdcdcd",
        "clamp(127.5 x + 128, 0, 255)",
        "100 subsets of 1000",
        "k = 3",
    ):
        assert part in line
    assert "\n" not in line


def test_channels_that_guidance_spares_are_stated_and_all_are_as_before() -> None:
    record = PROTOCOL.to_dict()
    assert "guidance_channels" not in record
    some = Protocol.from_dict({**record, "guidance_channels": 3})
    assert "guidance 1.8 on [0, 0.7], of the first 3 channels alone, labels" in some.line()
    assert Protocol.from_dict(some.to_dict()) == some


def test_line_says_what_is_not_known() -> None:
    protocol = Protocol(10, ReferenceRecord("adm", None, ""), FeaturesRecord("x", "x", "0", 8, precision="bfloat16"))

    assert "sampler not recorded" in protocol.line()
    assert "reference adm (moments as given, )" in protocol.line()
    assert "bfloat16" in protocol.line()


def test_the_small_evaluation_of_training_is_named() -> None:
    record = PROTOCOL.to_dict()
    assert "training" not in Protocol.from_dict(record).line()
    small = Protocol.from_dict({**record, "occasion": "training"})
    assert small.line().startswith(f"small evaluation during training of {PROTOCOL.sample_count:,} samples")
    assert Protocol.from_dict(small.to_dict()) == small


def test_unguided_sampling_names_no_interval() -> None:
    record = {**PROTOCOL.to_dict(), "guidance_scale": 1.0}

    assert "no guidance," in Protocol.from_dict(record).line()
    assert "0.7" not in Protocol.from_dict(record).line()


def test_returns_from_json() -> None:
    assert Protocol.from_dict(json.loads(json.dumps(PROTOCOL.to_dict()))) == PROTOCOL


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("mobilenetv2_100", "MobileNetV2"),
        ("tf_efficientnet_lite0", "EfficientNet-Lite0"),
        ("dinov2-vit-b", "DINOv2"),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2"),
        ("vit_base_patch16_dinov3.lvd1689m", "DINOv3"),
        ("vit_base_patch16_224.dino", "DINO"),
        ("transformers:openai/clip-vit-large-patch14", "CLIP"),
        ("resnet50.a1_in1k", "ResNet-50"),
        ("vrpo-conv", "vrpo-conv"),
        ("some_new_network", "some_new_network"),
    ],
)
def test_networks_have_friendly_names(name: str, label: str) -> None:
    assert network_label(name) == label


def test_only_inception_gives_fid() -> None:
    assert metric_label("fd", "mobilenetv2_100") == "FD-MobileNetV2"
    assert metric_label("kid", "mobilenetv2_100") == "KID-MobileNetV2"
    assert metric_label("fd", "inception_v3") == "FD-inception_v3"
    assert metric_label("fd", "inception") == "FID"
    assert metric_label("kid", "inception") == "KID"
    assert [metric_label(metric, "inception") for metric in ("sfid", "is")] == ["sFID", "IS"]
    assert metric_label("sfid", "inception-random") == "sFD-random Inception"
    assert metric_label("is", "inception-random") == "IS-random Inception"
    assert metric_label("recall", "mobilenetv2_100") == "Recall"


def test_sampling_record_is_read_from_folder_and_npz(tmp_path: Path) -> None:
    drawn = {"sampler": "sde", "steps": 250, "guidance_channels": 3, "weights": "ema"}
    record = {**drawn, "guidance_interval": [0.0, 0.7], "compute_batch": 8}
    chosen = {"rule": "best", "candidates": 4, "time": 0.5, "by": "prototypes"}
    (tmp_path / "sampling.json").write_text(json.dumps(record))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), sampling=np.array(json.dumps(record)))
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))

    assert sampling_record(tmp_path).get("selection") is None
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "sampling.json").write_text(json.dumps({**record, "selection": chosen}))
    assert sampling_record(tmp_path / "chosen")["selection"] == chosen
    assert "best of 4 at t = 0.5" in replace(PROTOCOL, **sampling_record(tmp_path / "chosen")).line()
    for source in (tmp_path, tmp_path / "images.npz"):
        fields = sampling_record(source)
        assert fields == {**drawn, "guidance_interval": (0.0, 0.7)}
        assert replace(PROTOCOL, **fields).line().count("sde, 250 steps") == 1
    # One that names hundreds of classes.
    long = {**record, "label_policy": " and ".join(f"class number {i}" for i in range(2_000))}
    np.savez(tmp_path / "long.npz", sampling=np.array(json.dumps(long)))
    assert sampling_record(tmp_path / "long.npz")["label_policy"] == long["label_policy"]
    assert sampling_record(tmp_path / "plain.npz") == {}
    for text in ("{", '{"steps": "many"}', "[]"):
        (tmp_path / "sampling.json").write_text(text)
        with pytest.raises(EvaluationError, match=r"the sampling record of .* is damaged"):
            sampling_record(tmp_path)
