"""Numbers behind the figures of scores over scenarios and over swept settings, as tidy rows.

They are those of the main table: means over the clients that have a number in every row.
"""

from typing import Any

from fedamole.comparison import compared, counted
from fedamole.figure_data import Rows
from fedamole.results import Metrics, mean_score
from fedamole.stages import ResultsStage
from fedamole.sweeps import shown

# Columns of the rows of a sweep; the others are the settings that vary.
SWEEP_COLUMNS = ("base", "scenario", "metric", "seed", "method", "clients", "score")


def bars_rows(metrics: Metrics, settings: ResultsStage) -> Rows:
    """One row per scenario, seed and method: the mean score of the clients, in [0, 1].

    None where no client has a number in every row.
    """
    return [row for name in settings.scenarios for row in _of_scenario(metrics, settings, name)]


def sweep_rows(metrics: Metrics, settings: ResultsStage) -> Rows:
    """Rows like those of :func:`bars_rows`, with what varies in columns named by its path."""
    rows = []
    for name, point in settings.sweep.items():
        values = {key: shown(value) for key, value in point.values.items()}
        for row in _of_scenario(metrics, settings, name):
            rows.append({"base": point.base, **row, **values})
    return rows


def swept(rows: Rows) -> list[str]:
    """Paths of the settings that vary in the rows of a sweep."""
    return [column for column in rows[0] if column not in SWEEP_COLUMNS]


def _of_scenario(metrics: Metrics, settings: ResultsStage, name: str) -> Rows:
    """Rows of one scenario."""
    rows: list[dict[str, Any]] = []
    for slug in settings.scenarios[name]:
        chosen = compared(metrics, settings, slug)
        for method in settings.methods:
            info = metrics.run(slug, method).info
            records = counted(metrics, settings, slug, method)
            records = [record for record in records if record.client in chosen]
            row = {"scenario": name, "metric": info.metric, "seed": info.seed, "method": method}
            score = mean_score(records) if records else None
            rows.append({**row, "clients": len(records), "score": score})
    return rows
