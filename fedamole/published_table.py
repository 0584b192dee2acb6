"""The table of published numbers: what a paper reports beside what the study found.

The numbers are those of the settings. Nothing is derived from them, and what the study has no
number for stays empty.
"""

from typing import Any

from fedamole.comparison import known, scenario_cells
from fedamole.errors import FedamoleError
from fedamole.main_table import average_gain, gain, rivals_note
from fedamole.rendering import PERCENT, Cell, Listing
from fedamole.results import Metrics, mean_score
from fedamole.settings.output import PublishedNumber, PublishedSettings
from fedamole.stages import ResultsStage

HEAD = (
    "what",
    "scenario",
    "method",
    "paper (%)",
    "this study (%)",
    "difference (points)",
    "where",
)


def published_listing(metrics: Metrics, settings: ResultsStage) -> Listing:
    """One line per published number; the difference is that of the study minus the paper."""
    lines: list[list[str | Cell | None]] = []
    for number in _paper(settings).numbers:
        ours = found_here(number, metrics, settings)
        difference = None if ours is None else Cell(ours.mean - number.value)
        texts = [number.what, number.scenario or "", number.method]
        lines.append([*texts, Cell(number.value, number.std), ours, difference, number.table])
    return Listing(HEAD, lines)


def published_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``published.csv``: in percent, as papers print them."""
    paper = _paper(settings)
    rows = []
    for number in paper.numbers:
        ours = found_here(number, metrics, settings)
        mean = None if ours is None else known(ours.mean)
        rows.append(
            {
                "what": number.what,
                "scenario": number.scenario,
                "method": number.method,
                "paper_percent": number.value,
                "paper_std": number.std,
                "study_percent": mean,
                "study_std": None if ours is None else ours.std,
                "difference_points": None if mean is None else mean - number.value,
                "where": number.table,
                "source": paper.source,
                "setting": paper.setting,
            }
        )
    return rows


def published_notes(settings: ResultsStage) -> list[str]:
    """Say where the numbers come from, and what those of the study are."""
    paper = _paper(settings)
    notes = [f"paper: {paper.source}" + (f"; {paper.setting}" if paper.setting else "")]
    if any(number.what == "average gain" for number in paper.numbers):
        notes.append(f"average gain of this study: over {', '.join(settings.scenarios)}")
    return notes + rivals_note(settings)


def found_here(number: PublishedNumber, metrics: Metrics, settings: ResultsStage) -> Cell | None:
    """The same quantity in the study, in percent; None if it has no such row or column."""
    if number.method not in settings.methods:
        return None
    if number.scenario is None:
        return _percent(average_gain(metrics, settings, number.method))
    if number.scenario not in settings.scenarios:
        return None
    cells = scenario_cells(metrics, settings, number.scenario, mean_score, scale=PERCENT)
    if number.what == "score":
        return cells[number.method]
    return _percent(gain(cells, number.method, settings.tables.rivals))


def _percent(fraction: float | None) -> Cell | None:
    return None if fraction is None else Cell(PERCENT * fraction)


def _paper(settings: ResultsStage) -> PublishedSettings:
    if settings.tables.published is None:
        raise FedamoleError("tables: published: there are no numbers of a paper in the settings")
    return settings.tables.published
