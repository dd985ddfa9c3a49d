"""The page: complete in itself, escaped, with the figures and samples that the runs allow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fabricated import fabricate

from vrpo.report.compare import compare
from vrpo.report.figures import Line, Style, assign_styles, draw_history, draw_lines, with_unique_ids
from vrpo.report.telemetry import binned_history, classify, last_profile
from vrpo.runs import Run

MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Page(HTMLParser):
    """Collects tags, attributes and ids, and checks that elements are nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    runs = [fabricate(folder / f"{name}-{seed}", name, seed) for name in ("none", "vrpo") for seed in (0, 1)]
    compare(runs, folder / "r.html", title="A <b>title</b> & more")
    return (folder / "r.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    page = _Page(html)
    for value in page.values("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        assert value.startswith(("#", "data:image/png;base64,")), value[:80]
    for target in re.findall(r"url\(\s*['\"]?([^)]*)", html):
        assert target.startswith("#"), target
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_ids_are_unique_and_every_reference_has_its_target(html: str) -> None:
    page = _Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = re.findall(r"(?:url\(|href=\")#([^)\"]+)", html)
    assert references
    assert set(references) <= set(ids)


def test_sections_figures_and_samples_are_there(html: str) -> None:
    page = _Page(html)
    assert {"scores", "speed-up", "samples", "curves", "telemetry", "configuration", "protocol", "reproduce"} <= {
        *page.values("id")
    }
    # Two objectives, the last grid and two earlier ones.
    assert page.tags.count("img") == 6
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>", html)
    for title in (
        "FD-MobileNetV2 against images",
        "FD-MobileNetV2 against time",
        "Held-out loss against time",
        "Denoising loss by time",
        "Agreement",
        "Gate",
        "Reward fidelity: mean",
        "Reward fidelity: spread",
        "Clip fraction",
        "Share of time in the objective",
    ):
        assert titles.count(title) == 1, title
    assert not any("dropped" in title.lower() for title in titles)
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in html
    assert "The same noise and labels in every grid (seed 0)" in html
    assert "2,000 samples; ode-euler, 50 steps" in html
    assert "vrpo train --config" in html


def test_the_same_runs_give_the_same_page(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("none", "none"), make_run("repa", "repa")]
    pages = []
    for _ in range(2):
        compare(runs, tmp_path / "r.html")
        pages.append((tmp_path / "r.html").read_bytes())
    assert pages[0] == pages[1]


def test_text_from_data_is_escaped_everywhere(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    quote = '"><img src=x onerror=alert(2)>'
    runs = [
        make_run("none", "none", class_names=[evil, quote]),
        make_run("other", evil, class_names=[evil, quote], name=quote, config={"model": {"name": evil}}),
    ]
    info = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps({**info, "machine": evil, "status": quote}))
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
    record = {**json.loads(lines[20]), f"objective/{evil}": 1.0, f"objective/reward_{quote}": [1.0, 2.0]}
    late = {**json.loads(lines[-1]), **record, "step": 10**6, "images": 60_000}
    lines += [json.dumps(record), json.dumps(late)]
    (runs[1] / "metrics.jsonl").write_text("\n".join(lines))
    compare(runs, tmp_path / "r.html", title=evil)
    html = (tmp_path / "r.html").read_text()
    page = _Page(html)
    assert "script" not in page.tags
    assert "<script" not in html.lower()
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "x" not in page.values("src")
    assert "&lt;script&gt;" in html


def test_a_torn_last_line_and_missing_grids_still_give_a_report(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("none", "none"), make_run("repa", "repa", samples=False)]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluation", "step": 99')
    found = compare(runs, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert _Page(html).tags.count("img") == 3
    assert not any("could not be read" in line for line in found.warnings)


def test_telemetry_of_another_shape_still_gives_a_report(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("vrpo", samples=False)
    rows = [
        {"objective/gate": [0.5, 0.4], "objective/scaffold_handed_at": "soon", "loss": "x", "denoising_by_time": [1]},
        {"objective/gate": [[1], None, 0.7], "objective/scaffold_handed_at": [3], "denoising_by_time": [1e308, 2, 3]},
        {"kind": "evaluation", "metrics": {"fd": 10**400, "\ud800": 2.0}, "protocol": {"guidance_interval": [0.5]}},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        for index, row in enumerate(rows):
            file.write(json.dumps({"kind": "train", "step": 900 + index, "images": 60_000, **row}) + "\n")
    compare([run], tmp_path / "r.html", json_file=True)
    _Page((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_many_groups_stand_in_rows(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run(f"w{index}", "repa", samples=False, evaluations=2, config={"align": {"weight": 0.1 * index}})
        for index in range(1, 7)
    ]
    compare(runs, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    first = re.findall(r"<thead>.*?</thead>", html, flags=re.S)[0]
    assert "FD-MobileNetV2" in first
    assert len({style.slot for style in assign_styles(["repa"] * 6)}) == 6


def test_one_colour_an_objective_and_dashes_for_its_variants() -> None:
    styles = assign_styles(["none", "repa", "vrpo", "vrpo", "mine", "repa"])
    assert [style.slot for style in styles[:4]] == [0, 1, 2, 2]
    assert [style.variant for style in styles] == [0, 0, 0, 1, 0, 1]
    assert styles[4].slot not in (0, 1, 2)
    assert assign_styles(["repa"]) == styles[1:2]


def test_figures_take_their_colours_from_the_page() -> None:
    svg = draw_lines([Line([0, 1, 2], [3.0, 2.0, 1.0], Style(4))], "images", "a < b $x$")
    assert "var(--c4)" in svg
    assert "#fe00" not in svg
    assert "#fd000" not in svg
    assert "a &lt; b $x$" in svg
    history = draw_history(np.array([[0.1, np.nan], [0.3, 0.4]]), 100.0)
    assert history.count("data:image/png;base64,") == 2
    assert re.findall(r'id="([^"]+)"', with_unique_ids(history, "z-"))[0].startswith("z-")


@pytest.mark.parametrize(
    ("name", "role", "label"),
    [
        ("objective/reward_mean/semantic", "reward mean", "semantic"),
        ("objective/reward_semantic", "reward mean", "semantic"),
        ("objective/spread_semantic_depth4_encoder1", "reward spread", "semantic depth4 encoder1"),
        ("objective/reward/fidelity/std", "reward spread", "fidelity"),
        ("objective/fidelity_reward_spread", "reward spread", "fidelity"),
        ("objective/agreement", "agreement", "agreement"),
        ("objective/omega", "gate", "omega"),
        ("objective/clip_fraction", "other", "clip fraction"),
    ],
)
def test_logs_are_known_by_the_words_of_their_names(name: str, role: str, label: str) -> None:
    found = classify(name)
    assert (found.role, found.label) == (role, label)


def test_binned_history_averages_columns_and_keeps_gaps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    rows = [
        {"kind": "train", "step": i, "images": 100 * i, "objective/gate": [float(i), None, 2.0]} for i in range(1, 5)
    ]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = binned_history([Run(run)], "objective/gate", columns=2)
    assert found is not None
    assert found.images == 400
    np.testing.assert_array_equal(found.values, [[1.5, 3.5], [np.nan, np.nan], [2.0, 2.0]])
    profile = last_profile([Run(run)], "objective/gate", share=0.5)
    np.testing.assert_array_equal(profile, [3.5, np.nan, 2.0])
    assert binned_history([Run(run)], "objective/absent") is None
