"""The commands that need the language model: training and testing of clients."""

import argparse
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole import launching
from fedamole.artifacts import Header, read_record, sha256, write_record
from fedamole.cli.libraries import prepare_libraries
from fedamole.config import parse
from fedamole.errors import ClientError, FedamoleError
from fedamole.launching import Layout
from fedamole.progress import RoundProgress, Work, read_progress
from fedamole.stages import ClientStage, digest

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientSession
    from fedamole.pools import Assignment

logger = logging.getLogger(__name__)
# Longest time for which a file written on one node may be invisible on another.
VISIBLE_S, VISIBLE_POLL_S = 90.0, 2.0


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
    parser.add_argument(
        "--progress",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for what each client is doing, and for the files of those that are done "
        "until all are",
    )
    parser.add_argument("--at-once", type=int, default=1, help="clients side by side")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the SLURM job")
    parser.add_argument("--only", type=int, nargs="+", metavar="K", help=argparse.SUPPRESS)


@dataclass
class _Job:
    """What all clients of one call share.

    Attributes
    ----------
    args
        The command line.
    work
        What is done with a client.
    settings
        Of the run and the evaluation.
    outputs
        Client -> its files, in the order of the headers.
    headers
        What the headers of a client's files must be.
    """

    args: argparse.Namespace
    work: Work
    settings: ClientStage
    outputs: dict[int, list[Path]]
    headers: list[Header] = field(init=False)

    def __post_init__(self) -> None:
        parents = _parents(self.args)
        self.headers = [Header("metrics", digest(self.settings), parents)]
        if self.work == "train":
            self.headers.insert(0, Header("upload", digest(self.settings.run), parents))
        self.progress = RoundProgress(self.args.progress, self.work)
        training = self.settings.run.training
        self.layout = Layout(
            self.args.at_once, training.ranks, self.args.nodes, training.cpu_threads
        )

    def missing(self) -> list[int]:
        """Clients whose files are not there, or come from other inputs."""
        finished = self.progress.finished(self.outputs, self.is_current)
        return [client for client in self.outputs if client not in finished]

    def is_current(self, path: Path) -> bool:
        """Whether a file of an earlier attempt is what this one would write."""
        from fedamole.pool_files import read_header

        try:
            if path.suffix == ".json":
                return read_record(path, "metrics")[0] == self.headers[-1]
            return read_header(path) == self.headers[0]
        except FedamoleError:
            return False


ForClient = Callable[["ClientSession", int, "list[Path]"], None]


def run_train_clients(args: argparse.Namespace) -> None:
    """Train clients; each one's files are kept as soon as it is done."""
    from fedamole.methods import load
    from fedamole.pool_files import read_client_state, write_upload

    settings = parse(ClientStage, args.settings, "--settings")
    _check_lengths(args, args.out_uploads, args.out_metrics)
    outputs = zip(args.clients, zip(args.out_uploads, args.out_metrics, strict=True), strict=True)
    job = _Job(args, "train", settings, {client: list(paths) for client, paths in outputs})
    run_digest = digest(settings.run)
    assignment = _read_assignment(args.assignment, args.round, run_digest)
    method = load(settings.run.run)

    def train(session: "ClientSession", client: int, paths: list[Path]) -> None:
        state = read_client_state(args.pool, assignment, client, run_digest)
        upload, report = method.train_client(session, client, args.round, state)
        if _is_first_rank():
            write_upload(paths[0], job.headers[0], upload)
            _write_metrics(paths[1], job.headers[1], client, args.round, report)

    _run(job, train)


def run_evaluate_clients(args: argparse.Namespace) -> None:
    """Test the model of a pool on clients."""
    from fedamole.methods import load
    from fedamole.pool_files import read_client_state

    settings = parse(ClientStage, args.settings, "--settings")
    _check_lengths(args, args.out_metrics)
    outputs = zip(args.clients, args.out_metrics, strict=True)
    job = _Job(args, "test", settings, {client: [path] for client, path in outputs})
    run_digest = digest(settings.run)
    assignment = _read_assignment(args.assignment, args.round, run_digest)
    method = load(settings.run.run)

    def test(session: "ClientSession", client: int, paths: list[Path]) -> None:
        state = read_client_state(args.pool, assignment, client, run_digest)
        report = method.evaluate_client(session, client, args.round, state)
        if _is_first_rank():
            _write_metrics(paths[0], job.headers[0], client, args.round, report)

    _run(job, test)


def _run(job: _Job, do: ForClient) -> None:
    """Do the clients that an earlier attempt has not done, then put all files into their places.

    Raises
    ------
    FedamoleError
        If a client failed; the others were done nevertheless, and are kept for the next attempt.
    """
    if launching.is_worker():
        _work(job, job.args.only, do)
        return
    missing = job.missing()
    if done := [client for client in job.outputs if client not in missing]:
        logger.info("clients %s were done by an earlier attempt", _listed(done))
    if missing:
        died = None
        try:
            _start(job, missing, do)
        except FedamoleError as error:
            died = error
        missing = _missing_at_last(job, wait=died is None)
        if died and not missing:
            logger.warning("%s, after its work was done", died)
        elif died:
            raise FedamoleError(f"{died}\n{_summary(job, missing)}") from died
    if missing:
        raise FedamoleError(_summary(job, missing))
    job.progress.publish(job.outputs, job.is_current)


def _missing_at_last(job: _Job, wait: bool) -> list[int]:
    """Clients without files, once those that other nodes wrote can be seen.

    A file system over a network may show them half a minute late to a node that has looked before.
    """
    deadline = time.monotonic() + VISIBLE_S if wait and job.layout.nodes > 1 else -math.inf
    while True:
        missing = job.missing()
        if not missing or time.monotonic() > deadline:
            return missing
        # For people only: if it cannot be read, the files themselves tell in the end.
        with contextlib.suppress(FedamoleError):
            states = {item.client: item.state for item in read_progress(job.progress.folder)}
            if all(states.get(client) == "failed" for client in missing):
                return missing
        time.sleep(VISIBLE_POLL_S)


def _start(job: _Job, clients: list[int], do: ForClient) -> None:
    """Do clients in this process, or in as many as the job has."""
    if job.layout.processes == 1:
        _work(job, clients, do)
    else:
        only = ["--only", *map(str, clients)]
        launching.launch(job.layout, [*sys.argv[1:], *only])


def _work(job: _Job, clients: list[int], do: ForClient) -> None:
    """Do those clients that fall to the lane of this process; one that fails stops no other."""
    with _session(job) as (session, lane):
        for client in clients[lane :: job.layout.lanes]:
            began = job.progress.start(client) if _is_first_rank() else None
            kept = [job.progress.kept(path) for path in job.outputs[client]]
            try:
                do(session, client, kept)
                error = None
            except BaseException as failure:
                error = _reason(failure)
                if not _goes_on(failure, job.layout.ranks):
                    raise
            finally:
                if began:
                    job.progress.end(began, error)


def _reason(failure: BaseException) -> str:
    """Why a client failed, in one line."""
    if isinstance(failure, SystemExit | KeyboardInterrupt):
        return "its job was ended"
    text = " ".join(str(failure).splitlines())
    return text if isinstance(failure, FedamoleError) else f"{type(failure).__name__}: {text}"


def _goes_on(failure: BaseException, ranks: int) -> bool:
    """Log why a client failed, and tell whether the process can do its next one."""
    if not isinstance(failure, Exception):
        return False
    if isinstance(failure, FedamoleError):
        logger.error("failed: %s", failure)
    else:
        logger.exception("failed:")
    # With several ranks, the others may not know and wait for this one for ever; or they train on
    # while this one begins the next client, and mix the two.
    return ranks == 1 or isinstance(failure, ClientError)


def _summary(job: _Job, missing: list[int]) -> str:
    """One line on the clients without result, below their own lines."""
    label = f"{job.settings.run.label} round {job.args.round}"
    text = f"{label}: no result of clients {_listed(missing)}"
    if kept := len(job.outputs) - len(missing):
        text += f"; the {kept} that are done are kept, a retry does the rest"
    return text


def _listed(clients: list[int]) -> str:
    """Numbers of clients for a line of text."""
    return ", ".join(map(str, clients))


@contextlib.contextmanager
def _session(job: _Job) -> "Iterator[tuple[ClientSession, int]]":
    """Load what the clients of this process share; give it with the lane of the process."""
    prepare_libraries(offline=True)
    from fedamole.client import ClientSession
    from fedamole.datasets.tokens import TokenStore
    from fedamole.distributed import process_group

    args, settings = job.args, job.settings
    read_record(args.backbone / "backbone.json", "backbone", digest(settings.run.tokens.backbone))
    store = TokenStore.open(args.tokens, digest(settings.run.tokens))
    clients = settings.run.scenario.clients
    if beyond := [client for client in args.clients if not 0 <= client < clients]:
        raise FedamoleError(f"--clients {beyond[0]}: the scenario has clients 0 to {clients - 1}")
    with process_group(job.layout) as (seat, device):
        yield ClientSession(settings, args.backbone, store, device), seat.lane


def _check_lengths(args: argparse.Namespace, *outputs: list[Path]) -> None:
    """Refuse another number of files than clients."""
    for paths in outputs:
        if len(paths) != len(args.clients):
            number = len(args.clients)
            raise FedamoleError(f"{number} --clients need as many files, not {len(paths)}")


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
    try:
        parents = {
            "backbone": sha256(args.backbone / "backbone.json"),
            "tokens": sha256(args.tokens / "meta.json"),
            "pool": sha256(args.pool),
        }
        if args.assignment:
            parents["assignment"] = sha256(args.assignment)
    except OSError as error:
        raise FedamoleError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return parents


def _is_first_rank() -> bool:
    """Whether this process writes the files of its clients."""
    return int(os.environ["RANK"]) == 0


def _write_metrics(
    path: Path, header: Header, client: int, round_: int, report: "ClientReport"
) -> None:
    """Write the record of one client in one round."""
    write_record(path, header, {"client": client, "round": round_, **report.to_mapping()})
