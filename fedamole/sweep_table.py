"""The tables of a sweep: scores under several settings, each scenario of the config for itself.

One setting: methods x its values. Two settings: a grid for each method, the values of the first x
those of the second, in which the best number of the whole grid is marked.
"""

from typing import Any

from fedamole.comparison import known, note, scenario_cells, score_title
from fedamole.rendering import PERCENT, Cell, Column
from fedamole.results import Metrics, mean_loss, mean_score
from fedamole.stages import ResultsStage
from fedamole.sweeps import shown


def sweep_keys(settings: ResultsStage) -> list[str]:
    """Paths of the settings that vary, one or two."""
    return list(next(iter(settings.sweep.values())).values)


def sweep_grid(settings: ResultsStage) -> str | None:
    """Title of the rows of the grids; None where one setting varies and the rows are methods."""
    first, *others = sweep_keys(settings)
    return _short(first) if others else None


def sweep_columns(metrics: Metrics, settings: ResultsStage) -> dict[str, list[Column]]:
    """Scores in percent, the columns of each table by its title."""
    tables: dict[str, list[Column]] = {}
    for base, points in _bases(settings).items():
        scores = {
            name: scenario_cells(metrics, settings, name, mean_score, scale=PERCENT)
            for name in points
        }
        if sweep_grid(settings) is None:
            columns = [_by_method(scores, settings)]
        else:
            columns = [_grid(scores, method, settings) for method in settings.methods]
        tables |= zip(_titles(base, settings), columns, strict=True)
    return tables


def sweep_notes(metrics: Metrics, settings: ResultsStage) -> dict[str, list[str]]:
    """What is to be said below a table, by its title."""
    return {
        title: [
            line
            for name in points
            for line in note(metrics, settings, settings.scenarios[name], name)
        ]
        for base, points in _bases(settings).items()
        for title in _titles(base, settings)
    }


def _titles(base: str, settings: ResultsStage) -> list[str]:
    """Titles of the tables of a scenario of the config: one, or a grid for each method."""
    metric = score_title(settings, _bases(settings)[base][0])
    if sweep_grid(settings) is None:
        return [f"{base}: {metric}"]
    return [f"{base}, {method}: {metric}" for method in settings.methods]


def _bases(settings: ResultsStage) -> dict[str, list[str]]:
    """Scenarios of the config -> names of their points, in order."""
    found: dict[str, list[str]] = {}
    for name, point in settings.sweep.items():
        found.setdefault(point.base, []).append(name)
    return found


def _by_method(scores: dict[str, dict[str, Cell]], settings: ResultsStage) -> list[Column]:
    """One column per value of the one setting that varies."""
    (key,) = sweep_keys(settings)
    return [
        Column(f"{_short(key)}\n{shown(settings.sweep[name].values[key])}", cells, "highest")
        for name, cells in scores.items()
    ]


def _grid(scores: dict[str, dict[str, Cell]], method: str, settings: ResultsStage) -> list[Column]:
    """One row per value of the first setting, and one column per value of the second."""
    first, second = sweep_keys(settings)
    columns: dict[str, dict[str, Cell]] = {}
    for name, cells in scores.items():
        values = settings.sweep[name].values
        column = columns.setdefault(shown(values[second]), {})
        column[shown(values[first])] = cells[method]
    return [
        Column(f"{_short(second)}\n{value}", cells, "highest") for value, cells in columns.items()
    ]


def _short(key: str) -> str:
    """Name of a setting, without its section."""
    return key.rpartition(".")[2]


def sweep_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``sweep.csv``: scores as fractions, losses in nats per token."""
    rows = []
    for name, point in settings.sweep.items():
        scores = scenario_cells(metrics, settings, name, mean_score)
        losses = scenario_cells(metrics, settings, name, mean_loss)
        for method in settings.methods:
            rows.append(
                {
                    "base": point.base,
                    **{key: _field(value) for key, value in point.values.items()},
                    "scenario": name,
                    "metric": settings.metrics[name],
                    "method": method,
                    "seeds": len(settings.scenarios[name]),
                    "score_mean": known(scores[method].mean),
                    "score_std": scores[method].std,
                    "eval_loss_mean": known(losses[method].mean),
                    "eval_loss_std": losses[method].std,
                }
            )
    return rows


def _field(value: Any) -> Any:
    """A value in a csv file: numbers and texts as they are."""
    return value if isinstance(value, int | float | str) else shown(value)
