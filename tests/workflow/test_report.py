"""The report of a study, opened in a browser that has no network."""

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, chromium, installed
from workflow_study import REPOSITORY, Study

pytestmark = pytest.mark.xdist_group("workflow")

# A picture is drawn if not all of its pixels are alike.
DRAWN = """(selector => {
    const canvas = document.querySelector(`${selector} canvas`);
    if (!canvas) return false;
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size > 1;
})"""


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of a Chromium; FEDAMOLE_TEST_BROWSER says that there must be one."""
    program = installed()
    if program is None:
        give_up = pytest.fail if os.environ.get("FEDAMOLE_TEST_BROWSER") else pytest.skip
        give_up("no Chromium is installed: apt-get install chromium")
    return program


@pytest.fixture(scope="module")
def page(browser: str, finished: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The report of the smoke study."""
    study = finished.copy(tmp_path_factory.mktemp("report") / "study")
    path = study.folder / "report.html"
    style = REPOSITORY / "workflow/report/style.css"
    done = study.snakemake("--report", str(path), "--report-stylesheet", str(style))
    assert done.returncode == 0, done.stderr
    with chromium(browser) as opened:
        opened.open(path)
        opened.wait("typeof app === 'object'")
        yield opened


@pytest.fixture(autouse=True)
def nothing_goes_wrong(page: Page) -> Iterator[None]:
    """Whatever a test looks at, without an error and without a request to the outside."""
    go_to(page, "Workflow")
    yield
    page.evaluate("1")  # Brings what happened until now.
    assert (page.errors, page.requests) == ([], [])


def go_to(page: Page, *items: str) -> None:
    """Click through the menu, from its top."""
    page.evaluate("void app.setView({navbarMode: 'menu'})")
    for item in items:
        page.click("nav li a", item)


def results(page: Page, category: str) -> dict[str, dict[str, Any]]:
    """Entries of a category of the report by path."""
    paths = page.evaluate(f"Object.values(categories[{json.dumps(category)}]).flat()")
    entries = page.evaluate("results")
    return {path: entries[path] for path in paths}


def view(page: Page, path: str) -> None:
    """Open a result as a click on its eye in the description does."""
    page.evaluate(f"void app.showResultInfo({json.dumps(path)})")
    page.wait(f"document.querySelector('nav').innerText.includes({json.dumps(path)})")
    page.click("nav table a")


def description(page: Page, path: str) -> str:
    """Text under the heading of that name."""
    page.evaluate(f"void app.showResultInfo({json.dumps(path)})")
    page.wait(f"document.querySelector('nav').innerText.includes({json.dumps(path)})")
    text = page.evaluate("document.querySelector('nav .prose')?.innerText ?? ''")
    return " ".join(text.split())


def first_words(caption: str) -> str:
    """Start of a caption file, up to its first markup."""
    text = (REPOSITORY / f"workflow/report/{caption}.rst").read_text()
    return " ".join(re.split(r"[`*:{]", text)[0].split()[:8])


def test_what_goes_wrong_on_a_page_is_noticed(browser: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.html"
    path.write_text(
        "<img src='nowhere.png'><img src='https://example.org/far.png'>"
        "<script>console.error('said'); throw new Error('thrown')</script>"
    )
    with chromium(browser) as wrong:
        wrong.open(path)
        wrong.wait("[...document.images].every(x => x.complete)")
    found = "\n".join(wrong.errors)
    for part in ("said", "thrown", "ERR_FILE_NOT_FOUND", "ERR_NAME_NOT_RESOLVED"):
        assert part in found
    assert wrong.requests == ["https://example.org/far.png"]


def test_the_main_table_shows_the_numbers_of_its_csv_file(page: Page, finished: Study) -> None:
    view(page, "results/tables/main.html")
    lines = [line.split("\t") for line in page.inner().splitlines()]
    shown = {line[0]: line[1] for line in lines if len(line) > 1}
    with (finished.results / "tables/main.csv").open() as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert list(rows) == finished.config["methods"]
    for method, row in rows.items():
        assert float(shown[method]) == pytest.approx(100 * float(row["score_mean"]), abs=0.006)


def test_every_table_opens_and_has_its_numbers_to_download(page: Page, finished: Study) -> None:
    entries = results(page, "Tables")
    pages = {path for path in entries if path.endswith(".html")}
    written = (finished.results / "tables").glob("*.html")
    assert pages == {f"results/tables/{path.name}" for path in written}
    for path in pages:
        view(page, path)
        assert "method" in page.inner()
        numbers = entries[path.replace(".html", ".csv")]
        assert numbers["labels"] == {"table": Path(path).stem, "format": "csv"}
        assert numbers["data_uri"].startswith("data:text/csv")


def test_every_figure_loads(page: Page, finished: Study) -> None:
    entries = results(page, "Figures")
    written = (finished.results / "figures").glob("*.svg")
    assert set(entries) == {f"results/figures/{path.name}" for path in written}
    for path, entry in entries.items():
        labels = entry["labels"]
        go_to(page, "Figures", labels["figure"])
        # The row of a figure has its labels in columns of their own.
        row = " ".join(labels.values())
        rows = "[...document.querySelectorAll('nav tbody tr')]"
        found = f"{rows}.find(x => x.innerText.split(/\\s+/).join(' ').trim() === {row!r})"
        page.wait(f"!!{found}")
        page.evaluate(f"void {found}.querySelector('a').click()")
        picture = f"[...document.images].find(x => x.src === results[{path!r}].data_uri)"
        page.wait(f"{picture}?.complete")
        assert page.evaluate(f"{picture}.naturalWidth") > 0, path


def test_a_figure_larger_than_the_window_can_be_seen_whole(page: Page) -> None:
    uri = "results['results/figures/rounds.svg'].data_uri"
    page.evaluate(f"void app.setView({{content: 'img', contentPath: {uri}}})")
    picture = f"[...document.images].find(x => x.src === {uri})"
    page.wait(f"{picture}?.complete")
    page.evaluate(f"void ({picture}.style = 'height: 3000px; width: 3000px; max-width: none')")
    nav = page.evaluate("document.querySelector('nav').getBoundingClientRect().right")
    place = page.evaluate(f"(x => [x.left, x.top])({picture}.getBoundingClientRect())")
    assert place[0] >= nav and place[1] >= 0


def test_figures_are_labelled_by_what_they_are_of(page: Page) -> None:
    labels = {path: entry["labels"] for path, entry in results(page, "Figures").items()}
    scenario = {"scenario": "chatterbot-dir0.5", "seed": "42"}
    folder = "results/figures/chatterbot-dir0.5-s42"
    assert labels["results/figures/rounds.svg"] == {"figure": "rounds"}
    assert labels[f"{folder}-classes.svg"] == {"figure": "classes", **scenario}
    experts = {"figure": "experts", **scenario, "method": "fedamole"}
    assert labels[f"{folder}-fedamole-experts.svg"] == experts


def test_every_table_and_figure_has_a_caption_of_its_own(page: Page) -> None:
    captions = {
        path: f"{Path(path).stem}_table" if category == "Tables" else entry["labels"]["figure"]
        for category in ("Tables", "Figures")
        for path, entry in results(page, category).items()
    }
    captions["results/study/config.html"] = "settings"
    for path, caption in captions.items():
        assert description(page, path).startswith(first_words(caption)), path


def test_the_study_is_described_on_the_first_page(page: Page, finished: Study) -> None:
    text = page.wait("document.querySelector('#app .prose h1')?.parentElement.innerText")
    assert ", ".join(finished.config["methods"]) in text
    # It names no file: another study has other tables, and docutils would complain in its place.
    assert "System Message" not in text


def test_the_rules_are_drawn(page: Page) -> None:
    page.wait(f"{DRAWN}('#rulegraph')")
    rules = page.evaluate("rulegraph_spec.data.find(x => x.name === 'node-data').values")
    names = {re.sub(r"(_\d+)+$", "", rule["rule"]) for rule in rules}
    assert {"partition", "train_clients", "aggregate", "assign", "gather", "all"} <= names


def test_every_rule_has_its_run_times(page: Page) -> None:
    go_to(page, "Statistics")
    page.wait(f"{DRAWN}('#runtimes')")
    page.wait(f"{DRAWN}('#timeline')")
    drawn = page.evaluate("rulegraph_spec.data.find(x => x.name === 'node-data').values")
    times = page.evaluate("runtimes_spec.data.values")
    assert {time["rule"] for time in times} == {rule["rule"] for rule in drawn} - {"all"}
    assert all(0 < time["runtime"] < 600 for time in times)


def test_the_settings_are_there_with_their_defaults(page: Page) -> None:
    view(page, "results/study/config.html")
    lines = [line.split("\t") for line in page.inner().splitlines()]
    shown = {line[0]: line[1:] for line in lines}
    assert shown["num_experts"][0] == "6"
    assert shown["learning_rate"][0] == "0.001"
    # A default, and what it means.
    assert shown["weighting"] == ["uniform", shown["weighting"][1]]
    assert all(len(rest) == 2 for rest in shown.values() if len(rest) > 1)
