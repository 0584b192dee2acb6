"""The table of the spread over clients: methods x mean, worst and deviation, one per scenario.

Each measure is that of one seed, over the clients that have a number in every row; then come the
mean and the sample standard deviation over seeds. The deviation over clients is not ranked: clients
that are equally bad are no merit.
"""

import math
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import Any, Literal

from fedamole.comparison import known, scenario_cells, score_title, sizes
from fedamole.records import ClientRecord
from fedamole.rendering import PERCENT, Cell, Column
from fedamole.results import Metrics, mean_score
from fedamole.stages import ResultsStage

# Measure -> method -> number in percent, with its deviation over seeds.
Spread = dict[str, dict[str, Cell]]


def _worst(records: Sequence[ClientRecord]) -> float:
    """Score of the client with the lowest."""
    return min(record.score for record in records)


def _deviation(records: Sequence[ClientRecord]) -> float:
    """Sample standard deviation of the scores; one client has none."""
    return stdev(record.score for record in records) if len(records) > 1 else math.nan


MEASURES: dict[str, Callable[[list[ClientRecord]], float]] = {
    "mean": mean_score,
    "worst": _worst,
    "std": _deviation,
}
TITLES = {"mean": "mean (%)", "worst": "worst client (%)", "std": "std over clients (points)"}
RANKED: dict[str, Literal["highest"]] = {"mean": "highest", "worst": "highest"}


def spread_columns(metrics: Metrics, settings: ResultsStage) -> dict[str, list[Column]]:
    """Columns of the table of each scenario, by its title."""
    return {
        f"{name}: {score_title(settings, name)}": [
            Column(
                TITLES[what],
                scenario_cells(metrics, settings, name, measure, scale=PERCENT),
                RANKED.get(what),
            )
            for what, measure in MEASURES.items()
        ]
        for name in settings.scenarios
    }


def spread_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``spread.csv``: as fractions; ``_std`` is the deviation over seeds."""
    rows = []
    for name, slugs in settings.scenarios.items():
        fewest, everyone = sizes(metrics, settings, name)
        measured = {
            what: scenario_cells(metrics, settings, name, measure)
            for what, measure in MEASURES.items()
        }
        for method in settings.methods:
            row: dict[str, Any] = {
                "scenario": name,
                "metric": settings.metrics[name],
                "method": method,
            }
            row |= {"seeds": len(slugs), "clients": fewest, "clients_total": everyone}
            for what, cells in measured.items():
                row[f"{what}_mean"] = known(cells[method].mean)
                row[f"{what}_std"] = cells[method].std
            rows.append(row)
    return rows
