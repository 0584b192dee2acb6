"""The settings of a study as they hold, defaults included: a config file, and a page for people."""

import html
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from fedamole.config import Config
from fedamole.rendering import html_page
from fedamole.settings import ScenarioSettings, Section

STYLE = (
    "body{font-family:sans-serif;margin:2em;max-width:70em}"
    "table{border-collapse:collapse;width:100%}"
    "th{border-bottom:1px solid}"
    "th,td{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
    "td:first-child,td:nth-child(2){font-family:monospace;white-space:pre-wrap}"
    "td:nth-child(2){overflow-wrap:anywhere;min-width:12em;max-width:32em}"
    "td:nth-child(3){color:#555}"
    "tr.given td:nth-child(2){font-weight:bold}"
    "summary{cursor:pointer;padding:.3em 0}"
    "pre{background:#f4f4f4;padding:1em;overflow:auto}"
)
# The first section: what stands at the top of a config file.
TOP = "The study"
# Where it is of no use: it says where the files lie, or it has parts of its own on the page.
ELSEWHERE = {"results", "scenarios"}

# Path of a setting below its section, its value, the meaning, and whether it is not the default.
Line = tuple[str, Any, str, bool]


def study_yaml(config: Config) -> str:
    """Config file of the same study that names no other file and leaves no setting out.

    The folder of the results is left out.
    """
    content = config.model_dump(mode="json", exclude={"results"})
    # Written down, the default would have to be among the methods.
    if config.tables.reference not in config.methods:
        del content["tables"]["reference"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def study_page(config: Config) -> str:
    """Page with a table per section, the data sets and scenarios, and the config file.

    A value that is not the default is bold.
    """
    blocks = {name: _table(lines) for name, lines in _sections(config).items()}
    datasets = {scenario.dataset.name: scenario.dataset for scenario in config.scenarios}
    blocks["data sets"] = "".join(
        _folded(name, list(_lines(dataset))) for name, dataset in datasets.items()
    )
    blocks["scenarios"] = "".join(
        _folded(scenario.slug, list(_scenario(scenario))) for scenario in config.scenarios
    )
    text = html.escape(study_yaml(config))
    blocks["as a config file"] = f"<details><summary>all of it</summary><pre>{text}</pre></details>"
    return html_page("Settings of the study", blocks, STYLE)


def _sections(config: Config) -> dict[str, list[Line]]:
    """Lines of each section in the order of the config; those of no section first."""
    found: dict[str, list[Line]] = {TOP: []}
    for line in _lines(config, leave_out=ELSEWHERE):
        section, dot, name = line[0].partition(".")
        found.setdefault(section if dot else TOP, []).append((name or section, *line[1:]))
    return found


def _scenario(scenario: ScenarioSettings) -> Iterator[Line]:
    """Lines of a scenario; its data set by name, for it stands on the page once."""
    meaning = type(scenario).model_fields["dataset"].description or ""
    yield "dataset", scenario.dataset.name, meaning, True
    yield from _lines(scenario, leave_out={"dataset"})


def _lines(section: Section, path: str = "", leave_out: Collection[str] = ()) -> Iterator[Line]:
    """Walk through all settings of a section, those of inner sections included."""
    for name, field in type(section).model_fields.items():
        if name in leave_out:
            continue
        value, where = getattr(section, name), f"{path}{name}"
        if isinstance(value, Section):
            yield from _lines(value, f"{where}.")
        else:
            is_given = field.is_required() or value != field.get_default(call_default_factory=True)
            if isinstance(value, list):
                value = [v.model_dump(mode="json") if isinstance(v, Section) else v for v in value]
            yield where, value, _prose(field.description or ""), is_given


def _table(lines: list[Line]) -> str:
    """HTML of settings, one per row."""
    rows = []
    for path, value, meaning, is_given in lines:
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (path, _print(value), meaning))
        rows.append(f'<tr class="given">{cells}</tr>' if is_given else f"<tr>{cells}</tr>")
    head = "<tr><th>setting</th><th>value</th><th>meaning</th></tr>"
    return "<table>\n" + "\n".join([head, *rows]) + "\n</table>\n"


def _folded(title: str, lines: list[Line]) -> str:
    """Table that opens when its title is clicked: a study may have dozens of scenarios."""
    summary = f"<summary>{html.escape(title)}</summary>"
    return f"<details>{summary}\n{_table(lines)}</details>\n"


def _print(value: Any) -> str:
    """Value as YAML would have it, on one line; a text as it is."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n...\n").strip()


def _prose(text: str) -> str:
    """Docstring of a setting as plain text."""
    return " ".join(text.replace("``", "").split())
