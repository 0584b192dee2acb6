"""Numbers behind each figure, as tidy rows; the figures are drawn from these and nothing else."""

from collections.abc import Callable
from itertools import product
from statistics import fmean
from typing import Any

from fedamole.records import AssignmentRecord, ClientRecord
from fedamole.results import Metrics, Run
from fedamole.stages import ResultsStage

Rows = list[dict[str, Any]]

COMMON = "experts in common"


def rounds_rows(metrics: Metrics, settings: ResultsStage) -> Rows:
    """One row per scenario, seed, method and round: mean and range over clients.

    Scores are in [0, 1], losses in nats per token.
    """
    rows = []
    for name, slugs in settings.scenarios.items():
        for slug, method in product(slugs, settings.methods):
            run = metrics.run(slug, method)
            for round_, clients in run.rounds.items():
                row = {"scenario": name, "metric": run.info.metric, "seed": run.info.seed}
                row |= {"method": method, "round": round_}
                row |= _over_clients("score", clients, lambda client: client.score)
                row |= _over_clients("eval_loss", clients, lambda client: client.eval_loss)
                rows.append(row)
    return rows


def _over_clients(
    what: str, clients: list[ClientRecord], measure: Callable[[ClientRecord], float]
) -> dict[str, float]:
    """Mean, lowest and highest value over the clients of a round."""
    values = [measure(client) for client in clients]
    return {
        f"{what}_mean": fmean(values),
        f"{what}_lowest": min(values),
        f"{what}_highest": max(values),
    }


def classes_rows(run: Run) -> Rows:
    """One row per client and class: the number of examples."""
    partition = run.partition
    return [
        {"scenario": run.info.scenario, "client": client, "class": label, "examples": examples}
        for client, counts in enumerate(partition.counts)
        for label, examples in zip(partition.classes, counts, strict=True)
    ]


def experts_rows(run: Run) -> Rows:
    """One row per client and module: the number of domain experts held in the last round."""
    assignment = run.assignments[run.last_round]
    return [
        {
            "scenario": run.info.scenario,
            "method": run.info.method,
            "round": assignment.round,
            "client": client,
            "module": name,
            "experts": len(assignment.held(module, client)),
            "min_experts": assignment.min_experts,
            "max_experts": assignment.max_experts,
        }
        for client in range(run.info.clients)
        for module, name in enumerate(assignment.modules)
    ]


def assignment_rows(run: Run) -> Rows:
    """Rows of the panels of the assignment figure, for the last round.

    A panel named after a module has a row per expert and client: 1 if the client holds the expert.
    The panel :data:`COMMON` has a row per pair of clients: see :func:`share_in_common`.
    """
    assignment = run.assignments[run.last_round]
    clients = range(run.info.clients)
    shared = {"scenario": run.info.scenario, "method": run.info.method, "round": assignment.round}
    rows = []
    for module in first_middle_last(len(assignment.modules)):
        held = [assignment.held(module, client) for client in clients]
        panel = {**shared, "panel": assignment.modules[module]}
        for expert, client in product(range(assignment.num_experts), clients):
            value = float(expert in held[client])
            rows.append({**panel, "row": expert, "column": client, "value": value})
    for client, other in product(clients, repeat=2):
        value = share_in_common(assignment, client, other)
        rows.append({**shared, "panel": COMMON, "row": client, "column": other, "value": value})
    return rows


def first_middle_last(count: int) -> list[int]:
    """Give the indices of the first, the middle and the last of ``count`` things, each once."""
    return sorted({0, count // 2, count - 1})


def share_in_common(assignment: AssignmentRecord, client: int, other: int) -> float:
    """Share of domain experts that two clients both hold, of those that either holds.

    Both numbers are summed over modules (Jaccard index); 0 if neither holds any.
    """
    both = either = 0
    for module in range(len(assignment.modules)):
        mine, theirs = assignment.held(module, client), assignment.held(module, other)
        both += len(mine & theirs)
        either += len(mine | theirs)
    return both / either if either else 0.0
