"""Configuration: presets, overrides, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from vrpo.config import RunConfig, parse_count
from vrpo.config_load import (
    OBJECTIVES,
    build_config,
    load_file,
    load_preset,
    merge,
    option_names,
    preset_names,
    to_yaml,
    validate,
)
from vrpo.errors import ConfigError
from vrpo.training.setup import check_config


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512", 512),
        ("2M", 2_000_000),
        ("1.5k", 1500),
        ("50_000", 50_000),
        ("3m", 3_000_000),
        ("2.3M", 2_300_000),
        ("1e6", 10**6),
        (7, 7),
    ],
)
def test_counts(text: Any, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_run(name: str) -> None:
    config = validate(load_preset(name), name)
    check_config(config)
    if name.rpartition("-")[2] in OBJECTIVES:
        assert config.align.objective == name.rpartition("-")[2]


def test_preset_survives_the_override_of_another_field() -> None:
    preset = load_preset("cifar10-sit-ti-4-irepa")
    config = build_config(preset, ["--train.images", "2M", "--align.weight", "0.3", "--align.depth", "2", "5"])
    assert (config.train.images, config.align.weight, config.align.depth) == (2_000_000, 0.3, (2, 5))
    untouched = merge(preset, {"train": {"images": 2_000_000}, "align": {"weight": 0.3, "depth": [2, 5]}})
    assert config == validate(untouched, "expected")
    assert config.train.lr == 6e-4
    assert config.align.objective == "irepa"


def test_overrides_equal_file_values() -> None:
    words = "--train.batch-size 32 --model.qk-norm True --sample.guidance-interval 0.1 0.7 --align.vrpo.gate False"
    values = {
        "train": {"batch_size": 32},
        "model": {"qk_norm": True},
        "sample": {"guidance_interval": [0.1, 0.7]},
        "align": {"vrpo": {"gate": False}},
    }
    assert build_config({}, words.split()) == validate(values, "file")


def test_written_configuration_reads_back_to_the_same(tmp_path: Path) -> None:
    values = {"align": {"vrpo": {"fidelity": {"0": 0.0, "500k": 1.0}}}, "data": {"path": "somewhere"}}
    config = validate(merge(load_preset("cifar10-sit-s-2-vrpo"), values), "x")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert validate(load_file(tmp_path / "config.yaml"), "y") == config


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--align.weigth 1", "there is no option '--align.weigth': did you mean '--align.weight'?"),
        ("--align.objective rpa", "align.objective cannot be 'rpa': did you mean 'repa'?"),
        ("--align.weight -1", "align.weight cannot be '-1': it should be greater than or equal to 0."),
        ("--train.images lots", "write a count such as 50000, 50k or 2M."),
        ("--train.lr quick", "train.lr cannot be 'quick': it should be a valid number"),
        ("--train.images 0", "train.images cannot be 0: it should be greater than 0."),
        ("--train.images 1.5", "train.images cannot be '1.5': write a count such as 50000, 50k or 2M."),
        ("--train.images inf", "train.images cannot be 'inf': write a count"),
        ("--train.images 1e999999999", "write a count"),
        ("--train.lr inf", "train.lr cannot be 'inf': it should be a finite number."),
        ("--align.vrpo.semantic nan", "it should be a finite number."),
        ("--train.betas 1.5 2", "train.betas.0 cannot be '1.5': it should be less than 1."),
        ("--train.betas 0.9", "train.betas"),
        ("--train.lr --train.ema 0.5", "train.lr has no value: give at least one."),
        ("--evaluate.metrics", "evaluate.metrics has no value: give at least one."),
        ("--evaluate.metrics fid", "evaluate.metrics.0 cannot be 'fid': did you mean 'sfid' or 'fd'?"),
        ("--seed -1", "seed cannot be '-1'"),
        ("2M", "'2M' was not expected: overrides are written --section.key value"),
    ],
)
def test_wrong_words(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({}, words.split())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"algn": {}}, "file: there is no key 'algn': did you mean 'align'?"),
        ({"train": {"batchsize": 1}}, "file: there is no key 'train.batchsize': did you mean 'batch_size'?"),
        ({"align": {"vrpo": {"grup": 4}}}, "file: there is no key 'align.vrpo.grup': did you mean 'group'?"),
        ({"train": {"ema": 1.5}}, "file: train.ema cannot be 1.5: it should be less than 1."),
    ],
)
def test_wrong_files(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(values, "file")
    assert str(caught.value) == sentence


def test_file_that_is_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_file(file)
    file.write_text("train: [1, 2")
    with pytest.raises(ConfigError, match=r"cannot be read as YAML \(it is not valid at line \d\)"):
        load_file(file)
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds no configuration"):
        load_file(file)


def test_own_options_of_a_command_are_suggested() -> None:
    with pytest.raises(ConfigError, match="there is no option '--resum': did you mean '--resume'"):
        build_config({}, ["--resum=1"], other_options=["--resume"])


def test_every_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration written into a run's folder is valid from any other folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").touch()
    (tmp_path / "vgg").mkdir()
    values = {
        "data": {"path": "data", "validation": "~/held-out"},
        "encoder": {"name": "transformers:vit", "weights": "e.safetensors"},
        "more_encoders": [{"name": "vit", "weights": "random"}, {"name": "transformers:org/vit", "weights": "~/e"}],
        "align": {
            "perceptual_image": {"kind": "lpips", "network": "vgg", "network_weights": "n.pt", "linear_weights": "l.pt"}
        },
        "evaluate": {"features": "vit", "weights": "f.safetensors"},
    }
    config = validate(values, "the test").with_absolute_paths()
    here = str(tmp_path)
    assert (config.data.path, config.data.validation) == (tmp_path / "data", tmp_path / "home" / "held-out")
    assert (config.encoder.name, config.encoder.weights) == (f"transformers:{here}/vit", f"{here}/e.safetensors")
    found = [(encoder.name, encoder.weights) for encoder in config.more_encoders]
    assert found == [(f"{here}/vit", "random"), ("transformers:org/vit", f"{here}/home/e")]
    image = config.align.perceptual_image
    assert (image.network, image.network_weights, image.linear_weights) == ("vgg", f"{here}/n.pt", f"{here}/l.pt")
    assert (config.evaluate.features, config.evaluate.weights) == (f"{here}/vit", f"{here}/f.safetensors")
    assert config.with_absolute_paths() == config
    assert RunConfig().with_absolute_paths() == RunConfig()


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10-sit-s-2-repa'"):
        load_preset("cifar10-sit-s2-repa")


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"model": {"name": "SiT-S/3"}}, "did you mean 'SiT-S/"),
        ({"align": {"depth": 40}}, "align.depth 40 is not a block of this model, which has 12: .* 12"),
        ({"train": {"batch_size": 30, "noisings": 4}}, "not a multiple of train.noisings 4: use 32"),
        ({"train": {"batch_size": 64, "micro_batch": 24}}, "does not divide train.batch_size 64 .*: use 32|16"),
        ({"sample": {"sampler": "ddim"}}, "sample.sampler 'ddim' does not fit SiT"),
        ({"sample": {"guidance_interval": (0, 70)}}, "sample.guidance_interval 0 70 leaves the times .* between 0, "),
        ({"sample": {"guidance_interval": (-0.1, 1)}}, "sample.guidance_interval -0.1 1 leaves the times"),
        (
            {"sample": {"guidance_scale": 1.5}, "model": {"label_dropout": 0}},
            "sample.guidance_scale 1.5 needs a null class, which training with model.label_dropout 0 never sees",
        ),
        ({"model": {"name": "DiT-S/2"}}, "sample.sampler 'ode-euler' does not fit DiT"),
    ],
)
def test_parts_that_do_not_fit(over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_config(validate(over, "the test"))


def test_every_key_is_documented() -> None:
    def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                missing += undocumented(kind, f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert undocumented(RunConfig) == []


def test_option_names_are_what_the_command_line_takes() -> None:
    assert "--align.vrpo.clip-high" in option_names()
    assert len(option_names()) == len(set(option_names()))
    assert yaml.safe_load(to_yaml(RunConfig()))["align"]["vrpo"]["clip_high"] == 0.28
