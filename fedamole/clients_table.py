"""The tables of single clients: methods x clients, one per scenario and seed."""

import math
from collections.abc import Collection
from statistics import fmean
from typing import Any

from fedamole.comparison import compared, counted, score_title
from fedamole.privacy_tables import privacy_fields
from fedamole.rendering import PERCENT, Cell, Column, over_seeds
from fedamole.results import Metrics
from fedamole.stages import ResultsStage


def clients_columns(metrics: Metrics, settings: ResultsStage) -> dict[str, list[Column]]:
    """Scores in percent per client, with mean, worst and spread over those in every row.

    One table per scenario slug.

    Seeds are not averaged: client 0 of one seed has nothing in common with client 0 of another.
    """
    tables = {}
    for name, slugs in settings.scenarios.items():
        for slug in slugs:
            scores = {
                method: {
                    record.client: PERCENT * record.score
                    for record in counted(metrics, settings, slug, method)
                }
                for method in settings.methods
            }
            chosen = compared(metrics, settings, slug)
            tables[f"{slug}: {score_title(settings, name)}"] = _client_columns(scores, chosen)
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


def clients_rows(metrics: Metrics, settings: ResultsStage) -> list[dict[str, Any]]:
    """Rows of ``clients.csv``: scores as fractions, losses in nats per token."""
    rows = []
    for name, slugs in settings.scenarios.items():
        for slug in slugs:
            for method in settings.methods:
                info = metrics.run(slug, method).info
                shared = {
                    "scenario": name,
                    "seed": info.seed,
                    "metric": settings.metrics[name],
                    "method": method,
                }
                fields = {"round", "client", "score", "eval_loss", "num_eval", "num_test"}
                for client in counted(metrics, settings, slug, method):
                    private = privacy_fields(metrics, [slug], method, client.client)
                    rows.append({**shared, **client.model_dump(include=fields), **private})
    return rows
