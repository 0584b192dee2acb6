"""The command that tells a person how far a study is, on any node that sees its results."""

import argparse
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from fedamole import slurm
from fedamole.cli.study import default_config, first_shown, read_config
from fedamole.config import Config
from fedamole.errors import FedamoleError
from fedamole.progress import ClientProgress, read_progress
from fedamole.study_status import (
    ClientState,
    Failure,
    HeadJob,
    Life,
    Plan,
    RoundFacts,
    StudyStatus,
    WorkStatus,
    plans_of,
    rounds_to_read,
    work_status,
)

WIDTH = 100
# Work -> first word of the names of its metrics files, and rule whose logs it has.
METRICS = {"train": "metrics", "test": "aggregated"}
RULES = {"train": "train_clients", "test": "evaluate_clients"}
# States of a SLURM job that holds no node, though it will.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED")
# State of a client -> its column; the last one is there only where clients may drop out.
COUNTS: dict[ClientState, str] = {
    "done": "done",
    "running": "runs",
    "waiting": "wait",
    "failed": "fail",
    "lost": "lost",
    "dropped": "drop",
}
DROPOUTS = "clients that dropped out of the last rounds, which go on without them"
HEAD_STATES = {"waits": "queued", "lives": "running", "gone": "gone", "unknown": "state unknown"}


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "status", help="tell how far a study is, and what failed, from any node"
    )
    parser.add_argument(
        "--configfile", type=Path, metavar="FILE", help="config of the study (configs/demo.yaml)"
    )
    parser.add_argument(
        "--watch", type=_seconds, metavar="SECONDS", help="tell it again and again, until Ctrl-C"
    )
    parser.set_defaults(command=run_status)


def _seconds(text: str) -> float:
    """Read the pause between two looks."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return seconds


def run_status(args: argparse.Namespace) -> None:
    """Print how far a study is, once or until the user has seen enough."""
    file = args.configfile or default_config()
    config = read_config(file)
    if args.watch is None:
        print("\n".join(_report(config, file)))
        return
    try:
        while True:
            text = "\n".join(_report(config, file))
            # On a terminal, from its upper left corner and over what was there.
            print(f"\033[H\033[2J{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        print()


def _report(config: Config, file: Path) -> list[str]:
    """Read what there is and say it."""
    queue = _ask_slurm(config)
    status = _read_status(config, queue)
    return [*_lines(config, status, file), *_slurm_lines(status, queue)]


@dataclass(frozen=True)
class _Queue:
    """What SLURM says.

    Attributes
    ----------
    jobs
        Job -> state, of all jobs that wait or run; None if SLURM does not say.
    study
        Jobs of the study that run, and that wait.
    silence
        Why SLURM does not say.
    """

    jobs: Mapping[int, str] | None = None
    study: tuple[int, int] | None = None
    silence: str = ""


def _ask_slurm(config: Config) -> _Queue:
    """Ask SLURM, if it is here, for all jobs: another user may have begun the study."""
    if not slurm.is_here():
        return _Queue(silence="squeue is not on this machine")
    try:
        # It leaves out suspended jobs otherwise; and %i is no number for the tasks of an array.
        lines = slurm.call("squeue", "--noheader", "--states=all", "--format=%A|%T").splitlines()
        states = {int(job): state for job, state in (line.split("|") for line in lines if line)}
        jobs = {job: state for job, state in states.items() if state in slurm.ALIVE}
        mine = slurm.jobs_of_study(Path(config.results))
    except FedamoleError as error:
        return _Queue(silence=str(error))
    waiting = sum(job.waits for job in mine)
    return _Queue(jobs, (len(mine) - waiting, waiting))


def _life_of_job(job: int, queue: _Queue) -> Life:
    """Say whether a job waits, lives or is gone."""
    if queue.jobs is None:
        return "unknown"
    if job not in queue.jobs:
        return "gone"
    return "waits" if queue.jobs[job] in WAITING else "lives"


def _life_of_client(record: ClientProgress, queue: _Queue) -> Life:
    """Say whether a client that is called running waits, lives or is gone."""
    life = "unknown" if record.job is None else _life_of_job(record.job, queue)
    if life in ("waits", "gone") or record.host != socket.gethostname():
        return life
    return "lives" if _process_lives(record) else "gone"


def _process_lives(record: ClientProgress) -> bool:
    """Whether the process of a record, of this host, still lives."""
    try:
        os.kill(record.process, 0)
        stat = Path(f"/proc/{record.process}/stat").read_text(encoding="utf-8")
        boot = Path("/proc/stat").read_text(encoding="utf-8").partition("btime ")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        # Of another user, or no Linux: it is there, and more is not to be learned.
        return True
    fields = stat.rpartition(")")[2].split()
    began = int(boot) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # One that began after the record has only its number; a minute allows for clocks that were set.
    return fields[0] != "Z" and began < record.started + 60


def _read_status(config: Config, queue: _Queue) -> StudyStatus:
    """Read the results folder."""
    results, now = Path(config.results), time.time()
    works = []
    for plan in plans_of(config):
        rounds = {round_: RoundFacts(_outputs(results, plan, round_)) for round_ in plan.rounds}
        for round_ in rounds_to_read(plan, rounds):
            rounds[round_] = _facts(results, plan, round_)
        works.append(work_status(plan, rounds, lambda record: _life_of_client(record, queue), now))
    return StudyStatus(tuple(works), _read_head(results, queue), queue.study)


def _facts(results: Path, plan: Plan, round_: int) -> RoundFacts:
    """All that the folder says about a round."""
    progress = _round_folder(results, "progress", plan, round_)
    kept = _clients(progress, plan, round_)
    records = read_progress(progress) if progress.is_dir() else []
    return RoundFacts(
        # After what is kept: files move from there to here, and are in both for a moment.
        outputs=_outputs(results, plan, round_),
        kept=kept,
        records=tuple(
            record
            for record in records
            if record.work == plan.work and record.client in plan.clients(round_)
        ),
    )


def _outputs(results: Path, plan: Plan, round_: int) -> frozenset[int]:
    """Clients whose metrics are in their place."""
    return _clients(_round_folder(results, "runs", plan, round_), plan, round_)


def _round_folder(results: Path, kind: str, plan: Plan, round_: int) -> Path:
    """Folder of a round below one of the folders of the results."""
    return results / kind / plan.scenario / plan.run / f"round_{round_:03d}"


def _clients(folder: Path, plan: Plan, round_: int) -> frozenset[int]:
    """Clients of a round of which a folder has the metrics."""
    found = set()
    for name in _names(folder):
        word, _, rest = name.partition("_")
        if word == METRICS[plan.work] and rest.endswith(".json") and rest[:-5].isdigit():
            found.add(int(rest[:-5]))
    return frozenset(found.intersection(plan.clients(round_)))


def _names(folder: Path) -> list[str]:
    """Names of the files in a folder; none if it is not there.

    Raises
    ------
    FedamoleError
        If it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FedamoleError(f"{folder}: cannot be read ({error.strerror})") from error


def _read_head(results: Path, queue: _Queue) -> HeadJob | None:
    """Read which job runs Snakemake.

    Raises
    ------
    FedamoleError
        If the file is none of fedamole's.
    """
    path = results / "progress" / "head.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        job, arguments = int(data["job"]), tuple(map(str, data["arguments"]))
        life = _life_of_job(job, queue)
        return HeadJob(job, float(data["submitted"]), arguments, str(data["log"]), life)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise FedamoleError(f"{path}: is no record of a head job ({error!r})") from error


def _lines(config: Config, status: StudyStatus, file: Path) -> list[str]:
    """What a person is told about the runs."""
    if not any(work.begun for work in status.works):
        return [_before(config, status, file)]
    lines = [f"{config.results}, {time.strftime('%a %d %b %H:%M:%S')}", *_table(status)]
    failures = [(work.plan, failure) for work in status.works for failure in work.failures]
    dropouts = [(work.plan, dropout) for work in status.works for dropout in work.dropouts]
    for title, found in (("failures", failures), (DROPOUTS, dropouts)):
        if found:
            lines += ["", title]
            lines += [line for each in found for line in _failure(Path(config.results), *each)]
    if all(work.current is None for work in status.works):
        lines += ["", _after(config, file)]
    return lines


def _before(config: Config, status: StudyStatus, file: Path) -> str:
    """What to say while no client has begun."""
    if first_shown(config).is_file():
        return (
            f"{config.results} holds no rounds, but tables; run: fedamole show --configfile {file}"
        )
    if status.head or (Path(config.results) / "logs").is_dir():
        return f"no client has begun; what comes before them is in {config.results}/logs"
    return f"nothing has begun; run: snakemake --configfile {file} --cores all"


def _after(config: Config, file: Path) -> str:
    """What to say when all rounds are done."""
    if first_shown(config).is_file():
        return f"the study is done; run: fedamole show --configfile {file}"
    return "all rounds are done; the tables are not drawn yet"


def _table(status: StudyStatus) -> list[str]:
    """The runs, one a line, under the slugs of their scenarios."""
    may_drop = any(work.plan.may_drop for work in status.works)
    columns = [state for state in COUNTS if may_drop or state != "dropped"]
    counts = (COUNTS[state] for state in columns)
    headings = ("run", "work", "rounds", "now", *counts, "s/round", "left", "slowest client")
    rows = [_row(status, work, columns) for work in status.works]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [_aligned(headings, widths)]
    scenario = None
    for work, row in zip(status.works, rows, strict=True):
        if work.plan.scenario != scenario:
            scenario = work.plan.scenario
            lines += ["", _heading(status, work.plan)]
        lines.append(_aligned(row, widths))
    return lines


def _heading(status: StudyStatus, plan: Plan) -> str:
    """A scenario, its clients, and how many of them take part in a round if not all do."""
    populations = [
        work.plan.population
        for work in status.works
        if work.plan.scenario == plan.scenario and not work.plan.population.pooled
    ]
    fewest = min((who.size for who in populations), default=plan.population.clients)
    drawn = f", {fewest} a round" if fewest < plan.population.clients else ""
    return f"{plan.scenario}, {plan.population.clients} clients{drawn}"


def _row(status: StudyStatus, work: WorkStatus, columns: list[ClientState]) -> tuple[str, ...]:
    """The cells of a run."""
    now, counts = "-", ["-"] * len(columns)
    if work.current:
        now = str(work.current.round)
        counts = [str(work.current.count(state)) for state in columns]
    rounds = f"{work.rounds_done}/{len(work.plan.rounds)}"
    pace = "n/a" if work.seconds_per_round is None else f"{work.seconds_per_round:.1f}"
    left = _duration(status.seconds_left(work)) if work.current else "done"
    return work.plan.run, work.plan.work, rounds, now, *counts, pace, left, _slowest(work)


def _slowest(work: WorkStatus) -> str:
    """Who was slowest, in which round, and how slow; a plus: still at work."""
    slow = work.slowest
    if slow is None:
        return "n/a"
    took = _duration(slow.seconds) + ("+" if slow.running else "")
    return f"{slow.client} in round {slow.round}: {took}, {slow.ratio:.1f}x"


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """A line of the table: names to the left, numbers to the right."""
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:-1], widths[2:-1], strict=True)]
    return " ".join([cells[0].ljust(widths[0]), cells[1].ljust(widths[1]), *numbers, "", cells[-1]])


def _duration(seconds: float | None) -> str:
    """A time in the unit that fits it."""
    if seconds is None:
        return "n/a"
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} d"


def _failure(results: Path, plan: Plan, failure: Failure) -> list[str]:
    """A client without a result: which one, why, and where to read more."""
    where = f"{plan.run} {plan.work}, round {failure.round}, client {failure.client}"
    return [
        f"  {plan.scenario} {where}: {failure.state}",
        f"    {shorten(failure.error, WIDTH - 4, placeholder=' ...')}",
        f"    log: {_log(results, plan, failure)}",
    ]


def _log(results: Path, plan: Plan, failure: Failure) -> str:
    """The newest log of a job that had the client: ``rule_KKK.log`` or ``rule_KKK_KKK.log``."""
    folder = _round_folder(results, "logs", plan, failure.round)
    found = []
    for name in _names(folder):
        numbers = name.removeprefix(f"{RULES[plan.work]}_").removesuffix(".log").split("_")
        if all(map(str.isdigit, numbers)) and (
            int(numbers[0]) <= failure.client <= int(numbers[-1])
        ):
            found.append(folder / name)
    return str(max(found, key=lambda path: path.stat().st_mtime, default="none was written"))


def _slurm_lines(status: StudyStatus, queue: _Queue) -> list[str]:
    """What a person is told about the jobs, if the study has to do with SLURM."""
    lines = []
    if head := status.head:
        age = _duration(time.time() - head.submitted)
        state = HEAD_STATES[head.life]
        lines.append(f"head job {head.job}: {state}, submitted {age} ago, log: {head.log}")
        lines.append(f"  {shorten(shlex.join(head.arguments), WIDTH - 2, placeholder=' ...')}")
    if status.jobs and (head or any(status.jobs)):
        lines.append("SLURM jobs of this study: {} running, {} pending".format(*status.jobs))
    unknown = sum(work.current.unknown for work in status.works if work.current)
    if unknown or (head and queue.silence):
        what = f"{unknown} running clients still live" if unknown else "the head job still lives"
        why = queue.silence or "outside SLURM, on another host"
        lines.append(f"whether {what} is unknown ({why})")
    return ["", *lines] if lines else []
