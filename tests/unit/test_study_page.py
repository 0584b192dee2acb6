"""The settings of a study as its report shows them: nothing left out, nothing made up."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamole import stages
from fedamole.cli import main
from fedamole.config import Config, load_config, parse
from fedamole.config_files import read_yaml
from fedamole.study_page import study_page, study_yaml

STUDIES = ["smoke", "demo", "methods", "replica", "paper/main", "paper/privacy"]


class Rows(HTMLParser):
    """Rows of all tables of a page: class of the row, and its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[tuple[str | None, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append((dict(attrs).get("class"), []))
        elif tag == "td":
            self.rows[-1][1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1][1] and data.strip():
            self.rows[-1][1][-1] += data


def config_of(configs: Path, name: str = "smoke", **changes: Any) -> Config:
    path = configs / f"{name}.yaml"
    return load_config({**read_yaml(path), **changes}, configs, name, [path.parent])


def leaves(content: Any, path: str = "") -> dict[str, Any]:
    """Values of a nested mapping by path; lists are values."""
    if not (isinstance(content, dict) and content):
        return {path: content}
    return {
        name: value
        for key, inner in content.items()
        for name, value in leaves(inner, f"{path}.{key}".lstrip(".")).items()
    }


def plain(text: str) -> str:
    """The text, or nothing where it is no YAML, as a template may be."""
    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return ""
    return text


@pytest.mark.parametrize("name", STUDIES)
def test_the_written_config_is_the_same_study(configs: Path, tmp_path: Path, name: str) -> None:
    config = config_of(configs, name)
    path = tmp_path / "config.yaml"
    path.write_text(study_yaml(config))
    # No library: it names no file.
    again = load_config(read_yaml(path), tmp_path)
    assert again.model_copy(update={"results": config.results}) == config
    assert stages.digest(stages.results_stage(again)) == stages.digest(stages.results_stage(config))


def test_a_study_without_the_reference_method_can_be_written(configs: Path, tmp_path: Path) -> None:
    config = config_of(configs, methods=["fedit"])
    again = load_config(yaml.safe_load(study_yaml(config)), tmp_path)
    assert stages.results_stage(again) == stages.results_stage(config)


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_has_every_value_of_the_config(configs: Path, name: str) -> None:
    config = config_of(configs, name)
    shown: dict[str, list[Any]] = {}
    for _, cells in Rows(study_page(config)).rows:
        # A text stands there as it is; what is no text as YAML, a mapping on one line.
        for value in (cells[1], yaml.safe_load(plain(cells[1]))) if cells else ():
            for path, leaf in leaves(value, cells[0]).items():
                shown.setdefault(path, []).append(leaf)
    content = yaml.safe_load(study_yaml(config))
    scenarios = content.pop("scenarios")
    for section in (content, *scenarios):
        for path, value in leaves(section).items():
            # Sections and data sets have tables of their own, in which their names are left out.
            if path != "dataset.name":
                assert value in shown.get(path, shown.get(path.partition(".")[2], [])), path


def test_what_is_not_the_default_is_marked(configs: Path) -> None:
    marked = {cells[0] for kind, cells in Rows(study_page(config_of(configs))).rows if kind}
    assert {"rounds", "rank", "num_experts", "steps", "learning_rate"} <= marked
    assert not {"seeds", "alpha", "weighting", "decimals"} & marked


def test_every_setting_has_a_meaning(configs: Path) -> None:
    rows = [cells for _, cells in Rows(study_page(config_of(configs))).rows if cells]
    assert all(len(cells) == 3 and len(cells[2].split()) >= 2 for cells in rows)


def test_texts_of_a_config_cannot_break_the_page(configs: Path) -> None:
    smoke = read_yaml(configs / "smoke.yaml")
    dataset = read_yaml(configs / "datasets/chatterbot.yaml")
    dataset["template"] = "<script>alert(1)</script> & {instruction}"
    smoke["scenarios"][0]["dataset"] = dataset
    page = study_page(load_config(smoke, configs))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {instruction}" in page


def test_a_data_set_of_several_scenarios_stands_there_once(configs: Path) -> None:
    (scenario,) = read_yaml(configs / "smoke.yaml")["scenarios"]
    scenarios = [{**scenario, "partition": f"dir{alpha}"} for alpha in (0.5, 1.0, 100)]
    page = study_page(config_of(configs, scenarios=scenarios))
    titles = re.findall(r"<summary>(.*?)</summary>", page)
    slugs = ["chatterbot-dir0.5", "chatterbot-dir1", "chatterbot-dir100"]
    assert titles == ["chatterbot", *slugs, "all of it"]


def test_only_the_folder_of_the_results_is_no_part_of_the_stage(configs: Path) -> None:
    def text(**changes: Any) -> str:
        return stages.canonical_json(stages.study_stage(config_of(configs, **changes)))

    assert text(results="elsewhere") == text()
    assert text(rounds=9) != text()
    assert text(execution={"clients_per_job": 1}) != text()


def test_the_stage_survives_its_json(configs: Path) -> None:
    stage = stages.study_stage(config_of(configs))
    assert parse(stages.StudyStage, stages.canonical_json(stage), "--settings") == stage


def test_the_command_writes_both_files(configs: Path, tmp_path: Path) -> None:
    config = config_of(configs)
    settings = stages.canonical_json(stages.study_stage(config))
    page, written = tmp_path / "config.html", tmp_path / "config.yaml"
    files = ["--out-config", str(written), "--out-page", str(page)]
    assert main(["describe-study", "--settings", settings, *files]) == 0
    assert page.read_text() == study_page(config)
    assert written.read_text() == study_yaml(config)
