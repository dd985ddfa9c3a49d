"""Comparisons of fabricated runs: grouping, protocols, differences, and the sentence that sums up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import PROTOCOL
from scipy import stats

from vrpo.errors import DataError
from vrpo.evaluation.protocol import network_label
from vrpo.report.compare import compare
from vrpo.report.measures import Measure, evaluation_protocol, measure_curves
from vrpo.runs import Run

MakeRun = Callable[..., Path]


def _scores(run: Path, metric: str) -> dict[int, float]:
    return {r["images"]: r["metrics"][metric] for r in Run(run).metrics("evaluation")}


def _text(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html)


@pytest.fixture
def seeds(make_run: MakeRun) -> dict[str, list[Path]]:
    return {
        objective: [make_run(f"{objective}-{seed}", objective, seed, samples=False) for seed in range(3)]
        for objective in ("repa", "none")
    }


def test_seeds_are_grouped_and_paired_against_none(seeds: dict[str, list[Path]], tmp_path: Path) -> None:
    found = compare([*seeds["repa"], *seeds["none"]], tmp_path / "r.html")
    assert [(group.label, group.seeds) for group in found.groups] == [("none", (0, 1, 2)), ("repa", (0, 1, 2))]
    (table,) = found.tables
    measure = next(item for item in table.measures if item.metric == "fd")
    assert (measure.label, table.images[measure]) == ("FD-MobileNetV2", 51_200)
    final = {group.label: row[measure] for group, row in table.rows}["repa"]
    repa, none = (np.array([_scores(run, "fd")[51_200] for run in seeds[name]]) for name in ("repa", "none"))
    low, _ = stats.t.interval(0.95, 2, loc=0, scale=stats.sem(repa - none))
    assert final.score is not None
    assert final.difference is not None
    assert final.score.mean == pytest.approx(repa.mean())
    assert final.difference.mean == pytest.approx((repa - none).mean())
    assert final.difference.half_width == pytest.approx(-low)
    assert found.differences == {"align.objective": {"none": "none", "repa": "repa"}}
    assert found.warnings == ()


def test_speed_up_of_a_run_agrees_with_numpy(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("none", "none", samples=False), make_run("repa", "repa", samples=False)]
    found = compare(runs, tmp_path / "r.html")
    row = next(row for row in found.speed_ups if row.measure.metric == "fd")
    none, repa = (_scores(run, "fd") for run in runs)
    # Both curves fall all the way, so the crossing is numpy's interpolation of the inverse.
    assert np.all(np.diff(list(repa.values())) < 0)
    needs = np.interp(-none[51_200], -np.array(list(repa.values())), list(repa))
    assert row.images.ratio == pytest.approx(51_200 / needs)
    assert row.images.low is None
    assert re.fullmatch(
        r"repa reaches none's final FD-MobileNetV2 in [\d.]+x fewer images and [\d.]+x less time "
        r"\(\d+ vs \d+ at 51,200 images\)",
        found.result,
    )
    assert any("One seed" in line for line in found.warnings)


def test_not_reached_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("none", "none", samples=False), make_run("repa", "repa", samples=False)]
    found = compare(runs, tmp_path / "r.html", baseline="repa")
    assert found.baseline.label == "repa"
    assert re.match(r"none does not reach repa's final FD-MobileNetV2 \(\d+ vs \d+ at", found.result)
    assert "not reached" in (tmp_path / "r.html").read_text()


def test_an_unknown_baseline_and_no_runs_are_one_sentence(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run to serve as baseline 'repo': did you mean 'repa'"):
        compare([make_run("repa", "repa", samples=False)], tmp_path / "r.html", baseline="repo")
    with pytest.raises(DataError, match="no runs to compare"):
        compare([], tmp_path / "r.html")
    with pytest.raises(DataError, match="no run at"):
        compare([tmp_path], tmp_path / "r.html")


def test_protocols_never_share_a_table(make_run: MakeRun, tmp_path: Path) -> None:
    other = {**PROTOCOL, "steps": 20}
    runs = [
        make_run("none", "none", samples=False),
        make_run("repa", "repa", samples=False),
        make_run("irepa", "irepa", samples=False, protocol=other),
    ]
    found = compare(runs, tmp_path / "r.html")
    by_protocol = {
        json.loads(table.protocol.key)["steps"]: [group.label for group, _ in table.rows]
        for table in found.tables
        if table.protocol
    }
    assert by_protocol == {50: ["none", "repa"], 20: ["irepa"]}
    for table in found.tables:
        sampled = {m.protocol for m in table.measures if not m.protocol.held_out}
        assert sampled == {table.protocol}
    assert any("separate tables" in line for line in found.warnings)
    assert {row.group.label for row in found.speed_ups if not row.measure.protocol.held_out} == {"repa"}
    # In the page, too, no table holds the two distances.
    html = (tmp_path / "r.html").read_text()
    values = [f"{_scores(run, 'fd')[51_200]:.0f}" for run in runs]
    tables = [_text(part) for part in re.findall(r"<table.*?</table>", html, flags=re.S)]
    assert not any({values[0], values[2]} <= set(table.split()) for table in tables)
    assert all(any(value in table.split() for table in tables) for value in values)


def test_small_evaluations_of_training_never_share_a_table_or_curve_with_full_ones(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Even where all else of the protocol is the same."""
    runs = []
    for objective in ("none", "repa"):
        folder = make_run(objective, objective, samples=False, protocol={**PROTOCOL, "occasion": "training"})
        last = Run(folder).metrics("evaluation")[-1]
        full = {"step": last["step"], "metrics": {"fd": 12.5}, "protocol": PROTOCOL}
        (folder / "evaluations").mkdir(exist_ok=True)
        (folder / "evaluations" / "full.json").write_text(json.dumps(full))
        runs.append(folder)
    found = compare(runs, tmp_path / "r.html")
    for group in found.groups:
        lengths = {m.protocol.text: len(curve.images) for m, curve in group.curves[0].items() if m.metric == "fd"}
        assert sorted(lengths.values()) == [1, 8]
        small = [text for text in lengths if text.startswith("small evaluation during training of 2,000 samples")]
        assert [lengths[text] for text in small] == [8]
    for table in found.tables:
        assert len({m.protocol for m in table.measures if not m.protocol.held_out}) == 1
    assert len(found.tables) == 2
    assert "small evaluation during training" in (tmp_path / "r.html").read_text()


def test_held_out_losses_on_other_data_never_share_a_table(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run("none", "none", samples=False, evaluations=4),
        make_run("repa", "repa", samples=False, evaluations=4, config={"diffusion": {"path": "cosine"}}),
    ]
    found = compare(runs, tmp_path / "r.html")
    assert [[group.label for group, _ in table.rows] for table in found.tables] == [["none"], ["repa"]]
    assert all(not row.measure.protocol.held_out for row in found.speed_ups)


def test_the_seed_of_samples_is_no_other_protocol_and_key_order_neither() -> None:
    first = evaluation_protocol({"protocol": {"steps": 50, "seed": 0, "features": "a"}})
    second = evaluation_protocol({"protocol": {"features": "a", "steps": 50, "seed": 7}})
    assert first == second
    assert first != evaluation_protocol({"protocol": {"steps": 51, "features": "a"}})


@pytest.mark.parametrize(
    ("metric", "network", "label"),
    [
        ("fd", "MobileNetV2", "FD-MobileNetV2"),
        ("fd", "inception", "FID"),
        ("is", "inception", "IS"),
        ("recall", "MobileNetV2", "Recall"),
        ("fd", "inception-random", "FD-random Inception"),
        ("sfid", "inception-random", "sFD-random Inception"),
        ("is", "inception-random", "IS-random Inception"),
        ("denoising", "", "Held-out loss"),
        ("precision", "", "Precision"),
        ("fd", "", "FD"),
    ],
)
def test_only_distances_in_inception_are_called_fid(metric: str, network: str, label: str) -> None:
    protocol = evaluation_protocol({"protocol": {"features": {"name": network}}})
    assert Measure(protocol, metric).label == label
    if network:
        recorded = {"name": network_label(network), "architecture": network}
        assert Measure(evaluation_protocol({"protocol": {"features": recorded}}), metric).label == label


def test_scores_of_several_sample_seeds_are_averaged(make_run: MakeRun) -> None:
    run = make_run("none", samples=False, evaluations=2)
    last = Run(run).metrics("evaluation")[-1]
    (run / "evaluations").mkdir()
    for name, seed, value in (("b", 1, 10.0), ("a", 2, 40.0)):
        protocol = {**PROTOCOL, "steps": 51, "seed": seed, "kid": {"subsets": 100, "subset_size": 1000, "seed": 0}}
        scored = {"step": last["step"], "metrics": {"fd": value, "kid": None}, "protocol": protocol}
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(scored))
    curves = [curve for measure, curve in measure_curves(Run(run)).items() if '"steps": 51' in measure.protocol.key]
    (curve,) = curves
    assert (curve.images, curve.seconds, curve.scores) == ((last["images"],), (last["seconds"],), (25.0,))


def test_runs_without_evaluations_still_give_a_report(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("none", "none"), make_run("repa", "repa", evaluations=0, samples=False)]
    found = compare(runs, tmp_path / "r.html")
    assert [group.label for group, _ in found.tables[0].rows] == ["none", "repa"]
    assert "No evaluation of samples: repa." in found.warnings
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("seed: 0\n")
    alone = compare([bare], tmp_path / "bare.html")
    assert alone.result == "one configuration, none: nothing to compare it with"
    assert "<h1>One configuration: none</h1>" in (tmp_path / "bare.html").read_text()


def test_held_out_loss_is_compared_where_nothing_was_sampled(make_run: MakeRun, tmp_path: Path) -> None:
    runs = []
    for objective in ("none", "repa"):
        run = make_run(objective, objective, samples=False)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["kind"] != "evaluation"]
        (run / "metrics.jsonl").write_text("".join(kept))
        runs.append(run)
    found = compare(runs, tmp_path / "r.html")
    assert found.result.startswith("repa reaches none's final Held-out loss in ")


def test_unequal_budgets_are_scored_at_the_common_one(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run("none", "none", samples=False),
        make_run("repa", "repa", samples=False, images=25_600, evaluations=4),
    ]
    found = compare(runs, tmp_path / "r.html")
    (table,) = found.tables
    measure = next(item for item in table.measures if item.metric == "fd")
    none = next(row[measure].score for group, row in table.rows if group.label == "none")
    assert table.images[measure] == 25_600
    assert none is not None
    assert none.mean == _scores(runs[0], "fd")[25_600]
    assert any("different numbers of images" in line for line in found.warnings)
    assert "More than the objective differs: train.images." in found.warnings


def test_variants_are_labelled_by_what_sets_them_apart(make_run: MakeRun, tmp_path: Path) -> None:
    def variant(folder: str, **align: Any) -> Path:
        align = {"vrpo": {"gate": True, "sigma0": 0.25}, **align}
        return make_run(folder, "haste", samples=False, evaluations=2, config={"align": align})

    runs = [
        variant("a"),
        variant("b", vrpo={"gate": False, "sigma0": 0.25}),
        variant("c", weight=1.5),
        variant("again"),
    ]
    found = compare(runs, tmp_path / "r.html")
    assert [group.label for group in found.groups] == ["haste", "haste (gate off)", "haste (weight 1.5)"]
    assert any(line.startswith("again repeats another run's") for line in found.warnings)
    assert set(found.differences) == {"align.vrpo.gate", "align.weight"}


def test_what_acts_inside_the_trunk_is_part_of_a_group_s_name(make_run: MakeRun, tmp_path: Path) -> None:
    parts = {
        "vrpo": {},
        "vrpo + scaffold": {"scaffold": {"supply": "advantage"}},
        "vrpo + clock scaffold": {"scaffold": {"supply": "clock"}},
        "vrpo + token": {"token": {"use": True}},
        "vrpo + token policy": {"token": {"use": True, "tau": 1.0}},
        "vrpo + scaffold + token": {"scaffold": {"supply": "advantage"}, "token": {"use": True}},
    }
    runs = [
        make_run(str(index), "vrpo", samples=False, evaluations=2, config={"align": align})
        for index, align in enumerate(parts.values())
    ]
    own = {"scaffold": {"supply": "clock"}, "token": {"use": True}}
    runs += [make_run(name, name, samples=False, evaluations=2, config={"align": own}) for name in ("repi", "reg")]
    found = compare(runs, tmp_path / "r.html", baseline="vrpo")
    assert [group.label for group in found.groups] == [*parts, "repi + token", "reg + clock scaffold"]


def test_where_and_by_what_a_run_was_made_is_no_other_experiment(make_run: MakeRun, tmp_path: Path) -> None:
    def trained(name: str, seed: int, weights: str = "9f3c" * 16, held_out: str = "11" * 32) -> Path:
        here = f"/machine-{name}"
        settings = {
            "data": {"path": f"{here}/data", "validation": f"{here}/{name}"},
            "encoder": {"weights": f"{here}/encoder.safetensors", "name": f"{here}/folder"},
            "train": {"device": f"cuda:{seed}", "compile": seed > 0, "parallel": "fsdp", "keep_checkpoints": seed},
            "evaluate": {"weights": f"{here}/judge.safetensors"},
        }
        run = make_run(name, "repa", seed, samples=False, evaluations=2, config=settings)
        facts = json.loads((run / "run.json").read_text())
        facts["encoders"] = [f"x weights={weights} input=32 precision={'float32' if seed else 'bfloat16'}"]
        facts["held_out"] = {"path": f"{here}/{name}", "fingerprint": held_out, "images": 1000}
        (run / "run.json").write_text(json.dumps(facts))
        return run

    same = [trained(f"seed-{seed}", seed) for seed in range(3)]
    found = compare(same, tmp_path / "r.html")
    assert [group.seeds for group in found.groups] == [(0, 1, 2)]
    assert len({m.protocol for curves in found.groups[0].curves for m in curves if m.protocol.held_out}) == 1
    others = [trained("other-encoder", 3, weights="ab" * 32), trained("other-images", 4, held_out="22" * 32)]
    found = compare([*same, *others], tmp_path / "r.html")
    assert sorted(len(group.runs) for group in found.groups) == [1, 1, 3]
    assert set(found.differences) == {"encoder.weights", "data.validation", "train.compile"}


def test_held_out_images_are_told_by_their_fingerprint_not_by_the_folder_s_name(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(name, name, samples=False, evaluations=2) for name in ("none", "repa")]
    for run, fingerprint in zip(runs, ("11" * 32, "22" * 32), strict=True):
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**facts, "held_out": {"fingerprint": fingerprint}}))
    found = compare(runs, tmp_path / "r.html")
    assert not any(row.measure.protocol.held_out for row in found.speed_ups)


@pytest.mark.parametrize(
    ("network", "recorded", "circular"),
    [
        ("tf_efficientnet_lite0", None, True),
        ("resnet18", None, False),
        ("somewhere", f"x weights={'9f3c' * 16} input=32", True),
        ("tf_efficientnet_lite0", f"x weights={'ab' * 32} input=32", False),
    ],
)
@pytest.mark.parametrize("objective", ["none", "repa"])
def test_scoring_in_the_network_of_the_image_distance_is_called_circular(
    make_run: MakeRun, tmp_path: Path, objective: str, network: str, recorded: str | None, circular: bool
) -> None:
    features = {**PROTOCOL["features"], "name": "EfficientNet-Lite0", "architecture": "tf_efficientnet_lite0"}
    config = {
        "encoder": {"name": "resnet10t"},
        "align": {"perceptual_image": {"kind": "encoder", "network": network, "network_weights": None}},
    }
    protocol = {**PROTOCOL, "features": features}
    run = make_run("run", objective, samples=False, protocol=protocol, config=config)
    if recorded:
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**info, "encoders": [], "image_distance": recorded}))
    assert any("circular" in line for line in compare([run], tmp_path / "r.html").warnings) is circular


@pytest.mark.parametrize(
    ("recorded", "circular"),
    [(None, True), (["x weights=9f3c input=224"], False), ([f"x weights={'9f3c' * 16} input=224"], True)],
)
def test_scoring_in_the_encoder_aligned_to_is_called_circular(
    make_run: MakeRun, tmp_path: Path, recorded: list[str] | None, circular: bool
) -> None:
    features = {**PROTOCOL["features"], "name": "EfficientNet-Lite0", "architecture": "tf_efficientnet_lite0"}
    protocol = {**PROTOCOL, "features": features}
    runs = [make_run(name, name, samples=False, protocol=protocol) for name in ("none", "repa")]
    if recorded:
        info = json.loads((runs[1] / "run.json").read_text())
        (runs[1] / "run.json").write_text(json.dumps({**info, "encoders": recorded}))
    assert any("circular" in line for line in compare(runs, tmp_path / "r.html").warnings) is circular


def test_rewards_that_were_dropped_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("vrpo", "vrpo", samples=False, evaluations=2)
    lines = (
        (run / "metrics.jsonl")
        .read_text()
        .replace('"objective/dropped_fidelity": 0.0', '"objective/dropped_fidelity": 2')
    )
    (run / "metrics.jsonl").write_text(lines)
    found = compare([run], tmp_path / "r.html")
    assert "vrpo: the reward fidelity was not finite for 200 tokens." in found.warnings


def test_the_json_beside_it_is_strict_and_says_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("none", "none", samples=False), make_run("repa", "repa", samples=False)]
    found = compare(runs, tmp_path / "out" / "r.html", json_file=True)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "out" / "r.json").read_text(), parse_constant=refuse)
    assert content["result"] == found.result
    assert content["tables"][0]["rows"]["none"]["fd"]["score"]["n"] == 1
    assert not (tmp_path / "r.json").exists()
