"""Numbers behind the figures of how stable assignments are and what they go by, as tidy rows."""

from statistics import fmean

from fedamole.assignment_measures import holders, kept_by_round
from fedamole.errors import FedamoleError
from fedamole.figure_data import Rows
from fedamole.records import AssignmentRecord, PartitionRecord
from fedamole.results import Metrics, Run, with_experts
from fedamole.stages import ResultsStage


def stability_rows(metrics: Metrics, settings: ResultsStage) -> Rows:
    """One row per scenario, seed, method with experts and round: the share of experts kept.

    Held in both of two rounds, of those held in either (Jaccard index), mean over clients and
    modules. Where clients are sampled, a client is compared with the last round in which it took
    part. None where there is nothing to compare, as in the first round.
    """
    rows = []
    for name, slugs in settings.scenarios.items():
        for slug in slugs:
            for method in with_experts(settings):
                run = metrics.run(slug, method)
                row = {"scenario": name, "seed": run.info.seed, "method": method}
                rounds = sorted(run.assignments)
                held = [holders(run.assignments[t], run.info.clients) for t in rounds]
                for round_, kept in zip(rounds, kept_by_round(held), strict=True):
                    rows.append({**row, "round": round_, "kept": fmean(kept) if kept else None})
    return rows


def routing_rows(run: Run) -> Rows:
    """One row per client: its place by its routing logits in the last round, and its experts.

    The place is None for a client that did not take part in that round.

    Raises
    ------
    FedamoleError
        If the metrics have no map.
    """
    assignment = run.assignments[run.last_round]
    if assignment.map is None or assignment.map_shares is None:
        raise FedamoleError(
            f"figure routing: the metrics of {run.info.method} on {run.info.scenario} have no map "
            "of the clients; renew them from the study's results folder: snakemake --configfile "
            "CONFIG --cores 1 --forcerun gather"
        )
    share_x, share_y = assignment.map_shares
    rows = []
    for client, place in enumerate(assignment.map):
        x, y = place or (None, None)
        rows.append(
            {
                "scenario": run.info.scenario,
                "method": run.info.method,
                "round": assignment.round,
                "client": client,
                "class": _most_frequent_class(run.partition, client),
                "x": x,
                "y": y,
                "share_x": share_x,
                "share_y": share_y,
                **_held(assignment, client),
            }
        )
    return rows


def _most_frequent_class(partition: PartitionRecord, client: int) -> str:
    """Name of the class of which a client has most examples, the first of several."""
    counts = partition.counts[client]
    return partition.classes[counts.index(max(counts))]


def _held(assignment: AssignmentRecord, client: int) -> dict[str, float]:
    """Domain experts of a client: mean over the modules, fewest and most."""
    numbers = [len(assignment.held(module, client)) for module in range(len(assignment.modules))]
    return {
        "experts_mean": fmean(numbers),
        "experts_lowest": min(numbers),
        "experts_highest": max(numbers),
    }
