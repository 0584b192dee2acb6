"""The command that collects what a run cost: measured, so it is in no metrics file."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.artifacts import Header, sha256
from fedamole.config import parse
from fedamole.errors import FedamoleError
from fedamole.progress import ClientProgress, read_progress
from fedamole.stages import ClientStage, digest

if TYPE_CHECKING:
    from fedamole.costs import RoundCosts
    from fedamole.results import Run


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("gather-costs", help="collect what a run cost into one file")
    parser.add_argument("--settings", required=True, help="JSON of the clients' settings")
    parser.add_argument("--scenario", required=True, help="name of the scenario with its seed")
    parser.add_argument("--method", required=True, help="row of the tables")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics file of the method")
    parser.add_argument(
        "--progress",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the run with the progress of its clients, one folder a round",
    )
    parser.add_argument(
        "--benchmarks",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the run with Snakemake's benchmarks, one folder a round",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(command=run_gather_costs)


def run_gather_costs(args: argparse.Namespace) -> None:
    """Write what was measured of each client and round; what was not is null."""
    from fedamole.costs import KIND, RunCosts, machines_of, write_costs
    from fedamole.results import read_run

    settings = parse(ClientStage, args.settings, "--settings")
    stage_digest = digest(settings)
    run = read_run(args.metrics, {args.scenario: {args.method: stage_digest}})
    if (run.info.scenario, run.info.method) != (args.scenario, args.method):
        raise FedamoleError(
            f"{args.metrics}: is of {run.info.method} on {run.info.scenario}; "
            f"{args.method} on {args.scenario} is needed"
        )
    records = {round_: _records(args.progress, round_) for round_ in sorted(run.rounds)}
    costs = RunCosts(
        scenario=run.info.scenario,
        seed=run.info.seed,
        method=run.info.method,
        machines=machines_of((item for items in records.values() for item in items), stage_digest),
        rounds=list(_rounds(run, records, args.benchmarks, stage_digest)),
    )
    write_costs(args.out, Header(KIND, stage_digest, {"metrics": sha256(args.metrics)}), costs)


def _rounds(
    run: "Run", records: dict[int, list[ClientProgress]], benchmarks: Path, stage_digest: str
) -> "Iterator[RoundCosts]":
    """Put together what each round cost."""
    from fedamole.costs import SERVER_JOBS, RoundCosts, client_costs, job_seconds

    for round_, items in records.items():
        clients = [record.client for record in run.rounds[round_]]
        folder = benchmarks / _name(round_)
        # Before training there is nothing to average.
        jobs = SERVER_JOBS if round_ else {}
        yield RoundCosts(
            round=round_,
            clients=client_costs(clients, items, run.info.method, stage_digest),
            **{field: job_seconds(folder / f"{job}.tsv") for job, field in jobs.items()},
        )


def _records(progress: Path, round_: int) -> list[ClientProgress]:
    """Records of a round; none where the folder is gone."""
    folder = progress / _name(round_)
    return read_progress(folder) if folder.is_dir() else []


def _name(round_: int) -> str:
    return f"round_{round_:03d}"
