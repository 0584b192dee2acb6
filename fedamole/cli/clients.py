"""The commands that need the language model: training and testing of clients."""

import argparse
import contextlib
import functools
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole import launching
from fedamole.artifacts import Header, read_record, sha256, write_record
from fedamole.cli.arguments import add_quorum
from fedamole.cli.libraries import prepare_libraries
from fedamole.cli.session_checks import check_session, prompt_length
from fedamole.config import parse
from fedamole.errors import ClientError, FedamoleError
from fedamole.launching import Layout
from fedamole.meter import Meter, Phase, state_bytes, upload_bytes
from fedamole.progress import RoundProgress, Work, read_progress
from fedamole.stages import ClientStage, digest, with_quorum

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientSession
    from fedamole.pools import Assignment, ClientState, KeptState

logger = logging.getLogger(__name__)
# Longest time for which a file written on one node may be invisible on another.
VISIBLE_S, VISIBLE_POLL_S = 90.0, 2.0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    train = subparsers.add_parser("train-clients", help="train and test clients in one round")
    _add_inputs(train)
    train.add_argument("--out-uploads", type=Path, nargs="+", required=True, metavar="FILE")
    train.add_argument("--out-metrics", type=Path, nargs="+", required=True, metavar="FILE")
    train.add_argument(
        "--kept",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="what clients kept when they last took part, also clients of other jobs",
    )
    train.add_argument("--out-kept", type=Path, nargs="*", default=[], metavar="FILE")
    add_quorum(train)
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


# A client that fails so often drops out of its round, if the quorum allows it.
MOST_ATTEMPTS = 2
# What ends a job from outside: a scheduler, a person, or a process beside this one that died.
INTERRUPTED = (SystemExit, KeyboardInterrupt)
# Whatever of a client's work is in no other phase.
PHASES: dict[Work, Phase] = {"train": "training", "test": "testing"}
KINDS = {"train": ("upload", "metrics", "kept"), "test": ("metrics",)}


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
        Client -> its files, in the order of KINDS.
    kept
        Client -> what it kept the last time it took part; not there if it never did.
    headers
        What the headers must be, by name of the file.
    """

    args: argparse.Namespace
    work: Work
    settings: ClientStage
    outputs: dict[int, list[Path]]
    kept: dict[int, Path] = field(default_factory=dict)
    headers: dict[str, Header] = field(init=False)

    def __post_init__(self) -> None:
        self.headers = {}
        for client, parents in _parents(self.args, self.outputs, self.kept).items():
            for kind, path in zip(KINDS[self.work], self.outputs[client], strict=False):
                stage = self.settings if kind == "metrics" else self.settings.run
                self.headers[path.name] = Header(kind, digest(stage), parents)
        self.progress = RoundProgress(self.args.progress, self.work, digest(self.settings))
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

        wanted = self.headers[path.name]
        try:
            if path.suffix == ".json":
                return read_record(path, "metrics")[0] == wanted
            return read_header(path) in (wanted, replace(wanted, kind="dropout"))
        except FedamoleError:
            return False

    def packs(self, clients: list[int]) -> list[list[int]]:
        """Cut the clients of the job into packs, and give those with one of the clients to do.

        A pack is always whole, whichever of its clients an earlier attempt has done: the last bits
        of its numbers depend on who is in it.
        """
        size = self.settings.run.training.pack_clients if self.work == "train" else 1
        everyone = list(self.outputs)
        packs = [everyone[start : start + size] for start in range(0, len(everyone), size)]
        return [pack for pack in packs if set(pack) & set(clients)]

    def header(self, path: Path) -> Header:
        """What the header of a file must be."""
        return self.headers[path.name]

    @property
    def tolerant(self) -> bool:
        """Whether a round may go on without some of its clients."""
        if self.work != "train":
            return False
        return with_quorum(self.settings.run, self.args.quorum).participation.quorum < 1


ForClient = Callable[["ClientSession", int, "list[Path]"], None]
# Trains the clients of a pack at once, before each of them is done.
ForPack = Callable[["ClientSession", list[int]], None]


def run_train_clients(args: argparse.Namespace) -> None:
    """Train clients; each one's files are kept as soon as it is done."""
    from fedamole.methods import load
    from fedamole.pool_files import read_client_state, write_kept, write_upload

    settings = parse(ClientStage, args.settings, "--settings")
    lists = [args.out_uploads, args.out_metrics, *([args.out_kept] if args.out_kept else [])]
    _check_lengths(args, *lists)
    outputs = dict(zip(args.clients, map(list, zip(*lists, strict=True)), strict=True))
    run_digest = digest(settings.run)
    job = _Job(args, "train", settings, outputs, _kept_by_client(args.kept, run_digest))
    assignment = _read_assignment(args.assignment, args.round, run_digest)
    method = load(settings.run.run)

    def held(client: int) -> "tuple[ClientState, KeptState | None]":
        state = read_client_state(args.pool, assignment, client, run_digest)
        return state, _read_kept(job, client)

    def train(session: "ClientSession", client: int, paths: list[Path]) -> None:
        state, kept = held(client)
        result = method.train_client(session, client, args.round, state, kept)
        sent = upload_bytes(result.upload)
        session.meter.count(upload_bytes=sent, download_bytes=state_bytes(state))
        if not _is_first_rank():
            return
        write_upload(paths[0], job.header(paths[0]), result.upload)
        _write_metrics(paths[1], job.header(paths[1]), client, args.round, result.report)
        if paths[2:]:
            assert result.kept is not None, f"{settings.run.run} keeps nothing"
            write_kept(paths[2], job.header(paths[2]), result.kept)

    def train_pack(session: "ClientSession", clients: list[int]) -> None:
        from fedamole.client import train_packed

        assert method.start is not None, f"{settings.run.run} cannot be packed"
        starts = {k: method.start(session, k, args.round, *held(k)) for k in clients}
        train_packed(session, args.round, starts)

    _run(job, train, train_pack if settings.run.training.pack_clients > 1 else None)


def _kept_by_client(paths: list[Path], run_digest: str) -> dict[int, Path]:
    """Whose each file of kept state is."""
    from fedamole.pool_files import read_owner

    return {read_owner(path, run_digest): path for path in paths}


def _read_kept(job: _Job, client: int) -> "KeptState | None":
    """What a client kept the last time it took part; None if it never was done."""
    from fedamole.pool_files import read_kept

    if client not in job.kept:
        return None
    kept = read_kept(job.kept[client], digest(job.settings.run))
    return kept if kept.round else None


def _drop(job: _Job, client: int) -> None:
    """Write files that say that a round goes on without a client; it keeps what it had."""
    from fedamole.pool_files import write_dropout, write_kept
    from fedamole.pools import KeptState

    reason, round_ = job.progress.drop(client), job.args.round
    logger.warning(
        "%s round %d: client %d drops out: %s", job.settings.run.label, round_, client, reason
    )
    upload, metrics, *rest = map(job.progress.kept, job.outputs[client])
    write_dropout(upload, replace(job.header(upload), kind="dropout"), client, round_, reason)
    content = {"client": client, "round": round_, "dropped_out": reason}
    write_record(metrics, job.header(metrics), content)
    for path in rest:
        before = _read_kept(job, client)
        write_kept(path, job.header(path), before or KeptState(client, 0, {}, {}))


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
            _write_metrics(paths[0], job.header(paths[0]), client, args.round, report)

    _run(job, test)


def _run(job: _Job, do: ForClient, first: ForPack | None = None) -> None:
    """Do the clients that an earlier attempt has not done, then put all files into their places.

    Raises
    ------
    FedamoleError
        If a client failed; the others were done nevertheless, and are kept for the next attempt.
    """
    if launching.is_worker():
        _work(job, job.args.only, do, first)
        return
    missing = job.missing()
    if done := [client for client in job.outputs if client not in missing]:
        logger.info("clients %s were done by an earlier attempt", _listed(done))
    missing, died = _without_lost(job, missing), None
    while missing:
        before = {client: job.progress.attempts(client) for client in missing}
        missing, died = _attempt(job, missing, do, first)
        failed = [client for client in missing if job.progress.attempts(client) > before[client]]
        missing = _without_lost(job, missing)
        # Where processes wait for each other, one client that fails interrupts others.
        if not (job.tolerant and failed) or _failed_alike(job, missing):
            break
    if missing:
        summary = _summary(job, missing)
        raise FedamoleError(f"{died}\n{summary}" if died else summary) from died
    job.progress.publish(job.outputs, job.is_current)


def _without_lost(job: _Job, missing: list[int]) -> list[int]:
    """Drop the clients that failed too often, if the round may go on without them."""
    if not job.tolerant:
        return missing
    lost = [client for client in missing if job.progress.attempts(client) >= MOST_ATTEMPTS]
    if _failed_alike(job, lost):
        return missing
    for client in lost:
        _drop(job, client)
    return [client for client in missing if client not in lost]


def _failed_alike(job: _Job, lost: list[int]) -> bool:
    """Whether all of several clients failed too often and by one reason: that is none of theirs."""
    if len(lost) < max(2, len(job.outputs)):
        return False
    if any(job.progress.attempts(client) < MOST_ATTEMPTS for client in lost):
        return False
    # Reasons differ in the numbers of clients, steps and losses.
    return len({re.sub(r"[\d.]+", "", job.progress.reason(client)) for client in lost}) == 1


def _attempt(
    job: _Job, clients: list[int], do: ForClient, first: ForPack | None
) -> tuple[list[int], FedamoleError | None]:
    """Do clients; give those without files afterwards, and why a process of theirs died."""
    died = None
    try:
        _start(job, clients, do, first)
    except FedamoleError as error:
        died = error
    missing = _missing_at_last(job, wait=died is None)
    if died and not missing:
        logger.warning("%s, after its work was done", died)
    return missing, died


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


def _start(job: _Job, clients: list[int], do: ForClient, first: ForPack | None) -> None:
    """Do clients in this process, or in as many as the job has."""
    if job.layout.processes == 1:
        _work(job, clients, do, first)
    else:
        only = ["--only", *map(str, clients)]
        launching.launch(job.layout, [*sys.argv[1:], *only])


def _work(job: _Job, clients: list[int], do: ForClient, first: ForPack | None) -> None:
    """Do those packs that fall to the lane of this process; one that fails stops no other."""
    with _session(job) as (session, lane):
        for pack in job.packs(clients)[lane :: job.layout.lanes]:
            wanted = [client for client in pack if client in clients]
            turns = _Turns(job, wanted, session.meter, len(pack) if first else 1)
            with turns:
                if first:
                    with turns.of_all():
                        first(session, pack)
                for client in turns.waiting():
                    with turns.of(client):
                        do(session, client, [job.progress.kept(p) for p in job.outputs[client]])


class _Turns(contextlib.AbstractContextManager["_Turns"]):
    """Keeps the progress records of the clients of a pack, who are begun together.

    An error in a client's turn is its own. What goes wrong before, in the training of all, is a try
    of nobody: without the one at fault the others might have trained.

    Parameters
    ----------
    job
        Where the records are.
    clients
        Who is to be done.
    meter
        Counts what the clients cost.
    pack
        Clients that are trained together, be they to do or done by an earlier attempt. What is done
        for all of them, each of them has an equal share of.
    """

    def __init__(self, job: _Job, clients: list[int], meter: Meter, pack: int = 1) -> None:
        self.job, self.meter, self.pack = job, meter, pack
        ours = _is_first_rank()
        start = functools.partial(job.progress.start, is_try=False, pack=pack)
        self.begun = {client: start(client) if ours else None for client in clients}
        self.share, self.share_training = 0.0, 0.0
        meter.forget_gpu_peak()

    def waiting(self) -> list[int]:
        """Clients whose turn has not come."""
        return list(self.begun)

    @contextlib.contextmanager
    def of(self, client: int) -> Iterator[None]:
        """Do a client. An error is its own, unless the process cannot go on."""
        if began := self.begun[client]:
            self.begun[client] = self.job.progress.count_try(began)
        failure: BaseException | None = None
        started = time.monotonic()
        self.meter.forget()
        try:
            with self.meter.phase(PHASES[self.job.work]):
                yield
        except BaseException as error:
            failure = error
            if not _goes_on(error, self.job.layout.ranks):
                raise
        finally:
            # Neither the end of a job nor a mistake in the config is a try of the client.
            no_try = isinstance(failure, INTERRUPTED) or _is_mistake(failure)
            reason = None if failure is None else _reason(failure)
            self._end(client, reason, no_try, self.share + time.monotonic() - started)

    @contextlib.contextmanager
    def of_all(self) -> Iterator[None]:
        """Do what comes before the turns; after an error there are none."""
        started = time.monotonic()
        self.meter.forget()
        try:
            with self.meter.phase("training"):
                yield
        except Exception as error:
            for client in self.waiting():
                self._end(client, _reason(error))
            if not _goes_on(error, self.job.layout.ranks):
                raise
        self.share = (time.monotonic() - started) / self.pack
        self.share_training = self.meter.read().seconds.get("training", 0.0) / self.pack

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        """Whose turn has not come had no try."""
        reason = _reason(failure or KeyboardInterrupt())
        for client in self.waiting():
            self._end(client, reason)

    def _end(
        self, client: int, error: str | None, no_try: bool = False, seconds: float | None = None
    ) -> None:
        reading = self.meter.read()
        if began := self.begun.pop(client):
            costs = None if error else self.meter.costs(reading, self.share_training)
            self.job.progress.end(began, error, no_try, seconds, costs)


def _reason(failure: BaseException) -> str:
    """Why a client failed, in one line."""
    if isinstance(failure, INTERRUPTED):
        return "its job was ended"
    text = " ".join(str(failure).splitlines())
    return text if isinstance(failure, FedamoleError) else f"{type(failure).__name__}: {text}"


def _is_mistake(failure: BaseException | None) -> bool:
    """Whether something is wrong that is none of the client's: its job fails, and says so."""
    return isinstance(failure, FedamoleError) and not isinstance(failure, ClientError)


def _goes_on(failure: BaseException, ranks: int) -> bool:
    """Log why a client failed, and tell whether the process can do its next one."""
    if not isinstance(failure, Exception) or _is_mistake(failure):
        return False
    if isinstance(failure, ClientError):
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


def _may_be_quantized(job: _Job) -> bool:
    """Whether the backbone is kept in 4 bits, or came so."""
    config = job.args.backbone / "config.json"
    came_so = config.is_file() and "quantization_config" in config.read_text(encoding="utf-8")
    return came_so or job.settings.run.loading.quantization is not None


@contextlib.contextmanager
def _session(job: _Job) -> "Iterator[tuple[ClientSession, int]]":
    """Load what the clients of this process share; give it with the lane of the process."""
    prepare_libraries(offline=True, quantized=_may_be_quantized(job))
    from fedamole.client import ClientSession
    from fedamole.datasets.tokens import TokenStore
    from fedamole.distributed import process_group

    args, settings = job.args, job.settings
    path, made_with = args.backbone / "backbone.json", digest(settings.run.tokens.backbone)
    facts = read_record(path, "backbone", made_with)[1]
    store = TokenStore.open(args.tokens, digest(settings.run.tokens))
    clients = settings.run.scenario.clients
    if beyond := [client for client in args.clients if not 0 <= client < clients]:
        raise FedamoleError(f"--clients {beyond[0]}: the scenario has clients 0 to {clients - 1}")
    check_session(settings, facts, store, prompt_length(settings.run, args.pool))
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


def _parents(
    args: argparse.Namespace, clients: Iterable[int], kept: Mapping[int, Path]
) -> dict[int, dict[str, str]]:
    """Digests of what the result of each client follows from."""
    try:
        shared = {
            "backbone": sha256(args.backbone / "backbone.json"),
            "tokens": sha256(args.tokens / "meta.json"),
            "pool": sha256(args.pool),
        }
        if args.assignment:
            shared["assignment"] = sha256(args.assignment)
        return {
            client: shared | ({"kept": sha256(kept[client])} if client in kept else {})
            for client in clients
        }
    except OSError as error:
        raise FedamoleError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _is_first_rank() -> bool:
    """Whether this process writes the files of its clients."""
    return int(os.environ["RANK"]) == 0


def _write_metrics(
    path: Path, header: Header, client: int, round_: int, report: "ClientReport"
) -> None:
    """Write the record of one client in one round."""
    write_record(path, header, {"client": client, "round": round_, **report.to_mapping()})
