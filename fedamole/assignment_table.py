"""The table of assignments: methods with experts x measures, one per scenario."""

import math
from typing import Any

from fedamole.assignment_measures import measure
from fedamole.rendering import PERCENT, Cell, Column, over_seeds
from fedamole.results import Metrics, with_experts
from fedamole.stages import ResultsStage

# Scenario -> measure -> method -> mean and spread over seeds.
Measured = dict[str, dict[str, dict[str, Cell]]]

TITLES = {
    "quality": "quality (%)",
    "above_chance": "above chance (%)",
    "stability": "stability (%)",
    "follows_data": "follows the data (r)",
    "fewest_experts": "fewest experts",
    "most_experts": "most experts",
    "without_holder": "experts without holder",
}


def measured_assignments(metrics: Metrics, settings: ResultsStage) -> Measured:
    """Measure the assignments of all methods with experts (:mod:`fedamole.assignment_measures`)."""
    found: Measured = {}
    for name, slugs in settings.scenarios.items():
        runs = {
            method: [measure(metrics.run(slug, method)) for slug in slugs]
            for method in with_experts(settings)
        }
        found[name] = {
            what: {
                method: over_seeds([run[what] for run in seeds]) for method, seeds in runs.items()
            }
            for what in TITLES
        }
    return found


def assignment_columns(measured: Measured) -> dict[str, list[Column]]:
    """Columns of the table of each scenario; shares in percent."""
    return {
        name: [
            Column(title, _percent(cells[what]) if title.endswith("(%)") else cells[what])
            for what, title in TITLES.items()
        ]
        for name, cells in measured.items()
    }


def assignment_rows(measured: Measured, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``assignments.csv``: shares as fractions; empty where there is no number."""
    rows = []
    for name, cells in measured.items():
        for method in with_experts(settings):
            row: dict[str, Any] = {"scenario": name, "method": method}
            row["seeds"] = len(settings.scenarios[name])
            for what, by_method in cells.items():
                mean = by_method[method].mean
                row[f"{what}_mean"] = None if math.isnan(mean) else mean
                row[f"{what}_std"] = by_method[method].std
            rows.append(row)
    return rows


def _percent(cells: dict[str, Cell]) -> dict[str, Cell]:
    """Turn fractions into percent."""
    return {
        method: Cell(PERCENT * cell.mean, None if cell.std is None else PERCENT * cell.std)
        for method, cell in cells.items()
    }
