"""The command that collects a run's small facts: the only interface between training and tables."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedamole.artifacts import Header, canonical, read_record, replacing, sha256
from fedamole.cli.arguments import add_quorum
from fedamole.cli.server import warn_of_dropout
from fedamole.config import parse
from fedamole.errors import FedamoleError
from fedamole.records import KIND
from fedamole.registry import lookup
from fedamole.stages import ClientStage, RunStage, digest, with_quorum

if TYPE_CHECKING:
    from fedamole.pools import Assignment

# What of a client's record the tables and figures use; its answers stay with the run.
CLIENT_FIELDS = (
    "round",
    "client",
    "eval_loss",
    "score",
    "num_train",
    "num_eval",
    "num_test",
    "steps",
    "train_loss_first",
    "train_loss_last",
)
PRIVACY_FIELDS = ("epsilon", "delta")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("gather", help="collect the metrics of a run into one file")
    parser.add_argument("--settings", required=True, help="JSON of the clients' settings")
    parser.add_argument("--scenario", required=True, help="name of the scenario with its seed")
    parser.add_argument("--method", required=True, help="row of the tables")
    parser.add_argument("--partition", type=Path, required=True)
    metrics = parser.add_mutually_exclusive_group(required=True)
    metrics.add_argument("--metrics", type=Path, nargs="+", metavar="FILE")
    metrics.add_argument(
        "--metrics-list", type=Path, metavar="FILE", help="text file of their paths, one a line"
    )
    parser.add_argument("--assignments", type=Path, nargs="*", default=[], metavar="FILE")
    add_quorum(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(command=run_gather)


def run_gather(args: argparse.Namespace) -> None:
    """Write one JSON object a line: the run, its partition, its clients, its assignments."""
    from fedamole.pool_files import read_assignment

    settings = parse(ClientStage, args.settings, "--settings")
    stage_digest = digest(settings)
    metrics = args.metrics or _listed(args.metrics_list)
    tests = {path: read_record(path, "metrics", stage_digest)[1] for path in metrics}
    clients = [record for record in tests.values() if "dropped_out" not in record]
    dropouts = {path: record for path, record in tests.items() if "dropped_out" in record}
    if lookup(args.method).evaluated == "local":
        _check_quorums(clients, dropouts, with_quorum(settings.run, args.quorum))
    partition = read_record(args.partition, "partition", digest(settings.run.tokens.scenario))[1]
    assignments = [read_assignment(path, digest(settings.run)) for path in args.assignments]
    parents = {
        "partition": sha256(args.partition),
        "metrics": _digest_of_all(metrics),
        "assignments": _digest_of_all(args.assignments),
    }
    header = json.loads(Header(KIND, stage_digest, parents).to_json())
    records = [
        {"header": header},
        _run_record(args.scenario, args.method, settings, clients),
        {"record": "partition", "classes": partition["classes"], "counts": partition["counts"]},
        *_client_records(clients),
        *({"record": "dropout", "reason": r.pop("dropped_out"), **r} for r in dropouts.values()),
        *(_assignment_record(assignment, settings.run) for assignment in assignments),
    ]
    with replacing(args.out) as scratch:
        scratch.write_text("".join(canonical(record) + "\n" for record in records))


def _listed(path: Path) -> list[Path]:
    """Read the paths in a list, which may be a pipe."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FedamoleError(f"{path}: is no readable list of paths ({error})") from error
    if not lines:
        raise FedamoleError(f"{path}: lists no paths")
    return [Path(line) for line in lines]


def _check_quorums(
    clients: list[dict[str, Any]], dropouts: dict[Path, dict[str, Any]], settings: RunStage
) -> None:
    """Refuse a round from which too few clients have reported: the last one is not averaged."""
    from fedamole.aggregation import check_quorum

    reported: dict[int, set[int]] = {record["round"]: set() for record in dropouts.values()}
    for record in clients:
        reported.setdefault(record["round"], set()).add(record["client"])
    for round_ in sorted(reported):
        try:
            check_quorum(reported[round_], settings.population, round_)
        except FedamoleError:
            for path, record in dropouts.items():
                if record["round"] == round_:
                    warn_of_dropout(f"{settings.label} round {round_}", path, record["dropped_out"])
            raise


def _digest_of_all(paths: list[Path]) -> str:
    """One SHA-256 for many files, in the order given."""
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def _run_record(
    scenario: str, method: str, settings: ClientStage, clients: list[dict[str, Any]]
) -> dict[str, Any]:
    """Say what was run."""
    return {
        "record": "run",
        "scenario": scenario,
        "seed": settings.run.seed,
        "method": method,
        "metric": settings.run.scenario.dataset.metric,
        "clients": settings.run.scenario.clients,
        "rounds": max(record["round"] for record in clients),
        "evaluated": lookup(method).evaluated,
    } | _took_part(method, settings, max(record["round"] for record in clients))


def _took_part(method: str, settings: ClientStage, rounds: int) -> dict[str, Any]:
    """Who was tested after each round, where these are not all clients."""
    who = settings.run.population
    if lookup(method).evaluated == "aggregated" or who.everyone:
        return {}
    return {"took_part": {str(t): who.reporting(t) for t in range(1, rounds + 1)}}


def _client_records(clients: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One record per round and client, in that order."""
    for record in sorted(clients, key=lambda record: (record["round"], record["client"])):
        spent = {field: record[field] for field in PRIVACY_FIELDS if field in record}
        yield {"record": "client", **{field: record[field] for field in CLIENT_FIELDS}, **spent}


def _assignment_record(assignment: "Assignment", settings: RunStage) -> dict[str, Any]:
    """Clients that hold each expert, module by module, and how good that is."""
    fewest, most = settings.assignment.bounds(settings.adapter.top_k)
    holders = [
        [[int(k) for k in row_K.nonzero()[0]] for row_K in module_EK]
        for module_EK in assignment.holders_MEK
    ]
    return {
        "record": "assignment",
        "round": assignment.round,
        "modules": list(assignment.modules),
        "num_experts": assignment.holders_MEK.shape[1],
        "holders": holders,
        "min_experts": fewest,
        "max_experts": most,
        "objective": assignment.objective_M.tolist(),
        **_yardsticks(assignment, settings),
        **_map(assignment),
    }


def _yardsticks(assignment: "Assignment", settings: RunStage) -> dict[str, list[float]]:
    """Objectives of the best and of a random assignment, whatever strategy made this one."""
    from fedamole.assignment import assign_all

    drawn = settings.population.drawn(assignment.round)
    best = assign_all(
        assignment.scores_MEK,
        settings.assignment,
        settings.adapter.top_k,
        assignment.modules,
        assignment.round,
        clients=drawn,
    )
    # At random, each of the clients holds an expert with the same probability.
    share = settings.assignment.choices / len(drawn)
    chance_M = share * assignment.scores_MEK.sum(axis=(1, 2), dtype=float)
    return {"optimum": best.objective_M.tolist(), "chance": chance_M.tolist()}


def _map(assignment: "Assignment") -> dict[str, Any]:
    """Where the clients lie by their routing logits; nothing if there are no scores."""
    from fedamole.routing_map import map_clients

    found = map_clients(assignment.scores_MEK)
    return {} if found is None else {"map": found.places, "map_shares": found.shares}
