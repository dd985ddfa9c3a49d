"""What the documentation says exists: links, names, defaults, logged keys, commands, examples."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel

import vrpo.commands.data
import vrpo.commands.evaluation
import vrpo.commands.images
import vrpo.commands.plan
import vrpo.commands.publish
import vrpo.commands.representation
import vrpo.commands.training
from vrpo.alignment.objective import AlignmentBatch
from vrpo.alignment.policy import Actions
from vrpo.cli import COMMANDS
from vrpo.config import (
    AlignConfig,
    HasteConfig,
    ImageDistanceConfig,
    RunConfig,
    ScaffoldConfig,
    TokenConfig,
    VrpoConfig,
)
from vrpo.config_load import build_config, load_preset, option_names
from vrpo.data.prepare import prepare

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "docs" / "method.md"
PAGES = [
    ROOT / "README.md",
    METHOD,
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != METHOD),
    ROOT / "examples" / "README.md",
    ROOT / "benchmarks" / "README.md",
]

LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def links(page: Path) -> list[tuple[str, Path, str]]:
    """Return text, file and anchor of every link into the repository."""
    found = []
    for text, target in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found.append((text, (page.parent / path).resolve() if path else page, anchor))
    return found


def spans(page: Path) -> list[str]:
    """Return the inline code that is not the text of a link."""
    return [" ".join(span.split()) for span in SPAN.findall(LINK.sub("", prose(page)))]


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text("utf-8")) if language in languages]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def definitions(file: Path) -> set[str]:
    """Return what a module defines, members of classes as ``Class.member``."""

    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from names(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield prefix + node.target.id

    return set(names(ast.parse(file.read_text("utf-8")).body))


def section(page: Path, heading: str) -> str:
    """Return the text under a heading, up to the next one."""
    parts = re.split(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return parts[parts.index(heading) + 1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@pages
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for text, file, anchor in links(page):
        assert file.exists(), f"[{text}] leads to {file}"
        assert file.is_relative_to(ROOT), f"[{text}] leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"[{text}] leads to #{anchor} of {file.name}"


@pages
def test_every_name_that_is_linked_is_defined_in_its_file(page: Path) -> None:
    for text, file, _ in links(page):
        name = SPAN.fullmatch(text)
        if name is None or file.suffix != ".py":
            continue
        known = definitions(file)
        wanted = name.group(1).removesuffix("()")
        assert {wanted, wanted.removeprefix(f"{file.stem}.")} & known, f"{file.name} does not define {wanted}"


@pages
def test_every_name_in_the_text_exists(page: Path) -> None:
    """Names such as ``vrpo.alignment.Aligner``, configuration keys, tests."""
    tests = {name for file in (ROOT / "tests").rglob("test_*.py") for name in definitions(file)}
    for span in spans(page):
        key = span.removeprefix("--").split(" ")[0].rstrip(":")
        if span.startswith("test_"):
            assert span in tests, f"there is no test {span}"
        elif DOTTED.fullmatch(span) and span.startswith("vrpo."):
            resolve(span)
        elif DOTTED.fullmatch(key.replace("-", "_")) and key.split(".")[0] in RunConfig.model_fields:
            check_key(key.replace("-", "_"))


def resolve(name: str) -> Any:
    """Return the object that a dotted name stands for."""
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(module)
    return found


def check_key(key: str) -> None:
    """Fail where ``key`` is no key of the configuration; what follows a file's name is none."""
    model: Any = RunConfig
    for part in key.split("."):
        assert isinstance(model, type), f"{key} goes too deep"
        assert issubclass(model, BaseModel), f"{key} goes too deep"
        assert part in model.model_fields, f"there is no configuration key {key}"
        model = model.model_fields[part].annotation


@pytest.mark.parametrize(
    ("heading", "model", "skipped"),
    [
        ("align", AlignConfig, {"haste", "vrpo", "perceptual_image", "scaffold", "token"}),
        ("align.scaffold", ScaffoldConfig, set()),
        ("align.token", TokenConfig, set()),
        ("align.haste", HasteConfig, set()),
        ("align.perceptual_image", ImageDistanceConfig, set()),
        ("align.vrpo", VrpoConfig, set()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_configuration_tables_are_the_configuration(
    heading: str, model: type[BaseModel], skipped: set[str]
) -> None:
    table = {SPAN.findall(name)[0]: (default, meaning) for name, default, meaning in rows(section(METHOD, heading))}
    assert list(table) == [name for name in model.model_fields if name not in skipped]
    for name, (default, meaning) in table.items():
        field = model.model_fields[name]
        assert len(meaning) > 5
        shown = SPAN.findall(default)[0]
        actual = list(field.default) if isinstance(field.default, tuple) else field.default
        assert yaml.safe_load(shown.replace("()", "[]")) == actual, f"{heading}.{name} is {actual}, not {shown}"
        if get_origin(field.annotation) is Literal:
            assert set(get_args(field.annotation)) <= set(SPAN.findall(meaning)), f"{heading}.{name} lacks a choice"


def test_the_telemetry_table_names_what_is_logged() -> None:
    documented = {SPAN.findall(row[0])[0] for row in rows(section(METHOD, "Telemetry"))}
    expected: set[str] = set()
    for mode in ("analytic", "sampled"):
        logs = logged(mode)
        rewards = [name.removeprefix("reward_") for name in logs if name.startswith("reward_")]
        assert set(rewards) == {"semantic", "relational", "fidelity", "perceptual"}
        for name in logs:
            kind = next((kind for kind in ("reward", "spread", "dropped") if name.startswith(f"{kind}_")), None)
            expected.add(f"objective/{kind}_NAME" if kind else f"objective/{name}")
    expected = expected - {"objective/alignment"} | {"alignment"}
    of_the_trainer = {"alignment_loss", "token_loss", "denoising_by_time", "objective_share"}
    inside = {f"objective/{name}" for name in logged_inside_the_trunk()}
    assert documented == expected | of_the_trainer | inside | {"objective/image_distance"}
    written = (ROOT / "src" / "vrpo" / "training" / "trainer.py").read_text("utf-8")
    assert all(f'"{name}"' in written for name in of_the_trainer)


def logged(mode: str) -> dict[str, torch.Tensor]:
    """Return what one step of VRPO logs."""
    from vrpo.alignment.vrpo import Vrpo

    config = AlignConfig.model_validate({"objective": "vrpo", "projector_width": 8, "vrpo": {"mode": mode}})
    objective = Vrpo(config, hidden_size=8, depths=(1,), encoder_widths=(5,), tokens=4)
    batch = AlignmentBatch(
        targets=(torch.randn(2, 4, 5),),
        time=torch.rand(2),
        clean=torch.randn(2, 3, 4, 4),
        images=None,
        images_seen=1,
        budget=2,
        sample_weight=0.5,
    )
    tapped = objective.taps(batch).tokens[1](torch.randn(2, 4, 8, requires_grad=True))
    extra = objective.loss(lambda: tapped)
    assert extra is not None
    (tapped.square().mean() + extra).backward()
    objective.update()
    return objective.logs()


def logged_inside_the_trunk() -> set[str]:
    """Return what scaffold and token log beside the objective that they come with."""
    from vrpo.alignment.objective import Objective
    from vrpo.alignment.scaffold import WithScaffold
    from vrpo.alignment.token import WithToken

    scaffold = WithScaffold(
        Objective(), ScaffoldConfig(), by_advantage=True, depth=1, hidden_size=4, num_heads=1, key_width=2,
        value_width=2,
    )  # fmt: skip
    objective = WithToken(scaffold, TokenConfig(tau=1.0))
    objective.update()
    return set(objective.logs())


def test_the_ablations_are_variants_of_the_benchmark() -> None:
    variants = runpy.run_path(str(ROOT / "benchmarks" / "variants.py"))["VARIANTS"]
    for question, changes, names in rows(section(METHOD, "Ablations")):
        for name in SPAN.findall(names):
            assert name in variants, f"{question}: the benchmark has no variant {name}"
        keys = {change.split(" ")[0] for change in SPAN.findall(changes)} - {"per-reward", "centred"}
        for key in keys:
            check_key(key if "." in key else f"align.vrpo.{key}")


def test_results_have_one_place() -> None:
    assert METHOD.read_text("utf-8").splitlines().count("<!-- results -->") <= 1


def test_documented_rewards_work_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    from vrpo.alignment import rewards

    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))
    before = set(rewards._REGISTRY)
    for code in blocks(METHOD, "python"):
        exec(compile(code, str(METHOD), "exec"), {"__name__": "documented"})
    added = set(rewards._REGISTRY) - before
    assert len(added) == 2
    mean = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    context = rewards.RewardContext(mean, torch.randn(2, 3, 5, dtype=torch.float64), None, batch=None)  # type: ignore[arg-type]
    for name in added:
        reward = rewards.build_reward(name, 5)
        score = reward.score(Actions.at(mean), context)
        assert score.shape == (2, 3, 1)
        (gradient,) = torch.autograd.grad(score.sum(), mean)
        assert gradient.abs().max() > 0, "the score does not depend on the action"
        if reward.differentiable:
            torch.testing.assert_close(reward.preference(context), gradient)


@pages
def test_python_in_the_text_imports_what_exists(page: Path) -> None:
    for code in blocks(page, "python", "py"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vrpo":
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every shell command of a page, of fenced blocks and inline code."""
    lines = [
        line
        for body in blocks(page, "sh", "bash", "shell", "console")
        for line in re.sub(r"\\\n\s*", " ", body).splitlines()
    ]
    lines += [span for span in spans(page) if re.match(r"(uv run )?(vrpo |torchrun .*-m vrpo )", span)]
    for line in lines:
        for command in re.split(r"\s*(?:&&|;)\s*", line.removeprefix("$ ")):
            words = shlex.split(command, comments=True)
            while words and ("=" in words[0] or words[:2] == ["uv", "run"]):
                words = words[1:] if "=" in words[0] else words[2:]
            if words:
                yield words


def without_launcher(words: list[str]) -> list[str]:
    """Return the words of the command that ``torchrun ... -m`` starts; those of any other command as they are."""
    return words[words.index("-m") + 1 :] if words[:1] == ["torchrun"] and "-m" in words else words


class Parsed(Exception):
    """Raised in place of what a command would do."""


@pages
def test_every_command_in_the_text_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Any, list[str]]] = []
    for module in (
        vrpo.commands.data,
        vrpo.commands.evaluation,
        vrpo.commands.images,
        vrpo.commands.representation,
        vrpo.commands.plan,
        vrpo.commands.publish,
        vrpo.commands.training,
    ):

        def parse(*arguments: Any, original: Any = module.parse, **options: Any) -> Any:
            found.append(original(*arguments, **options))
            raise Parsed

        monkeypatch.setattr(module, "parse", parse)
    for words in map(without_launcher, commands(page)):
        if words[0].startswith("python") and words[1].endswith(".py"):
            check_script(words[1:])
        if words[0] != "vrpo":
            continue
        plain = [word for word in words[1:] if word not in ("--help", "-h")]
        name = next((" ".join(plain[:n]) for n in (2, 1) if " ".join(plain[:n]) in COMMANDS), None)
        assert name is not None, f"there is no command {' '.join(words)}"
        arguments = plain[len(name.split()) :]
        if not arguments or arguments == ["..."]:
            continue  # it takes none, or is spoken of rather than called
        module, _, function = COMMANDS[name][0].partition(".")
        with pytest.raises(Parsed):
            getattr(importlib.import_module(f"vrpo.commands.{module}"), function)(arguments)
        options, rest = found[-1]
        if name in ("train", "plan"):
            build_config({} if options.preset is None else load_preset(options.preset), rest)
        elif name == "presets" and options.name is not None:
            load_preset(options.name)


def check_script(words: list[str]) -> None:
    """Fail where there is no such script, or an option is neither its own nor the configuration's."""
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    source = script.read_text("utf-8")
    for word in words[1:]:
        option = word.partition("=")[0]
        if option.startswith("--"):
            assert f'"{option}"' in source or option in option_names(), f"{words[0]} has no option {option}"


def test_the_checks_see_what_is_there() -> None:
    """The patterns above find links, names and commands: none of the checks is empty."""
    assert len(links(METHOD)) > 100
    assert sum(name.startswith("`test_") for name, _, _ in links(METHOD)) > 40
    assert "align.vrpo.base irepa" in spans(METHOD)
    assert ["vrpo", "presets"] in list(commands(ROOT / "README.md"))
    assert sum(without_launcher(words)[:2] == ["vrpo", "train"] for words in commands(ROOT / "README.md")) >= 2
    for page, words in (("docs/sampling.md", ["vrpo", "sample"]), ("docs/data.md", ["vrpo", "prepare"])):
        found = [without_launcher(words) for words in commands(ROOT / page)]
        assert words in [other[:2] for other in found], "a launcher hides the command that it starts"
        assert not any(other[0] == "torchrun" and "vrpo" in other for other in found)
    with pytest.raises(AssertionError):
        check_key("align.vrpo.gates")
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve("vrpo.alignment.Alignment")
    assert "fidelity-at-the-seam" in anchors(METHOD)


def test_the_python_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own lines, for another preset, a data set that is there, and few images."""
    block = next(code for kind, code in FENCE.findall((ROOT / "README.md").read_text("utf-8")) if kind == "python")
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    prepare("photos", "data/photos", size=8, workers=1)
    small = (
        '"100k", "--train.batch-size", "4", "--model.name", "SiT-N/4", "--sample.steps", "1", "--train.device", "cpu"'
    )
    for words, others in (("cifar10-sit-s-4-repa", "cifar10-sit-ti-4-none"), ('"100k"', small), ("100k", "8")):
        assert words in block
        block = block.replace(words, others)
    exec(block, {})
    assert (tmp_path / "runs" / "repa" / "checkpoints" / "step-00000002").is_dir()
