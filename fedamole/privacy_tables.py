"""What the tables say of differential privacy; nothing where no method trains privately.

The epsilon of a client adds up over its rounds, so the last one counts, also where the scores are
those of the best round. Clients have disjoint data: the epsilon of a run is the largest one of any
client, and that of a scenario the largest one over its seeds, since a mean bounds nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

from fedamole.rendering import Cell, Column
from fedamole.results import Metrics, Run
from fedamole.stages import ResultsStage


def client_epsilons(run: Run) -> dict[int, float]:
    """Epsilon of each client after its last round; empty without differential privacy."""
    spent: dict[int, float] = {}
    for record in (client for clients in run.rounds.values() for client in clients):
        if record.epsilon is not None:
            spent[record.client] = max(record.epsilon, spent.get(record.client, 0.0))
    return spent


def delta_of(metrics: Metrics) -> float | None:
    """Delta of the study; None if no method trains privately."""
    # A run trains privately as a whole: its first record tells.
    first = (next(iter(run.rounds.values()))[0] for run in metrics.runs.values())
    return next((record.delta for record in first if record.delta is not None), None)


def largest_epsilon(
    metrics: Metrics, slugs: Sequence[str], method: str, client: int | None = None
) -> float | None:
    """Largest epsilon over scenario slugs and the clients of a method, or of one client."""
    found = [client_epsilons(metrics.run(slug, method)) for slug in slugs]
    return max(
        (e for spent in found for k, e in spent.items() if client in (None, k)), default=None
    )


def epsilon_columns(metrics: Metrics, settings: ResultsStage) -> list[Column]:
    """Columns of the main table, one per scenario."""
    delta = delta_of(metrics)
    if delta is None:
        return []
    columns = []
    for name, slugs in settings.scenarios.items():
        found = {method: largest_epsilon(metrics, slugs, method) for method in settings.methods}
        cells = {method: Cell(math.nan if e is None else e) for method, e in found.items()}
        columns.append(Column(f"{name} epsilon (delta {delta:g})", cells))
    return columns


def client_epsilon_columns(metrics: Metrics, settings: ResultsStage) -> dict[str, list[Column]]:
    """Epsilon of each client and the largest one, a table per scenario slug."""
    delta = delta_of(metrics)
    if delta is None:
        return {}
    tables = {}
    for slug in [slug for slugs in settings.scenarios.values() for slug in slugs]:
        found = {method: client_epsilons(metrics.run(slug, method)) for method in settings.methods}
        spent = {method: by_client for method, by_client in found.items() if by_client}
        tables[f"{slug}: epsilon (delta {delta:g})"] = _columns(spent)
    return tables


def _columns(spent: dict[str, dict[int, float]]) -> list[Column]:
    """Columns from method -> client -> epsilon."""
    clients = sorted({client for by_client in spent.values() for client in by_client})
    columns = [
        Column(f"client {k}", {m: Cell(by_client.get(k, 0.0)) for m, by_client in spent.items()})
        for k in clients
    ]
    largest = {method: Cell(max(by_client.values())) for method, by_client in spent.items()}
    return [*columns, Column("largest", largest)]


def privacy_fields(
    metrics: Metrics, slugs: Sequence[str], method: str, client: int | None = None
) -> dict[str, Any]:
    """Fields of a tidy row, see :func:`largest_epsilon`; none if no method trains privately."""
    delta = delta_of(metrics)
    if delta is None:
        return {}
    epsilon = largest_epsilon(metrics, slugs, method, client)
    return {"epsilon": epsilon, "delta": None if epsilon is None else delta}
