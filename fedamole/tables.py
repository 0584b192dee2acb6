"""Tables of a study: methods x scenarios, x clients, x measures of their assignments.

As csv, Markdown, LaTeX and HTML.

The middle of ``fedamole tables``: metrics in, texts out. The same metrics give the same bytes.

A score is the unweighted mean over the clients that have a number in every row, then the mean and
the sample standard deviation over seeds (arXiv:2411.19128, section 5.1). The gain of the reference
method r in a scenario is (score_r - b) / b, where b is the best score of the other methods.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from fedamole.assignment_table import (
    assignment_columns,
    assignment_rows,
    measured_assignments,
)
from fedamole.comparison import compared, counted, note, sizes
from fedamole.privacy_tables import client_epsilon_columns, epsilon_columns, privacy_fields
from fedamole.records import METRIC_LABELS, ClientRecord
from fedamole.rendering import (
    PERCENT,
    Cell,
    Column,
    html_page,
    html_table,
    latex,
    latex_notes,
    markdown,
    over_seeds,
)
from fedamole.results import Metrics, csv_text, mean_loss, mean_score, slugs_of, tables
from fedamole.settings.output import TableName
from fedamole.stages import ResultsStage


def table_files(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render all tables.

    Returns
    -------
    dict[str, str]
        File name (:func:`fedamole.results.table_names`) -> text.
    """
    files: dict[str, str] = {}
    for name in tables(settings):
        files |= RENDERED[name](metrics, settings)
    return files


def _main(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the table of methods and scenarios."""
    scores, losses = score_columns(metrics, settings), loss_columns(metrics, settings)
    blocks = [block for block in (scores, losses, epsilon_columns(metrics, settings)) if block]
    columns = [column for block in blocks for column in block]
    reference, decimals = settings.tables.reference, settings.tables.decimals
    notes = [
        line
        for name, slugs in settings.scenarios.items()
        for line in note(metrics, settings, slugs, name)
    ]
    texts = [latex(block, reference, decimals) for block in blocks]
    return {
        "main.html": html_page(
            "Methods and scenarios",
            {"Methods and scenarios": html_table(columns, reference, decimals, notes)},
        ),
        "main.csv": csv_text(main_rows(metrics, settings)),
        "main.md": markdown(columns, reference, decimals, notes),
        "main.tex": "\n".join(texts) + latex_notes(notes),
    }


def _clients(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of single clients."""
    clients = clients_columns(metrics, settings) | client_epsilon_columns(metrics, settings)
    remarks = {
        title: note(metrics, settings, [slug], "mean, worst, std")
        for title, slug in zip(clients, slugs_of(settings), strict=False)
    }
    files = {"clients.csv": csv_text(clients_rows(metrics, settings))}
    return files | titled("clients", "Client by client", clients, settings, remarks)


def _assignments(metrics: Metrics, settings: ResultsStage) -> dict[str, str]:
    """Render the tables of assignments."""
    measured = measured_assignments(metrics, settings)
    files = {"assignments.csv": csv_text(assignment_rows(measured, settings))}
    return files | titled("assignments", "Assignments", assignment_columns(measured), settings)


def titled(
    name: str,
    heading: str,
    tables: dict[str, list[Column]],
    settings: ResultsStage,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Render several tables, each under its title and over its notes, into one file per format."""
    reference, decimals = settings.tables.reference, settings.tables.decimals
    below = {title: (notes or {}).get(title, ()) for title in tables}
    page = {
        title: html_table(columns, reference, decimals, below[title])
        for title, columns in tables.items()
    }
    return {
        f"{name}.html": html_page(heading, page),
        f"{name}.md": "\n".join(
            f"**{title}**\n\n{markdown(columns, reference, decimals, below[title])}"
            for title, columns in tables.items()
        ),
        f"{name}.tex": "\n".join(
            f"% {title}\n{latex(columns, reference, decimals)}{latex_notes(below[title])}"
            for title, columns in tables.items()
        ),
    }


# What the tables say


def score_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Scores in percent, one column per scenario, and their average if there are several."""
    columns = []
    for name, metric in _scenarios(settings):
        cells = main_cells(metrics, settings, name, mean_score, scale=PERCENT)
        title = f"{name} {METRIC_LABELS[metric]} (%)"
        columns.append(Column(title, cells, "highest", gain(cells, settings.tables.reference)))
    if len(columns) > 1:
        columns.append(_average(columns))
    return columns


def loss_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Losses on the evaluation set in nats per token, one column per scenario."""
    return [
        Column(f"{name} eval loss", main_cells(metrics, settings, name, mean_loss), "lowest")
        for name, _ in _scenarios(settings)
    ]


def main_cells(
    metrics: Metrics,
    settings: ResultsStage,
    name: str,
    measure: Callable[[list[ClientRecord]], float],
    scale: float = 1,
) -> dict[str, Cell]:
    """Mean and spread over the seeds of a scenario, for each method.

    Parameters
    ----------
    metrics
        All runs.
    settings
        The study; says which round counts.
    name
        Scenario, without the seed.
    measure
        Mean over clients of a run.
    scale
        Factor on the numbers.
    """
    slugs = settings.scenarios[name]
    clients = {slug: compared(metrics, settings, slug) for slug in slugs}

    def mean(slug: str, method: str) -> float:
        records = counted(metrics, settings, slug, method)
        chosen = [record for record in records if record.client in clients[slug]]
        return scale * measure(chosen) if chosen else math.nan

    return {
        method: over_seeds([mean(slug, method) for slug in slugs]) for method in settings.methods
    }


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


def _average(columns: Sequence[Column]) -> Column:
    """Unweighted mean over scenarios of the scores and of the gains."""
    cells = {
        method: Cell(fmean(column.cells[method].mean for column in columns))
        for method in columns[0].cells
    }
    gains = [column.gain for column in columns if column.gain is not None]
    return Column("average (%)", cells, "highest", fmean(gains) if gains else None)


def clients_columns(metrics: Metrics, settings: ResultsStage) -> dict[str, list[Column]]:
    """Scores in percent per client, with mean, worst and spread over those in every row.

    One table per scenario slug.

    Seeds are not averaged: client 0 of one seed has nothing in common with client 0 of another.
    """
    tables = {}
    for name, metric in _scenarios(settings):
        for slug in settings.scenarios[name]:
            scores = {
                method: {
                    record.client: PERCENT * record.score
                    for record in counted(metrics, settings, slug, method)
                }
                for method in settings.methods
            }
            chosen = compared(metrics, settings, slug)
            tables[f"{slug}: {METRIC_LABELS[metric]} (%)"] = _client_columns(scores, chosen)
    return tables


def _client_columns(scores: dict[str, dict[int, float]], chosen: Collection[int]) -> list[Column]:
    """Columns for all clients and a summary of those chosen, from method -> client -> score.

    A client that never took part in a method's rounds has no number there.
    """
    clients = sorted({client for by_client in scores.values() for client in by_client})
    columns = [
        Column(
            f"client {k}",
            {method: Cell(values.get(k, math.nan)) for method, values in scores.items()},
            "highest",
        )
        for k in clients
    ]
    # Not a number where no client is in every row.
    lists = {
        method: [by_client[k] for k in clients if k in chosen] or [math.nan]
        for method, by_client in scores.items()
    }
    means = {method: Cell(fmean(values)) for method, values in lists.items()}
    worst = {method: Cell(min(values)) for method, values in lists.items()}
    columns += [Column("mean", means, "highest"), Column("worst", worst, "highest")]
    if len(clients) > 1:
        stds = {method: over_seeds(values).std for method, values in lists.items()}
        spread = {m: Cell(math.nan if std is None else std) for m, std in stds.items()}
        columns.append(Column("std", spread))
    return columns


def _scenarios(settings: ResultsStage) -> list[tuple[str, str]]:
    """Names of the scenarios with their metric."""
    return [(name, settings.metrics[name]) for name in settings.scenarios]


# Tidy rows


def main_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``main.csv``: scores and gains as fractions, losses in nats per token."""
    rows = []
    for name, metric in _scenarios(settings):
        scores = main_cells(metrics, settings, name, mean_score)
        losses = main_cells(metrics, settings, name, mean_loss)
        fewest, everyone = sizes(metrics, settings, name)
        for method in settings.methods:
            is_reference = method == settings.tables.reference
            rows.append(
                {
                    "scenario": name,
                    "metric": metric,
                    "method": method,
                    "seeds": len(settings.scenarios[name]),
                    "clients": fewest,
                    "clients_total": everyone,
                    "score_mean": _known(scores[method].mean),
                    "score_std": scores[method].std,
                    "eval_loss_mean": _known(losses[method].mean),
                    "eval_loss_std": losses[method].std,
                    "gain": gain(scores, method) if is_reference else None,
                    **privacy_fields(metrics, settings.scenarios[name], method),
                }
            )
    return rows


def _known(number: float) -> float | None:
    """Leave a field empty where there is no number."""
    return None if math.isnan(number) else number


def clients_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``clients.csv``: scores as fractions, losses in nats per token."""
    rows = []
    for name, metric in _scenarios(settings):
        for slug in settings.scenarios[name]:
            for method in settings.methods:
                info = metrics.run(slug, method).info
                shared = {"scenario": name, "seed": info.seed, "metric": metric, "method": method}
                fields = {"round", "client", "score", "eval_loss", "num_eval", "num_test"}
                for client in counted(metrics, settings, slug, method):
                    private = privacy_fields(metrics, [slug], method, client.client)
                    rows.append({**shared, **client.model_dump(include=fields), **private})
    return rows


RENDERED: dict[TableName, Callable[[Metrics, ResultsStage], dict[str, str]]] = {
    "main": _main,
    "clients": _clients,
    "assignments": _assignments,
}
