"""The commands that need the language model: training and testing of clients."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.artifacts import Header, read_record, sha256, write_record
from fedamole.cli.libraries import prepare_libraries
from fedamole.config import parse
from fedamole.errors import FedamoleError
from fedamole.stages import ClientStage, digest

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientSession
    from fedamole.pools import Assignment


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    train = subparsers.add_parser("train-clients", help="train and test clients in one round")
    _add_inputs(train)
    train.add_argument("--out-uploads", type=Path, nargs="+", required=True, metavar="FILE")
    train.add_argument("--out-metrics", type=Path, nargs="+", required=True, metavar="FILE")
    train.set_defaults(command=run_train_clients)
    evaluate = subparsers.add_parser("evaluate-clients", help="test a pool on clients")
    _add_inputs(evaluate)
    evaluate.add_argument("--out-metrics", type=Path, nargs="+", required=True, metavar="FILE")
    evaluate.set_defaults(command=run_evaluate_clients)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share."""
    parser.add_argument("--settings", required=True, help="JSON of the stage's settings")
    parser.add_argument("--round", type=int, required=True, help="round that is trained or tested")
    parser.add_argument("--clients", type=int, nargs="+", required=True, metavar="K")
    parser.add_argument("--backbone", type=Path, required=True, help="prepared backbone folder")
    parser.add_argument("--tokens", type=Path, required=True, help="tokenised scenario folder")
    parser.add_argument("--pool", type=Path, required=True, help="pool of the round before")
    parser.add_argument("--assignment", type=Path, help="who holds which experts in this round")


def run_train_clients(args: argparse.Namespace) -> None:
    """Train clients one after another; write each one's files as soon as it is done."""
    from fedamole.methods import load
    from fedamole.pool_files import read_client_state, write_upload

    settings = parse(ClientStage, args.settings, "--settings")
    run_digest, client_digest = digest(settings.run), digest(settings)
    parents = _parents(args)
    assignment = _read_assignment(args.assignment, args.round, run_digest)
    method = load(settings.run.run)
    with _session(args, settings) as session:
        for client, out_upload, out_metrics in zip(
            args.clients, args.out_uploads, args.out_metrics, strict=True
        ):
            state = read_client_state(args.pool, assignment, client, run_digest)
            upload, report = method.train_client(session, client, args.round, state)
            if _is_first_rank():
                write_upload(out_upload, Header("upload", run_digest, parents), upload)
                _write_metrics(out_metrics, client_digest, parents, client, args.round, report)


def run_evaluate_clients(args: argparse.Namespace) -> None:
    """Test the model of a pool on clients one after another."""
    from fedamole.methods import load
    from fedamole.pool_files import read_client_state

    settings = parse(ClientStage, args.settings, "--settings")
    run_digest, client_digest = digest(settings.run), digest(settings)
    parents = _parents(args)
    assignment = _read_assignment(args.assignment, args.round, run_digest)
    method = load(settings.run.run)
    with _session(args, settings) as session:
        for client, out_metrics in zip(args.clients, args.out_metrics, strict=True):
            state = read_client_state(args.pool, assignment, client, run_digest)
            report = method.evaluate_client(session, client, args.round, state)
            if _is_first_rank():
                _write_metrics(out_metrics, client_digest, parents, client, args.round, report)


@contextlib.contextmanager
def _session(args: argparse.Namespace, settings: ClientStage) -> "Iterator[ClientSession]":
    """Load what the clients of this job share."""
    prepare_libraries(offline=True)
    from fedamole.client import ClientSession
    from fedamole.datasets.tokens import TokenStore
    from fedamole.distributed import process_group

    read_record(args.backbone / "backbone.json", "backbone", digest(settings.run.tokens.backbone))
    store = TokenStore.open(args.tokens, digest(settings.run.tokens))
    clients = settings.run.scenario.clients
    if beyond := [client for client in args.clients if not 0 <= client < clients]:
        raise FedamoleError(f"--clients {beyond[0]}: the scenario has clients 0 to {clients - 1}")
    training = settings.run.training
    with process_group(training.ranks, training.cpu_threads) as device:
        yield ClientSession(settings, args.backbone, store, device)


def _read_assignment(path: Path | None, round_: int, run_digest: str) -> "Assignment | None":
    """Read who holds what; None for a pool without domain experts."""
    from fedamole.pool_files import read_assignment

    if path is None:
        return None
    assignment = read_assignment(path, run_digest)
    if assignment.round != round_:
        raise FedamoleError(f"{path}: is for round {assignment.round}; round {round_} is needed")
    return assignment


def _parents(args: argparse.Namespace) -> dict[str, str]:
    """Digests of what a client's result follows from."""
    parents = {
        "backbone": sha256(args.backbone / "backbone.json"),
        "tokens": sha256(args.tokens / "meta.json"),
        "pool": sha256(args.pool),
    }
    if args.assignment:
        parents["assignment"] = sha256(args.assignment)
    return parents


def _is_first_rank() -> bool:
    """Whether this process writes the files of its job."""
    return int(os.environ["RANK"]) == 0


def _write_metrics(
    path: Path,
    digest: str,
    parents: dict[str, str],
    client: int,
    round_: int,
    report: "ClientReport",
) -> None:
    """Write the record of one client in one round."""
    content = {"client": client, "round": round_, **report.to_mapping()}
    write_record(path, Header("metrics", digest, parents), content)
