"""The benchmarks run, resume and write what they say; nothing here depends on how fast they are."""

from __future__ import annotations

import importlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from vrpo.config_load import build_config, load_preset
from vrpo.errors import ConfigError
from vrpo.planning.live_bytes import LiveBytes
from vrpo.training.trainer import Trainer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


# -- cost -------------------------------------------------------------------------------------------------------------


def test_live_bytes_are_counted_storage_by_storage() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as live:
        first = given + 1  # 4,000
        view = first[:10]
        given.add_(1)  # nothing new
        second = first.double()  # 12,000: the peak
        del second  # 4,000
        del first  # its storage lives on in the view
        third = torch.zeros(1500)  # 10,000
        del view  # 6,000
        assert live.live == third.nbytes == 6_000
    assert live.peak == 12_000


def test_live_bytes_see_what_autograd_keeps_and_what_backward_makes() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(32, 64)
    with LiveBytes() as live:
        hidden = torch.sin(x @ weight)  # the product is kept for the backward pass, the sine is not
        loss = hidden.sum()
        del hidden
        held = live.live
        loss.backward()
        after = live.live
    product = 4 * 32 * 64
    assert product <= held <= product + 64
    assert weight.grad is not None
    assert after == weight.grad.nbytes + loss.nbytes


def test_paired_ratio_is_immune_to_common_drift() -> None:
    reference = np.linspace(1, 3, 41)
    ratio, low, high = load("timing").paired_ratio(1.25 * reference, reference)
    assert (ratio, low, high) == (1.25, 1.25, 1.25)
    noisy = 1.25 * reference * np.exp(0.05 * np.random.default_rng(0).standard_normal(41))
    ratio, low, high = load("timing").paired_ratio(noisy, reference)
    assert low < ratio < high
    assert low < 1.25 < high


def test_cost_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = load("objective_cost")
    names = ["none", "repa", "vrpo analytic", "vrpo sampled", "repa online", "vrpo analytic online, 4 noisings"]
    file = cost.main(["--quick", "--device", "cpu", "--rounds", "2", "--contenders", *names, "--out", str(tmp_path)])
    result = json.loads(file.read_text())["quick"]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == names
    assert result["machine"]["torch"] == torch.__version__
    for row in rows.values():
        assert np.isfinite(row["loss"])
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        low, high = row["time_ratio_95"]
        assert low <= row["time_ratio"] <= high
    assert rows["repa"]["time_ratio"] == rows["repa"]["memory_ratio"] == rows["repa online"]["time_ratio"] == 1
    assert rows["none"]["peak_bytes"] < rows["repa"]["peak_bytes"] < rows["repa online"]["peak_bytes"]
    assert rows["repa"]["standing_bytes"] < rows["vrpo analytic"]["standing_bytes"]
    assert rows["repa online"]["encoder"] is not None
    trunk = cost.Bench(cost.QUICK, torch.device("cpu")).trunk
    weights = 4 * sum(parameter.numel() for parameter in trunk.parameters())
    # Weights, their average and two moments; tables, labels and counters are small.
    assert 4 * weights < rows["none"]["standing_bytes"] < 4.2 * weights
    assert "| vrpo analytic |" in capsys.readouterr().out

    load("timing").update_results(tmp_path, "objective-cost", result["machine"], {"another": {}})
    assert set(json.loads(file.read_text())) == {"quick", "another"}


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = load("sampling")
    words = ["--quick", "--device", "cpu", "--contenders", "fp32", "bf16", "--out", str(tmp_path)]
    result = json.loads(sampling.main(words).read_text())["quick"]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["plain loop", "fp32", "bf16"]
    assert rows["plain loop"]["speed_up"] == 1
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] > 0
        assert 0 < row["share_of_peak"] < 1
    # All do the same work: the same pixels but for rounding.
    assert rows["fp32"]["largest_difference"] <= 1
    assert 0 < rows["bf16"]["largest_difference"] < 16
    assert "| bf16 |" in capsys.readouterr().out


def test_operations_of_a_network_are_those_of_its_products() -> None:
    sampling = load("sampling")
    case = sampling.QUICK
    network = sampling.build(case, torch.device("cpu"))
    tokens, width, blocks = network.num_tokens, network.hidden_size, network.depth
    # By block: attention's four and the perceptron's eight products of width x width a token, scores and their
    # product with the values, and the modulation of an image.
    products = blocks * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2)
    assert 1 < sampling.operations(case, network, torch.device("cpu")) / (2 * products) < 1.1


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_say_what_they_were_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--samples", "60", "--reference", "60", "--width", "16", "--steps", "kid", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["metrics.py", *sizes, "--out", str(tmp_path)])
    load("metrics").main()
    record = json.loads((tmp_path / "metrics-60x60x16.json").read_text())
    assert record["results"]["kid"]["seconds"] > 0
    machine = load("machine").describe(torch.device("cpu"))
    steady = [key for key in machine if key not in ("load_average", "threads")]
    assert {key: record["machine"][key] for key in steady} == {key: machine[key] for key in steady}
    assert record["machine"]["threads"] == 1


# -- engine -----------------------------------------------------------------------------------------------------------


def test_engine_quick(tmp_path: Path) -> None:
    file = load("engine").main(["--quick", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)])
    result = json.loads(file.read_text())
    for part in ("ddp", "determinism"):
        low, high = result[part]["ratio_95"]
        assert 0 < low <= result[part]["ratio"] <= high
    checkpoint = result["checkpoint"]
    assert checkpoint["copy"] > 0
    for delay in ("delay_beside", "delay_waiting"):
        middle, low, high = checkpoint[delay]
        assert low <= middle <= high
    assert {name: len(turns) for name, turns in checkpoint["seconds"].items()} == dict.fromkeys(
        ("alone", "beside", "waiting"), 2
    )
    trunk = load("objective_cost").Bench(load("objective_cost").QUICK, torch.device("cpu"), False).trunk
    assert checkpoint["bytes"] > 4 * 4 * sum(parameter.numel() for parameter in trunk.parameters())
    kept, recomputed = result["throughput"]["rows"]
    assert (kept["checkpoint_blocks"], recomputed["checkpoint_blocks"]) == (False, True)
    assert kept["step_flops"] == recomputed["step_flops"] > 0


# -- variants ---------------------------------------------------------------------------------------------------------


def test_every_named_variant_is_a_configuration_of_its_own() -> None:
    from vrpo.alignment.build import TrunkShape, build_objective

    seen: dict[str, str] = {}
    for name, variant in load("variants").VARIANTS.items():
        config = build_config(load_preset(f"demo-{variant.objective}"), variant.words, "the test")
        build_objective(config.align, TrunkShape(32, depth=6, num_heads=4, tokens=16, size="N"), (8,))
        values = config.model_copy(update={"name": ""}).model_dump_json()
        assert values not in seen, f"{name} repeats {seen.get(values)}"
        seen[values] = name


def test_variants_are_read_from_words() -> None:
    parse = load("variants").parse_variant
    assert parse("repa-noisings-4").words == ["--train.noisings", "4"]
    changed = parse("vrpo-no-gate:align.vrpo.fidelity=2,align.depth=2 3")
    assert changed.words == ["--align.vrpo.gate", "False", "--align.vrpo.fidelity", "2", "--align.depth", "2", "3"]
    assert parse("mine@repa:align.weight=2").name == "mine"
    with pytest.raises(ConfigError, match="did you mean 'vrpo-no-gate'"):
        parse("vrpo-nogate")
    with pytest.raises(ConfigError, match=r"write vrpo:align\.vrpo\.gate=False"):
        parse("vrpo:gate")


# -- comparison -------------------------------------------------------------------------------------------------------


def record(variant: str, seed: int, value: float, protocol: str = "p") -> dict[str, Any]:
    costs = dict.fromkeys(load("comparison").COSTS, 1.0)
    score = {"measure": "FD", "features": "", "protocol": {"name": protocol}, "protocol_line": protocol, "value": value}
    about = {"about": "", "objective": variant, "changes": {}}
    return {"variant": variant, "seed": seed, **about, **costs, "scores": [score]}


def test_summary_pairs_by_seed() -> None:
    draws = np.random.default_rng(0)
    base, other = 100 + 10 * draws.standard_normal(4), 90 + 10 * draws.standard_normal(4)
    records = [record("repa", seed, value) for seed, value in enumerate(base)]
    records += [record("vrpo", seed, value) for seed, value in reversed(list(enumerate(other)))]
    records.append(record("vrpo", 0, 5.0, "another protocol"))
    summary = load("comparison").summarise(records, "repa")
    assert [variant["variant"] for variant in summary["variants"]] == ["repa", "vrpo"]
    assert list(summary["protocols"]) == ["FD", "FD (2)"]
    score = summary["variants"][1]["scores"]["FD"]
    low, high = scipy.stats.ttest_rel(other, base).confidence_interval()
    assert score["difference"]["mean"] == pytest.approx((low + high) / 2)
    assert score["difference"]["half_width"] == pytest.approx((high - low) / 2)
    low, high = scipy.stats.ttest_1samp(other, 0).confidence_interval()
    assert score["half_width"] == pytest.approx((high - low) / 2)
    assert summary["variants"][0]["scores"]["FD"]["difference"] is None
    assert summary["variants"][1]["scores"]["FD (2)"]["difference"] is None


# -- objectives -------------------------------------------------------------------------------------------------------


def words_of(out: Path) -> list[str]:
    return ["--quick", "--out", str(out), "--variants", "none", "repa", "--seeds", "0", "--jobs", "2", "--threads", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of two runs, of which one was there before it began and one was stopped half-way."""
    out = tmp_path_factory.mktemp("benchmark")
    objectives = load("objectives")
    _, (none, repa) = objectives.read(words_of(out))
    Trainer(none.config, none.run, say=lambda line: None).train()

    def interrupt(report: Any) -> None:
        if report.images == 256:
            os.kill(os.getpid(), signal.SIGINT)

    Trainer(repa.config, repa.run, say=lambda line: None, display=interrupt).train()
    assert none.trained
    assert not repa.trained
    assert objectives.main(words_of(out)) == 0
    assert none.log.exists() is False, "a finished run was started again"
    log = repa.log.read_text()
    assert "Resumed" in log
    assert "Caching" not in log, "the tokens were not cached before the run"
    return out


def test_objectives_writes_results(finished: Path) -> None:
    results = {name: json.loads((finished / f"{name}-seed-0.json").read_text()) for name in ("none", "repa")}
    for name, result in results.items():
        assert result["variant"] == result["objective"] == name
        assert result["images"] == 512
        assert result["images_per_second"] > 0
        scores = {score["measure"]: score for score in result["scores"]}
        assert {"Held-out loss", "Precision", "Recall"} < set(scores)
        assert scores["Held-out loss"]["curve"]["images"][-2:] == [256, 512]
        assert ("Held-out alignment" in scores) == (name == "repa")
        assert any(label.startswith("FD-") for label in scores)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["baseline"] == "repa"
    assert summary["failed"] == {}
    none = next(variant for variant in summary["variants"] if variant["variant"] == "none")
    values = [
        next(score["value"] for score in results[name]["scores"] if score["measure"] == "Held-out loss")
        for name in ("none", "repa")
    ]
    difference = none["scores"]["Held-out loss"]["difference"]
    assert difference["mean"] == pytest.approx(values[0] - values[1])
    assert difference["half_width"] is None
    assert "| none | 1 |" in (finished / "summary.md").read_text()
    assert "<html" in (finished / "report.html").read_text()
    assert json.loads((finished / "report.json").read_text())["baseline"] == "repa"


def test_objectives_repeated_starts_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = load("objectives")
    monkeypatch.setattr(load("jobs").subprocess, "Popen", None)
    before = (finished / "summary.md").read_text()
    assert objectives.main(words_of(finished)) == 0
    assert (finished / "summary.md").read_text() == before


def test_a_record_s_configuration_makes_the_same_run_again(finished: Path) -> None:
    from vrpo.config_load import build_config

    _, jobs = load("objectives").read(words_of(finished))
    for job in jobs:
        kept = json.loads(job.record.read_text("utf-8"))["config"]
        assert "/" not in kept["data.path"]
        words = [word for key, value in kept.items() for word in (f"--{key}", str(value))]
        again = build_config({}, words, "record").model_dump()
        wanted = job.config.model_dump()
        for path in ("path", "validation"):
            assert str(again["data"].pop(path)) == wanted["data"].pop(path).name
        del wanted["name"], again["name"]
        assert again == wanted


def test_objectives_refuses_another_budget(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.images 512 and is now asked for with 1024"):
        load("objectives").main([*words_of(finished), "--images", "1024"])


def test_judges_score_finished_runs(finished: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from vrpo.cli import main

    objectives = load("objectives")
    weights = finished / "judge.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False, num_classes=0).state_dict(), weights)
    _, jobs = objectives.read([*words_of(finished), "--judge", f"test_resnet={weights}", "--judge-samples", "24"])
    command = jobs[0].next_command()
    assert command is not None
    assert command[0] == "evaluate"
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    assert jobs[0].next_command() is None
    scores = load("comparison").run_record(jobs[0].run, jobs[0].variant, 0)["scores"]
    judged = [score for score in scores if score["protocol"].get("features.name") == "test_resnet"]
    assert {score["metric"] for score in judged} == {"fd", "kid", "precision", "recall"}
    with pytest.raises(ConfigError, match="no weights file"):
        objectives.read([*words_of(finished), "--judge", "test_resnet=absent.safetensors"])


class Process:
    """Stands for a process that ends at once, with this code."""

    code = 0
    terminated = 0

    def __init__(self, command: list[str], stdout: Any, **options: Any) -> None:
        self.command = command
        stdout.write(b"first line\nvrpo: a reason.\n\n")

    def poll(self) -> int | None:
        return self.code

    def wait(self) -> int:
        return self.code

    def terminate(self) -> None:
        Process.terminated += 1


def unfinished_jobs(finished: Path, tmp_path: Path) -> list[Any]:
    _, jobs = load("objectives").read(words_of(finished))
    return [replace(job, run=tmp_path / job.variant.name / "seed-0") for job in jobs]


def test_a_run_that_fails_does_not_stop_the_others(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = load("jobs")
    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "code", 2)
    said: list[str] = []
    failed = jobs.execute(unfinished_jobs(finished, tmp_path), 1, 1, said.append)
    assert failed == {"none seed 0": "vrpo: a reason.", "repa seed 0": "vrpo: a reason."}
    assert "2 runs, 0 of them done" in said[0]


def test_interrupted_it_stops_its_processes(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = load("jobs")
    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "code", None)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        jobs.execute(unfinished_jobs(finished, tmp_path), 2, 2, lambda line: None)
    assert Process.terminated == 2


def test_objectives_says_what_is_wrong(tmp_path: Path) -> None:
    read = load("objectives").read
    with pytest.raises(ConfigError, match="--out is not set"):
        read(["--variants", "none"])
    out = ["--out", str(tmp_path)]
    with pytest.raises(ConfigError, match="the variants vrpo and same are the same"):
        read([*out, "--variants", "vrpo", "same@vrpo:align.vrpo.gate=True"])
    with pytest.raises(ConfigError, match="--baseline repa is not among"):
        read([*out, "--variants", "none", "vrpo", "--baseline", "repa"])
    with pytest.raises(ConfigError, match=r"there is no option '--encoder\.nam'"):
        read([*out, "--variants", "none", "--encoder.nam", "x"])


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("objectives").main(["--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(load("variants").VARIANTS)


# -- candidates -------------------------------------------------------------------------------------------------------


def test_candidates_are_compared_at_equal_evaluations() -> None:
    from vrpo.sampling.candidates import Selection

    candidates = load("candidates")
    selections = [Selection(4, 0.5, "best"), Selection(4, 0.5, "resample"), Selection(2, 0.8, "best")]
    made = candidates.contenders(50, selections, [1.5])
    steps = {contender.name: contender.steps for contender in made}
    # 50 (4/2 + 1/2) and 50 (2/5 + 4/5) evaluations an image; guidance takes two a step.
    assert steps == {
        "plain": 50,
        "best of 4 at 0.5": 50,
        "resample of 4 at 0.5": 50,
        "best of 2 at 0.8": 50,
        "60 steps": 60,
        "125 steps": 125,
        "guidance 1.5, 30 steps": 30,
        "guidance 1.5, 50 steps": 50,
        "guidance 1.5, 62 steps": 62,
    }


def test_evaluations_are_rows_of_the_network() -> None:
    network = torch.nn.Linear(3, 3)
    count = load("candidates").Evaluations(network)
    network(torch.zeros(5, 3))
    network(torch.zeros(2, 3))
    count.close()
    network(torch.zeros(4, 3))
    assert count.rows == 7
