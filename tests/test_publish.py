"""Runs become what the published code reads, and published checkpoints become runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoencoder_files import save_autoencoder
from vrpo.alignment.build import TrunkShape, build_objective
from vrpo.checkpoints import Checkpoint, find_checkpoints, read_state
from vrpo.cli import main
from vrpo.config_load import load_file as load_yaml
from vrpo.config_load import merge, to_yaml, validate
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.models.weights import load_published, save_published
from vrpo.runs import Run
from vrpo.training.checkpoint import save_checkpoint
from vrpo.training.trainer import train

CLASSES = ("cat", "dog", "eel")
ENCODER_WIDTHS = (20, 12)
TOKEN = 12
OBJECTIVES: dict[str, dict[str, Any]] = {
    "none": {"objective": "none"},
    "repa": {"objective": "repa"},
    "reg": {"objective": "reg"},
    "irepa": {"objective": "irepa"},
    "haste": {"objective": "haste"},
    "vrpo": {"objective": "vrpo", "vrpo": {"trust": 0.05}},
    "repi": {"objective": "repi"},
    "vrpo-scaffold": {"objective": "vrpo", "scaffold": {"supply": "advantage"}},
    "deep": {"objective": "repa", "depth": [1, 2]},
}
LATENTS = {
    "latents": {
        "autoencoder": "somewhere",
        "weights": None,
        "channels": 4,
        "size": 8,
        "posterior": True,
        "precision": "fp32",
        "normalisation": "channels",
        "pixels": False,
    },
    "normaliser": {"shift": [0.1, 0.2, 0.3, 0.4], "scale": [0.5, 0.6, 0.7, 0.8]},
}


def perturbed(network: DiffusionTransformer, seed: int) -> DiffusionTransformer:
    """Add noise to every parameter, so that no layer that starts at zero hides a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return network.eval()


def make_run(
    folder: Path, objective: str = "none", kind: str = "SiT", latents: bool = False, classes: int = 3, **model: Any
) -> Path:
    """Write a run as training does: both sets of weights, the objective's own state, and what is recorded."""
    sampler = "ddim" if kind == "DiT" else "ode-euler"
    config = validate(
        {
            "name": "small",
            "model": {"name": f"{kind}-N/4", **model},
            "data": {"conditional": classes > 0},
            "align": {"projector_width": 16, **OBJECTIVES[objective]},
            "sample": {"steps": 4, "compute_batch": 4, "sampler": sampler},
        },
        "the test",
    )
    tensors: dict[str, dict[str, Tensor]] = {"optimizer": {}}
    for seed, part in enumerate(("model", "ema")):
        network = build_transformer(
            config.model.name,
            input_size=8,
            in_channels=4 if latents else 3,
            num_classes=classes,
            qk_norm=config.model.qk_norm,
        )
        if config.align.uses_token:
            network.add_token(TOKEN)
        tensors[part] = perturbed(network, seed).state_dict()
    widths = ENCODER_WIDTHS if config.align.side != "none" else ()
    built = build_objective(config.align, TrunkShape.of(network, config.model.name), widths, (10, 10))
    tensors["objective"] = built.state_dict()
    state = {"step": 8, "images": 64, "network": network.config, "class_names": list(CLASSES[:classes])}
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    save_checkpoint(folder, Checkpoint(tensors, {**state, **(LATENTS if latents else {})}), keep=1)
    return folder


def run(words: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def done(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    code, out, err = run(words, capsys)
    assert code == 0, err
    return out


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    code, _, err = run(words, capsys)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    return err


def drawn(source: Path, out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> np.ndarray:
    done(["sample", source, "--out", out, "--count", "6", "--device", "cpu", *words], capsys)
    return np.load(out)["arr_0"]


def state_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    (checkpoint,) = find_checkpoints(folder)
    return checkpoint, read_state(checkpoint, verify=True)


def published_names(projectors: int = 0, token: bool = False) -> set[str]:
    """The parameters of REPA's SiT of four blocks, written down from its code; with REG's token."""
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    modules += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for block in range(4):
        modules += [f"blocks.{block}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        modules += [f"blocks.{block}.adaLN_modulation.1"]
    modules += [f"projectors.{index}.{layer}" for index in range(projectors) for layer in (0, 2, 4)]
    modules += ["cls_projectors2", "wg_norm", "final_layer.linear_cls"] if token else []
    names = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    return names | {"pos_embed", "y_embedder.embedding_table.weight"}


@pytest.mark.parametrize(
    ("objective", "layout", "projectors"),
    [
        ("none", "sit", 0),
        ("repa", "repa", 2),
        ("haste", "repa", 2),
        ("vrpo", "repa", 2),
        ("reg", "reg", 2),
        ("irepa", "sit", 0),
        ("deep", "sit", 0),
        ("repi", "sit", 0),
        ("vrpo-scaffold", "sit", 0),
    ],
)
def test_the_file_has_exactly_the_tensors_that_the_code_publishes(
    objective: str, layout: str, projectors: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_run(tmp_path / "run", objective)
    told = done(["export", source, "--out", tmp_path / "a.safetensors"], capsys)
    assert f"SiT-N/4 of {source} at 64 training images, weights ema, layout {layout}: " in told
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == published_names(projectors, token=objective == "reg")
    trained = load_file(state_of(source)[0] / "objective.safetensors")
    for index in range(projectors):
        for number, name in (("0", "first"), ("2", "second"), ("4", "last")):
            ours = next(n for n in trained if f".{n}".endswith(f".projectors.{index}.{name}.weight"))
            assert torch.equal(found[f"projectors.{index}.{number}.weight"], trained[ours])
        assert found[f"projectors.{index}.4.bias"].shape == (ENCODER_WIDTHS[index],)
    assert ("Projectors in it: 2; they are as trained" in told) == bool(projectors)
    raw = done(["export", source, "--out", tmp_path / "raw.pt", "--weights", "raw"], capsys)
    content = torch.load(tmp_path / "raw.pt", weights_only=True)
    assert content.keys() == {"ema"}
    assert content["ema"].keys() == found.keys()
    assert not torch.equal(content["ema"]["final_layer.linear.bias"], found["final_layer.linear.bias"])
    assert "as trained" not in raw


def test_why_there_are_no_projectors_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for objective, reason in (
        ("none", "align.objective none trained none"),
        ("irepa", "those of the run are convolutions"),
        ("deep", "the run has some after each of 2 blocks, and REPA after one"),
    ):
        source = make_run(tmp_path / objective, objective)
        told = done(["export", source, "--out", tmp_path / "a.safetensors", "--layout", "repa"], capsys)
        assert f"no projectors, without which the code of repa refuses it: {reason}." in told
        assert set(load_file(tmp_path / "a.safetensors")) == published_names()


@pytest.mark.parametrize("objective", ["repi", "vrpo-scaffold"])
def test_a_run_with_a_scaffold_is_a_plain_sit(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plain = make_run(tmp_path / "run", objective), make_run(tmp_path / "plain")
    trained = load_file(state_of(source)[0] / "objective.safetensors")
    assert any("key_projection" in name for name in trained), "the run has no scaffold to leave out"
    files = [tmp_path / "scaffold.safetensors", tmp_path / "plain.safetensors"]
    for folder, file in zip((source, plain), files, strict=True):
        done(["export", folder, "--out", file], capsys)
    found, expected = map(load_file, files)
    assert found.keys() == expected.keys() == published_names()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    done(["export", source, "--out", tmp_path / "repa.safetensors", "--layout", "repa"], capsys)
    assert set(load_file(tmp_path / "repa.safetensors")) == published_names(2)

    networks = [build_transformer("SiT-N/4", input_size=8, in_channels=3, num_classes=3).eval() for _ in range(3)]
    networks[0].load_state_dict(load_file(state_of(source)[0] / "ema.safetensors"))
    load_published(networks[1], files[0], "sit")
    load_published(networks[2], tmp_path / "repa.safetensors", "repa")
    x, t, labels = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        own, as_sit, as_repa = (network(x, t, labels) for network in networks)
    assert own.std() > 0.01
    assert torch.equal(as_repa, own)
    torch.testing.assert_close(as_sit, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("objective", "layout", "changes"),
    [
        ("none", "sit", {}),
        ("repa", "repa", {}),
        ("reg", "reg", {}),
        ("none", "dit", {"kind": "DiT"}),
        ("vrpo", "repa", {"qk_norm": True}),
    ],
    ids=["sit", "repa", "reg", "dit", "qk-norm"],
)
def test_there_and_back_the_images_are_the_same(
    objective: str,
    layout: str,
    changes: dict[str, Any],
    suffix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, file, back = make_run(tmp_path / "run", objective, **changes), tmp_path / f"a{suffix}", tmp_path / "back"
    done(["export", source, "--out", file], capsys)
    words = ["--layout", layout, "--config", source / "config.yaml", "--out", back]
    told = done(["import", file, *words], capsys)
    assert f"-N/4 with 3 classes of {file}: {back}" in told
    seed = ("--seed", "5", "--guidance-scale", "1.5")
    first, second = (drawn(folder, tmp_path / f"{folder.name}.npz", capsys, *seed) for folder in (source, back))
    assert first.std() > 10
    weights = [load_file(state_of(folder)[0] / "ema.safetensors") for folder in (source, back)]
    assert weights[0].keys() == weights[1].keys()
    # SiT's time runs the other way, and turning one layer there and back rounds in float32.
    turned = {"time_embedding.expand.weight"} if layout == "sit" else set()
    assert {name for name, value in weights[0].items() if not torch.equal(weights[1][name], value)} <= turned
    for name in turned:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-7)
    if layout == "sit":
        assert np.abs(first.astype(int) - second).max() <= 1
        assert (first != second).mean() < 0.01
    else:
        assert (first == second).all()

    checkpoint, state = state_of(back)
    assert (checkpoint.name, state["step"], state["images"]) == ("step-00000000", 0, 0)
    assert state["class_names"] == (list(CLASSES) if suffix == ".safetensors" else [])
    info = Run(back).info
    assert (info["status"], info["objective"], info["imported"]["layout"]) == ("imported", objective, layout)
    again = tmp_path / f"again{suffix}"
    done(["export", back, "--out", again, "--layout", layout], capsys)
    named = [load_file(path) if suffix == ".safetensors" else torch.load(path)["ema"] for path in (file, again)]
    assert named[0].keys() == named[1].keys()
    assert {n for n, value in named[0].items() if not torch.equal(named[1][n], value)} <= {"t_embedder.mlp.0.weight"}


def test_a_file_says_what_it_is_and_hands_on_its_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_run(tmp_path / "run", "repa", latents=True)
    file, back = tmp_path / "a.safetensors", tmp_path / "back"
    done(["export", source / "checkpoints" / "step-00000008", "--out", file], capsys)
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    expected = {"layout": "repa", "model": "SiT-N/4", "step": "8", "images": "64", "weights": "ema", "path": "linear"}
    assert about.items() >= expected.items()
    assert (about["time"], about["alignment_depth"]) == (
        "0 is data and 1 is noise, the velocity is noise minus data",
        "1",
    )
    assert json.loads(about["network"])["in_channels"] == 4
    assert json.loads(about["class_names"]) == list(CLASSES)
    done(["import", file, "--layout", "repa", "--config", source / "config.yaml", "--out", back], capsys)
    state = json.loads(json.dumps(state_of(back)[1]))
    assert {name: state[name] for name in LATENTS} == LATENTS
    vae = save_autoencoder(tmp_path / "vae")
    first, second = (
        drawn(folder, tmp_path / f"{folder.name}.npz", capsys, "--decoder", str(vae), "--any-decoder")
        for folder in (source, back)
    )
    assert first.shape == (6, 16, 16, 3)
    assert (first == second).all()


def test_an_official_file_is_sampled_with_a_local_autoencoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the original SiT is published: half precision, a variance nobody uses, no word about latents or classes."""
    network = build_transformer("SiT-N/4", input_size=8, in_channels=4, num_classes=3, learn_sigma=True)
    file, back, names = tmp_path / "SiT.pt", tmp_path / "back", tmp_path / "names.txt"
    save_published(perturbed(network, 0), file, "sit")
    content = torch.load(file)["ema"]
    torch.save({name: value.bfloat16() for name, value in content.items()}, file)
    names.write_text("tench, Tinca tinca\ngoldfish\ngreat white shark\n")
    values = {"model": {"name": "SiT-N/4"}, "data": {"latent_size": 8}, "sample": {"steps": 2}}
    config = tmp_path / "given.yaml"
    config.write_text(json.dumps(values))
    words = ["--layout", "sit", "--config", config, "--out", back, "--class-names", names]
    done(["import", file, *words], capsys)
    _, state = state_of(back)
    assert state["latents"]["autoencoder"] == "sd-vae-ft-ema"
    assert state["normaliser"] == {"shift": [0.0] * 4, "scale": [0.18215] * 4}
    assert (state["latents"]["size"], state["network"]["learn_sigma"]) == (8, True)
    assert Run(back).info["objective"] == "none"
    loaded = load_file(state_of(back)[0] / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in loaded.values())
    vae = save_autoencoder(tmp_path / "sd-vae-ft-ema", scaling_factor=0.18215, shift_factor=None)
    images = drawn(back, tmp_path / "a.npz", capsys, "--decoder", str(vae), "--class", "Goldfish")
    assert images.shape == (6, 16, 16, 3)
    assert images.std() > 5


def test_an_imported_run_is_not_trained_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file, back = make_run(tmp_path / "run"), tmp_path / "a.safetensors", tmp_path / "back"
    done(["export", source, "--out", file], capsys)
    done(["import", file, "--layout", "sit", "--config", source / "config.yaml", "--out", back], capsys)
    told = refused(["train", "--resume", "--out", back], capsys)
    assert told.startswith(f"vrpo: {back} was imported, and weights alone hold no optimiser")
    assert "holds a run already" in refused(["train", "--config", back / "config.yaml", "--out", back], capsys)
    assert "the run names no data" in refused(["evaluate", "probe", back, "--device", "cpu"], capsys)


def test_a_trained_run_comes_back_to_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(24) % 3
    images = np.random.default_rng(0).integers(0, 80, (24, 16, 16, 3)) + 60 * labels[:, None, None, None]
    data = tmp_path / "data"
    prepare(ArraySource(images.astype(np.uint8), labels, CLASSES, "noise"), data, size=16, workers=1, progress=False)
    values = {
        "data": {"path": str(data)},
        "model": {"name": "SiT-N/4"},
        "encoder": {"name": "resnet10t", "weights": "random", "feature": 1, "input_size": 16},
        "align": {"objective": "vrpo", "projector_width": 16, "depth": 2},
        "train": {"images": 16, "batch_size": 8, "device": "cpu"},
        "sample": {"steps": 2, "compute_batch": 4},
    }
    source, file, back = tmp_path / "run", tmp_path / "a.pt", tmp_path / "back"
    train(validate(values, "the test"), source, say=lambda sentence: None)
    assert "layout repa" in done(["export", source, "--out", file], capsys)
    words = ["--layout", "repa", "--config", source / "config.yaml", "--out", back]
    done(["import", file, *words], capsys)
    assert (drawn(source, tmp_path / "1.npz", capsys) == drawn(back, tmp_path / "2.npz", capsys)).all()
    judge = ["--features", "resnet10t", "--features-weights", "random", "--metrics", "fd", "--samples", "8"]
    tables = [done(["evaluate", run, "--reference", data, *judge], capsys) for run in (source, back)]
    assert "FD" in tables[0].upper()
    looking = ["--times", "0.5", "--device", "cpu"]
    found = []
    for folder in (source, back):
        done(["evaluate", "cknna", folder, "--images", "24", *looking], capsys)
        done(["evaluate", "probe", folder, "--test", data, *looking], capsys)
        files = sorted((folder / "evaluations").glob("*-step-*.json"))
        found.append([json.loads(file.read_text())["values"] for file in files])
    assert len(found[0]) == 2
    assert found[0] == found[1]
    assert "was imported" in refused(["train", "--resume", "--out", back, "--data", data], capsys)
    told = done(["compare", source, back, "--out", tmp_path / "report.html"], capsys)
    assert "Report: " in told


def test_several_candidates_need_what_only_training_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for objective, layout, lacking in (("none", "sit", "has no projector"), ("repa", "repa", "no class prototypes")):
        source, file, back = (tmp_path / f"{objective}{end}" for end in ("", ".safetensors", "-back"))
        make_run(source, objective)
        done(["export", source, "--out", file], capsys)
        done(["import", file, "--layout", layout, "--config", source / "config.yaml", "--out", back], capsys)
        words = ["--out", tmp_path / "x.png", "--count", "1", "--device", "cpu", "--candidates", "2"]
        assert lacking in refused(["sample", back, *words], capsys)


def test_what_cannot_be_exported_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        name: make_run(tmp_path / name, **changes)
        for name, changes in {
            "sit": {},
            "dit": {"kind": "DiT"},
            "reg": {"objective": "reg"},
            "norms": {"qk_norm": True},
            "bare": {"classes": 0},
        }.items()
    }
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    inside = state_of(runs["sit"])[0] / "ema.safetensors"
    for name, words, sentence in (
        ("sit", ["--out", "{}/a.npz"], "a.npz is no weights file: end its name in .safetensors or .pt."),
        ("sit", ["--out", "{}"], "is a folder: give the name of a file in it."),
        ("sit", ["--out", "{}/file/a.pt"], "lies inside {}/file, which is a file: give another path."),
        ("sit", ["--out", str(inside)], "would replace a file of {}/sit, which the command reads: give a new name."),
        ("sit", ["--layout", "dit"], "is a SiT without a representation token, which the layout dit cannot hold: give"),
        ("sit", ["--layout", "reg"], "which the layout reg cannot hold: give --layout sit or repa."),
        ("dit", ["--layout", "sit"], "is a DiT, which the layout sit cannot hold: give --layout dit."),
        ("reg", ["--layout", "repa"], "is a SiT with a representation token, which the layout repa cannot hold"),
        ("norms", ["--layout", "sit"], "is a SiT with QK normalisation, which the layout sit cannot hold: give"),
        ("bare", [], "is one without classes, which no published code reads: give another run."),
        ("nowhere", [], "no run at {}/nowhere: give a folder made by vrpo train."),
    ):
        words = [word.format(tmp_path) for word in words]
        if "--out" not in words:
            words += ["--out", str(tmp_path / "a.pt")]
        told = refused(["export", tmp_path / name, *words], capsys)
        assert sentence.format(tmp_path) in told, told
    assert sorted(tmp_path.rglob("*")) == before
    assert run(["export", runs["sit"], "--out", tmp_path / "new" / "deep" / "a.pt"], capsys)[0] == 0


def test_what_cannot_be_imported_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), "repa")
    make_run(Path("latents"), latents=True)
    for name, layout in (("sit", "sit"), ("repa", "repa")):
        done(["export", "run", "--out", f"{name}.safetensors", "--layout", layout], capsys)
        done(["export", "run", "--out", f"{name}.pt", "--layout", layout], capsys)
    done(["export", "latents", "--out", "latents.pt"], capsys)
    torch.save({"ema": {"weight": torch.zeros(3)}}, "other.pt")
    shifted = load_file("sit.safetensors")
    save_file({**shifted, "pos_embed": shifted["pos_embed"] + 1}, "table.safetensors")
    save_file({n: v for n, v in shifted.items() if "mlp.fc2" not in n}, "torn.safetensors")
    save_file(shifted, "told.safetensors", {"class_names": "[", "latents": "null"})
    save_file(shifted, "cosine.safetensors", {"path": "cosine", "latents": "null"})
    own = load_yaml(Path("run/config.yaml"))
    for name, changes in {
        "config": {"align": {"objective": "none"}},
        "larger": {"model": {"name": "SiT-Ti/4"}},
        "dit": {"model": {"name": "DiT-N/4"}, "align": {"objective": "none"}, "sample": {"sampler": "ddim"}},
        "reg": {"align": {"objective": "reg"}},
        "sized": {"data": {"image_size": 16}},
        "ddpm": {"sample": {"sampler": "ddpm"}},
    }.items():
        Path(f"{name}.yaml").write_text(json.dumps(merge(own, changes)))
    Path("two.txt").write_text("cat\ndog\n")
    Path("file").touch()
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    for words, sentence in (
        ("nowhere.pt --layout sit", "there is no weights file at nowhere.pt"),
        (
            "other.pt --layout sit",
            "other.pt is no checkpoint of the layout sit (it has no tensor 'x_embedder.proj.weight')",
        ),
        ("torn.safetensors --layout sit", "torn.safetensors cannot be read as sit: the weights lack 8"),
        ("table.safetensors --layout sit", "the weights' position table 'pos_embed' differs"),
        ("repa.safetensors --layout sit", "was exported with the layout repa, not sit: give --layout repa."),
        ("repa.pt --layout sit", "repa.pt has projectors, which no file of sit has: give --layout repa or reg."),
        ("sit.safetensors --layout repa", "was exported with the layout sit, not repa"),
        ("sit.pt --layout reg", "is no checkpoint of the layout reg"),
        (
            "sit.pt --layout sit --config larger.yaml",
            "holds, as sit, a SiT-N/4, and larger.yaml is of a SiT-Ti/4: give",
        ),
        ("sit.pt --layout dit", "holds, as dit, a DiT-N/4, and config.yaml is of a SiT-N/4: give"),
        ("sit.pt --layout dit --config dit.yaml", "sit.pt cannot be read as dit: the weights are of another arch"),
        ("sit.pt --layout sit --config reg.yaml", "reg.yaml has a representation token, unlike files of sit"),
        ("sit.pt --layout sit --config sized.yaml", "is a model of inputs of 8 x 8, and sized.yaml is of 16 x 16"),
        ("sit.pt --layout sit --config ddpm.yaml", "ddpm"),
        (
            "sit.pt --layout sit --class-names two.txt",
            "two.txt has 2 lines, and sit.pt has 3 classes: give one a line.",
        ),
        ("sit.pt --layout sit --class-names nowhere.txt", "--class-names nowhere.txt cannot be read (No such file"),
        ("told.safetensors --layout sit", "told.safetensors has damaged metadata ('class_names')"),
        (
            "cosine.safetensors --layout sit",
            "was trained on the path cosine, and diffusion.path of config.yaml is linear",
        ),
        ("latents.pt --layout sit", "latents.pt does not say how its 4 channels are decoded: give one that"),
        ("sit.pt --layout sit --config nowhere.yaml", "cannot read the configuration nowhere.yaml"),
        ("sit.pt --layout sit --preset imagenet", "there is no preset 'imagenet'"),
        ("sit.pt --layout sit --preset demo --config config.yaml", "needs one configuration: give --preset"),
        ("sit.pt --layout sti", "--layout cannot be 'sti': did you mean 'sit'?"),
        ("sit.pt --layout sit --out run", "--out run holds a run already: choose another."),
        ("sit.pt --layout sit --out full", "--out full is not empty: choose another."),
        ("sit.pt --layout sit --out file", "--out file is a file"),
        ("sit.pt --layout sit --out file/new", "lies inside file, which is a file"),
    ):
        given = words.split()
        given += [] if "--config" in given or "--preset" in given else ["--config", "config.yaml"]
        given += [] if "--out" in given else ["--out", "new"]
        before = sorted(Path().rglob("*"))
        assert sentence in refused(["import", *given], capsys), words
        assert sorted(Path().rglob("*")) == before, words
    assert "needs one configuration" in refused(["import", "sit.pt", "--layout", "sit", "--out", "new"], capsys)


def test_a_file_that_may_be_of_another_layout_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_run(tmp_path / "run")
    done(["export", source, "--out", tmp_path / "a.pt"], capsys)
    words = ["--layout", "repa", "--config", source / "config.yaml", "--out", tmp_path / "back"]
    assert "if it is of the original SiT" in done(["import", tmp_path / "a.pt", *words], capsys)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 9, 12, 15])
def test_a_full_disk_leaves_no_run_behind(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = make_run(tmp_path / "run"), tmp_path / "a.safetensors"
    done(["export", source, "--out", file], capsys)
    seen, flush = [], os.fsync

    def refuse(descriptor: int) -> None:
        seen.append(descriptor)
        if len(seen) == number:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    before = sorted(tmp_path.rglob("*"))
    words: list[Any] = ["import", file, "--layout", "sit", "--config", source / "config.yaml"]
    words += ["--out", tmp_path / "back"]
    monkeypatch.setattr(os, "fsync", refuse)
    told = refused(words, capsys)
    monkeypatch.undo()
    assert f"{tmp_path / 'back'}: no space is left on the device: free some space" in told
    assert sorted(tmp_path.rglob("*")) == before
    done(words, capsys)
