"""The main table: methods x scenarios.

A score is the unweighted mean over the clients that have a number in every row, then the mean and
the sample standard deviation over seeds (arXiv:2411.19128, section 5.1). The gain of the reference
method r in a scenario is (score_r - b) / b, where b is the best score of its rivals: the other
methods, or those of them that the settings name. The average of the scores is taken over scenarios
for each seed, before the mean and the deviation over seeds. The average gain is the mean over
scenarios of these gains, not the gain of the average scores.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedamole.comparison import average_cells, known, scenario_cells, score_title, sizes
from fedamole.privacy_tables import privacy_fields
from fedamole.rendering import PERCENT, Cell, Column
from fedamole.results import Metrics, mean_loss, mean_score
from fedamole.stages import ResultsStage

AVERAGE = "average"


def score_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Scores in percent, one column per scenario, and their average if there are several.

    Below are the gains, and those of a paper where the settings know them.
    """
    columns = []
    for name in settings.scenarios:
        cells = scenario_cells(metrics, settings, name, mean_score, scale=PERCENT)
        title = f"{name}\n{score_title(settings, name)}"
        found = gain(cells, settings.tables.reference, settings.tables.rivals)
        columns.append(Column(title, cells, "highest", found, below=_published(settings, name)))
    if len(columns) > 1:
        gains = [column.gain for column in columns if column.gain is not None]
        cells = average_cells(metrics, settings, mean_score, scale=PERCENT)
        below = _published(settings, None)
        columns.append(Column("average (%)", cells, "highest", _mean(gains), below=below))
    return columns


def loss_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Losses on the evaluation set in nats per token, one column per scenario."""
    return [
        Column(f"{name}\neval loss", scenario_cells(metrics, settings, name, mean_loss), "lowest")
        for name in settings.scenarios
    ]


def gain(
    cells: Mapping[str, Cell], reference: str, rivals: Sequence[str] | None = None
) -> float | None:
    """Relative gain of the reference method over the best of its rivals, as a fraction.

    None if there is nothing to compare: the reference is not in the table, or no rival is. Not a
    number if the best rival has 0, over which no relative gain exists.

    Parameters
    ----------
    cells
        Method -> score.
    reference
        Method whose gain it is.
    rivals
        Methods to compare with; None: all others.
    """
    among = cells if rivals is None else rivals
    others = [cells[method].mean for method in among if method != reference]
    if reference not in cells or not others:
        return None
    best = max(others)
    return (cells[reference].mean - best) / best if best else math.nan


def average_gain(metrics: Metrics, settings: ResultsStage, method: str) -> float | None:
    """Mean over all scenarios of the gains of a method; None if there is nothing to compare."""
    gains = [
        gain(scenario_cells(metrics, settings, name, mean_score), method, settings.tables.rivals)
        for name in settings.scenarios
    ]
    return _mean([value for value in gains if value is not None])


def rivals_note(settings: ResultsStage) -> list[str]:
    """Say which methods the gain is over, where these are not all others."""
    rivals = settings.tables.rivals
    return [] if rivals is None else [f"best other: of {', '.join(rivals)}"]


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


def main_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``main.csv``: scores and gains as fractions, losses in nats per token.

    With several scenarios the last rows are their averages.
    """
    rows = []
    for name in settings.scenarios:
        scores = scenario_cells(metrics, settings, name, mean_score)
        losses = scenario_cells(metrics, settings, name, mean_loss)
        fewest, everyone = sizes(metrics, settings, name)
        gained = gain(scores, settings.tables.reference, settings.tables.rivals)
        shared: dict[str, Any] = {"scenario": name, "metric": settings.metrics[name]}
        shared |= {"seeds": len(settings.scenarios[name])}
        for method in settings.methods:
            private = privacy_fields(metrics, settings.scenarios[name], method)
            clients = {"clients": fewest, "clients_total": everyone}
            found = _fields(method, scores, losses, gained, settings)
            rows.append({**shared, "method": method, **clients, **found, **private})
    if len(settings.scenarios) > 1:
        rows += _average_rows(metrics, settings, list(rows[0]))
    return rows


def _average_rows(
    metrics: Metrics, settings: ResultsStage, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of the averages over scenarios; fields that have none are empty."""
    scores, losses = (average_cells(metrics, settings, of) for of in (mean_score, mean_loss))
    gained = average_gain(metrics, settings, settings.tables.reference)
    seeds = {len(slugs) for slugs in settings.scenarios.values()}
    return [
        dict.fromkeys(names)
        | {"scenario": AVERAGE, "method": method, "seeds": max(seeds)}
        | _fields(method, scores, losses, gained, settings)
        for method in settings.methods
    ]


def _fields(
    method: str,
    scores: Mapping[str, Cell],
    losses: Mapping[str, Cell],
    gained: float | None,
    settings: ResultsStage,
) -> dict[str, float | None]:
    """Numbers of a row; the gain stands in the row of the reference."""
    return {
        "score_mean": known(scores[method].mean),
        "score_std": scores[method].std,
        "eval_loss_mean": known(losses[method].mean),
        "eval_loss_std": losses[method].std,
        "gain": known(gained) if method == settings.tables.reference else None,
    }
