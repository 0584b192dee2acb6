"""Results of a study: its metrics files, read and checked, and the files that come out of them.

Light on purpose (no torch, no matplotlib): the Snakefile asks here which files a command writes.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fedamole.artifacts import Header
from fedamole.config import parse
from fedamole.costs import StudyCosts, read_study_costs
from fedamole.errors import FedamoleError
from fedamole.records import (
    KIND,
    RECORDS,
    AssignmentRecord,
    ClientRecord,
    DropoutRecord,
    PartitionRecord,
    RunRecord,
)
from fedamole.registry import lookup
from fedamole.settings import FIGURE_NAMES, TABLE_NAMES
from fedamole.settings.output import FigureName, TableName
from fedamole.shown import by_default
from fedamole.stages import ResultsStage

TABLE_FORMATS = ("csv", "md", "tex", "html")
FIGURE_FORMATS = ("svg", "pdf", "png", "csv")


def table_names(settings: ResultsStage) -> list[str]:
    """Names of the files that ``fedamole tables`` writes: each table in all formats."""
    return [f"{table}.{suffix}" for table in tables(settings) for suffix in TABLE_FORMATS]


def tables(settings: ResultsStage) -> list[TableName]:
    """Names of the tables: those that the config names, or all that the study has numbers for."""
    chosen = settings.tables.show
    return chosen if chosen is not None else [t for t in TABLE_NAMES if by_default(t, settings)]


def figure_names(settings: ResultsStage) -> list[str]:
    """Names of the files that ``fedamole figures`` writes: each figure in all formats."""
    return [f"{figure}.{suffix}" for figure in figures(settings) for suffix in FIGURE_FORMATS]


def figures(settings: ResultsStage) -> list[str]:
    """Names of the figures, without suffix; some exist once per scenario slug and method."""
    return [name for kind in figure_kinds(settings) for name in figures_of(kind, settings)]


def figure_kinds(settings: ResultsStage) -> list[FigureName]:
    """Kinds of the figures: those that the config names, or all that the study has numbers for."""
    chosen = settings.tables.figures
    return chosen if chosen is not None else [f for f in FIGURE_NAMES if by_default(f, settings)]


def figures_of(kind: FigureName, settings: ResultsStage) -> list[str]:
    """Names of the figures of one kind."""
    slugs = slugs_of(settings)
    if kind == "classes":
        return [f"{slug}-classes" for slug in slugs]
    if kind == "overhead":
        return [f"{scenario}-overhead" for scenario in settings.scenarios]
    if kind in ("experts", "assignment", "routing"):
        methods = with_experts(settings)
        return [f"{slug}-{method}-{kind}" for slug in slugs for method in methods]
    return [kind]


def asks_for_costs(settings: ResultsStage) -> bool:
    """Whether a table or figure shows what the runs cost."""
    return "overhead" in (*tables(settings), *figure_kinds(settings))


def slugs_of(settings: ResultsStage) -> list[str]:
    """Slugs of all scenarios and seeds, in order."""
    return [slug for slugs in settings.scenarios.values() for slug in slugs]


def with_experts(settings: ResultsStage) -> list[str]:
    """Methods whose experts choose clients."""
    return [method for method in settings.methods if lookup(method).assigns]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of a tidy csv file: numbers in full precision, None as an empty field."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@dataclass(frozen=True)
class Run:
    """The metrics of one method on one scenario and seed.

    Attributes
    ----------
    info
        Which run it is.
    partition
        Its data.
    rounds
        Round -> the records of the clients that were tested in it, in their order.
    assignments
        Round -> assignment; empty for a method without experts.
    """

    info: RunRecord
    partition: PartitionRecord
    rounds: dict[int, list[ClientRecord]]
    assignments: dict[int, AssignmentRecord]

    @property
    def last_round(self) -> int:
        """The last evaluated round; 0 for a method that does not train."""
        return max(self.rounds)

    def counted(self, rule: Literal["last", "best"]) -> list[ClientRecord]:
        """Records that count, one per client that ever took part, in their order.

        Parameters
        ----------
        rule
            ``last``: of the last round in which a client took part. ``best``: of the earliest round
            with the lowest mean evaluation loss.
        """
        if rule == "best":
            return self.rounds[min(sorted(self.rounds), key=lambda t: mean_loss(self.rounds[t]))]
        last = {record.client: record for t in sorted(self.rounds) for record in self.rounds[t]}
        return [last[client] for client in sorted(last)]


def mean_score(records: Sequence[ClientRecord]) -> float:
    """Unweighted mean of the clients' scores, in [0, 1]."""
    return fmean(record.score for record in records)


def mean_loss(records: Sequence[ClientRecord]) -> float:
    """Unweighted mean of the clients' evaluation losses, in nats."""
    return fmean(record.eval_loss for record in records)


@dataclass(frozen=True)
class Metrics:
    """All runs of a study.

    Attributes
    ----------
    runs
        By scenario slug (with the seed) and method.
    costs
        What they cost, where a table or figure shows it.
    """

    runs: dict[tuple[str, str], Run]
    costs: StudyCosts = field(default_factory=dict)

    def run(self, scenario: str, method: str) -> Run:
        """Look up the run of a method on a scenario slug."""
        return self.runs[scenario, method]


def read_metrics(
    paths: Iterable[Path], settings: ResultsStage, costs: Iterable[Path] = ()
) -> Metrics:
    """Read the metrics files of a study, and refuse all that could not be compared.

    Parameters
    ----------
    paths
        One file for each scenario, seed and method of the settings, in any order.
    settings
        The study.
    costs
        Files of costs, in any order, where the study shows them.

    Raises
    ------
    FedamoleError
        If a file is missing, broken, incomplete, foreign, given twice, or of another number of
        rounds, metric or partition than the others; the message names the file.
    """
    known = [(path, read_run(path, settings.digests)) for path in paths]
    runs: dict[tuple[str, str], Run] = {}
    for path, run in known:
        _check_belongs(path, run, settings)
        key = (run.info.scenario, run.info.method)
        if key in runs:
            raise FedamoleError(f"{path}: is a second file of {key[1]} on {key[0]}")
        runs[key] = run
    for key in expected(settings):
        if key not in runs:
            raise FedamoleError(f"no metrics file of {key[1]} on {key[0]} was given")
    _check_same(known)
    spent = read_study_costs(costs, settings) if asks_for_costs(settings) else {}
    return Metrics({key: runs[key] for key in expected(settings)}, spent)


def read_run(path: Path, digests: Mapping[str, Mapping[str, str]] | None = None) -> Run:
    """Read one metrics file.

    Parameters
    ----------
    path
        The file.
    digests
        Slug -> method -> digest of the settings it must have been made with; others are accepted.

    Raises
    ------
    FedamoleError
        If it is missing, broken (with the line), incomplete, of other settings, or no metrics file.
    """
    records: dict[str, list[Any]] = {name: [] for name in RECORDS}
    for number, line in enumerate(_lines(path)):
        content = json_line(path, number, line)
        if number == 0:
            header = Header.from_mapping(content.get("header"), path)
            header.check(path, KIND, None)
            continue
        kind = content.get("record")
        if kind not in RECORDS:
            allowed = ", ".join(RECORDS)
            raise FedamoleError(f"{path}:{number + 1}: record {kind!r} is unknown; {allowed} exist")
        records[kind].append(parse(RECORDS[kind], content, f"{path}:{number + 1}"))
    for kind in ("run", "partition"):
        if len(records[kind]) != 1:
            raise FedamoleError(f"{path}: has {len(records[kind])} {kind} records; needs one")
    info: RunRecord = records["run"][0]
    header.check(path, KIND, (digests or {}).get(info.scenario, {}).get(info.method))
    return _assemble(path, records)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FedamoleError(f"{path}: is not a text file") from error
    if not lines:
        raise FedamoleError(f"{path}: is empty")
    return lines


def json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    """Read one line of a metrics file; the first has number 0.

    Raises
    ------
    FedamoleError
        If it is not a whole JSON object; names the file and the line.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FedamoleError(f"{path}:{number + 1}: is not a whole JSON line ({error})") from error
    if not isinstance(content, dict):
        raise FedamoleError(f"{path}:{number + 1}: is not a JSON object")
    return content


def _assemble(path: Path, records: Mapping[str, list[Any]]) -> Run:
    """Sort the records of a file by round and client; refuse gaps."""
    info: RunRecord = records["run"][0]
    row = lookup(info.method)
    expected = list(range(1, info.rounds + 1)) if row.trains else [0]
    rounds: dict[int, list[ClientRecord]] = {}
    for client in sorted(records["client"], key=lambda record: (record.round, record.client)):
        rounds.setdefault(client.round, []).append(client)
    _check_rounds(path, "client", rounds, expected)
    dropouts: list[DropoutRecord] = records["dropout"]
    for round_, clients in rounds.items():
        indices = [client.client for client in clients]
        everyone = (info.took_part or {}).get(round_, list(range(info.clients)))
        lost = {record.client for record in dropouts if record.round == round_}
        if indices != [client for client in everyone if client not in lost]:
            needed = f"0 to {info.clients - 1}" if info.took_part is None else everyone
            raise FedamoleError(
                f"{path}: round {round_} has clients {indices}; each of {needed} is needed once"
            )
    assignments: list[AssignmentRecord] = records["assignment"]
    if assignments or row.assigns:
        _check_rounds(path, "assignment", [record.round for record in assignments], expected)
    run = Run(info, records["partition"][0], rounds, {a.round: a for a in assignments})
    _check_shapes(path, run)
    return run


def _check_rounds(path: Path, kind: str, found: Iterable[int], expected: list[int]) -> None:
    if sorted(found) != expected:
        raise FedamoleError(
            f"{path}: has {kind} records of rounds {sorted(found)}; {expected} are needed"
        )


def _check_shapes(path: Path, run: Run) -> None:
    """Refuse lists whose lengths contradict each other."""
    clients, partition = run.info.clients, run.partition
    widths = {len(row) for row in partition.counts}
    if len(partition.counts) != clients or widths != {len(partition.classes)}:
        raise FedamoleError(f"{path}: the partition is not {clients} clients x its classes")
    for round_, record in run.assignments.items():
        lengths = {len(record.modules), len(record.holders), len(record.objective)}
        lengths |= {len(sums) for sums in (record.optimum, record.chance) if sums is not None}
        if record.map is not None:
            _check_map(path, record, clients)
        experts = {len(module) for module in record.holders}
        holders = {client for module in record.holders for held in module for client in held}
        if len(lengths) > 1 or experts != {record.num_experts} or holders - set(range(clients)):
            raise FedamoleError(
                f"{path}: the assignment of round {round_} is not {len(record.modules)} modules x "
                f"{record.num_experts} experts of clients below {clients}"
            )


def _check_map(path: Path, record: AssignmentRecord, clients: int) -> None:
    """Refuse a map that is not one place in two dimensions per client, with two shares."""
    places = [len(place) for place in record.map or [] if place is not None]
    if len(record.map or []) != clients or {2} != {len(record.map_shares or []), *places}:
        raise FedamoleError(
            f"{path}: the map of round {record.round} is not {clients} places and shares in 2-D"
        )


def expected(settings: ResultsStage) -> Iterator[tuple[str, str]]:
    """Scenario slug and method of every file of a study, in the order of the tables."""
    for slugs in settings.scenarios.values():
        for slug in slugs:
            for method in settings.methods:
                yield slug, method


def _check_belongs(path: Path, run: Run, settings: ResultsStage) -> None:
    """Refuse a file of another study."""
    info = run.info
    names = {slug: name for name, slugs in settings.scenarios.items() for slug in slugs}
    if info.scenario not in names or info.method not in settings.methods:
        raise FedamoleError(f"{path}: {info.method} on {info.scenario} is not in the settings")
    metric = settings.metrics[names[info.scenario]]
    if info.metric != metric:
        raise FedamoleError(f"{path}: has metric {info.metric}; the settings say {metric}")


def _check_same(known: Iterable[tuple[Path, Run]]) -> None:
    """Refuse files that differ where all must agree: rounds, and the partition of a scenario."""
    first: dict[str, tuple[Path, Any]] = {}
    for path, run in known:
        facts: dict[str, Any] = {f"partition of {run.info.scenario}": run.partition}
        if lookup(run.info.method).trains:
            facts["number of rounds"] = run.info.rounds
        for what, value in facts.items():
            other, expected = first.setdefault(what, (path, value))
            if value != expected:
                raise FedamoleError(f"{path}: the {what} differs from that in {other}")
