"""The main table: methods x scenarios.

A score is the unweighted mean over the clients that have a number in every row, then the mean and
the sample standard deviation over seeds (arXiv:2411.19128, section 5.1). The gain of the reference
method r in a scenario is (score_r - b) / b, where b is the best score of the other methods; the
average gain is the mean over scenarios of these gains, not the gain of the average scores.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedamole.comparison import known, scenario_cells, score_title, sizes
from fedamole.privacy_tables import privacy_fields
from fedamole.rendering import PERCENT, Cell, Column
from fedamole.results import Metrics, mean_loss, mean_score
from fedamole.stages import ResultsStage


def score_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Scores in percent, one column per scenario, and their average if there are several.

    Below are the gains, and those of a paper where the settings know them.
    """
    columns = []
    for name in settings.scenarios:
        cells = scenario_cells(metrics, settings, name, mean_score, scale=PERCENT)
        title = f"{name}\n{score_title(settings, name)}"
        found = gain(cells, settings.tables.reference)
        columns.append(Column(title, cells, "highest", found, below=_published(settings, name)))
    if len(columns) > 1:
        columns.append(_average(columns, _published(settings, None)))
    return columns


def loss_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Losses on the evaluation set in nats per token, one column per scenario."""
    return [
        Column(f"{name}\neval loss", scenario_cells(metrics, settings, name, mean_loss), "lowest")
        for name in settings.scenarios
    ]


def gain(cells: dict[str, Cell], reference: str) -> float | None:
    """Relative gain of the reference method over the best of the others, as a fraction.

    None if there is nothing to compare: the reference is not in the table, or nothing else is. Not
    a number if the best of the others is 0, over which no relative gain exists.
    """
    others = [cell.mean for method, cell in cells.items() if method != reference]
    if reference not in cells or not others:
        return None
    best = max(others)
    return (cells[reference].mean - best) / best if best else math.nan


def average_gain(metrics: Metrics, settings: ResultsStage, method: str) -> float | None:
    """Mean over all scenarios of the gains of a method; None if there is nothing to compare."""
    gains = [
        gain(scenario_cells(metrics, settings, name, mean_score), method)
        for name in settings.scenarios
    ]
    return _mean([value for value in gains if value is not None])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _published(settings: ResultsStage, scenario: str | None) -> dict[str, float]:
    """Line of the gain that a paper gives the reference method, by its label; empty if none."""
    paper = settings.tables.published
    if paper is None:
        return {}
    return {
        f"gain in the paper:\n{paper.source}": number.value / PERCENT
        for number in paper.numbers
        if number.what in ("gain", "average gain")
        and (number.method, number.scenario) == (settings.tables.reference, scenario)
    }


def _average(columns: Sequence[Column], below: Mapping[str, float]) -> Column:
    """Unweighted mean over scenarios of the scores and of the gains."""
    cells = {
        method: Cell(fmean(column.cells[method].mean for column in columns))
        for method in columns[0].cells
    }
    gains = [column.gain for column in columns if column.gain is not None]
    return Column("average (%)", cells, "highest", _mean(gains), below=below)


def main_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``main.csv``: scores and gains as fractions, losses in nats per token."""
    rows = []
    for name in settings.scenarios:
        scores = scenario_cells(metrics, settings, name, mean_score)
        losses = scenario_cells(metrics, settings, name, mean_loss)
        fewest, everyone = sizes(metrics, settings, name)
        for method in settings.methods:
            is_reference = method == settings.tables.reference
            rows.append(
                {
                    "scenario": name,
                    "metric": settings.metrics[name],
                    "method": method,
                    "seeds": len(settings.scenarios[name]),
                    "clients": fewest,
                    "clients_total": everyone,
                    "score_mean": known(scores[method].mean),
                    "score_std": scores[method].std,
                    "eval_loss_mean": known(losses[method].mean),
                    "eval_loss_std": losses[method].std,
                    "gain": known(gain(scores, method)) if is_reference else None,
                    **privacy_fields(metrics, settings.scenarios[name], method),
                }
            )
    return rows
