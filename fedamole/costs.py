"""What a run cost, round by round: records of progress in, one file of costs out (torch-free).

Beside each metrics file of a study there may be a file of costs. It says what was measured while
the clients and the server worked, so it differs from machine to machine and from time to time,
which a metrics file never does. What was not measured is None: records of older versions say less,
and a client that was lost said nothing.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedamole.artifacts import Header, read_record, write_record
from fedamole.config import parse
from fedamole.errors import FedamoleError
from fedamole.meter import Amounts, ClientCosts, Machine
from fedamole.progress import ClientProgress, Work
from fedamole.registry import lookup
from fedamole.settings import Section
from fedamole.stages import ResultsStage

KIND = "costs"
# Jobs of the server -> the field that their time goes to.
SERVER_JOBS = {"aggregate": "aggregate_seconds", "assign": "assign_seconds"}


@dataclass(frozen=True, kw_only=True)
class ClientCost(Amounts):
    """What one client cost in one round: its training, and the tests that the row reports.

    Attributes
    ----------
    client
        Its index.
    """

    client: Annotated[int, Field(ge=0)]


class RoundCosts(Section):
    """What one round cost."""

    round: int = Field(ge=0)
    """Round; 0 is before training."""
    clients: list[ClientCost]
    """The clients of the round."""
    aggregate_seconds: float | None = None
    """Wall time of the job that averaged the uploads; None if there was none."""
    assign_seconds: float | None = None
    """Wall time of the job that assigned experts for the next round."""


class RunCosts(Section):
    """What one method cost on one scenario and seed."""

    scenario: str
    """Slug of the scenario, with the seed."""
    seed: int
    """Root seed."""
    method: str
    """Row of the tables."""
    machines: list[Machine]
    """What the clients ran on, each kind once."""
    rounds: list[RoundCosts]
    """Rounds, ascending."""


def client_costs(
    clients: Iterable[int], records: Iterable[ClientProgress], method: str, digest: str
) -> list[ClientCost]:
    """Say what the clients of a round cost.

    Parameters
    ----------
    clients
        Those that the metrics have in this round; those that trained are added.
    records
        Progress of the round.
    method
        Row of the tables: it says whether the model of a client, or the averaged one, is tested.
    digest
        Of the settings of the clients: a record of others counts as none.
    """
    trained = costs_of(records, "train", digest)
    tested = costs_of(records, "test", digest)
    tests = trained if lookup(method).evaluated == "local" else tested
    return [
        _client_cost(client, trained.get(client), tests.get(client))
        for client in sorted({*clients, *trained})
    ]


def costs_of(records: Iterable[ClientProgress], work: Work, digest: str) -> dict[int, ClientCosts]:
    """Client -> what it cost, for those that are done under these settings and say so."""
    return {
        record.client: record.costs
        for record in records
        if record.work == work and record.state == "done" and record.digest == digest
        if record.costs is not None
    }


def _client_cost(
    client: int, training: ClientCosts | None, tests: ClientCosts | None
) -> ClientCost:
    """Put together what one client cost in training and in the tests that count."""
    training, tests = training or ClientCosts(), tests or ClientCosts()
    both = (training, tests)
    return ClientCost(
        client=client,
        training_seconds=training.training_seconds,
        testing_seconds=tests.testing_seconds,
        embedding_seconds=training.embedding_seconds,
        peak_memory_mb=_highest(costs.peak_memory_mb for costs in both),
        peak_gpu_memory_mb=_highest(costs.peak_gpu_memory_mb for costs in both),
        upload_bytes=training.upload_bytes,
        download_bytes=training.download_bytes,
        trainable=training.trainable,
    )


def _highest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def machines_of(records: Iterable[ClientProgress], digest: str) -> list[Machine]:
    """List the kinds of machines that clients worked on, each once, in the order of their names."""
    found = {
        record.costs.machine
        for record in records
        if record.digest == digest and record.costs and record.costs.machine
    }
    return sorted(found, key=lambda each: (each.processor, each.gpu or "", each.threads))


def job_seconds(path: Path) -> float | None:
    """Read the wall time of a job from Snakemake's benchmark; None if there is no such file.

    Raises
    ------
    FedamoleError
        If it is no benchmark of a finished job.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return float(next(csv.DictReader(stream, delimiter="\t"))["s"])
    except FileNotFoundError:
        return None
    except (OSError, StopIteration, LookupError, ValueError, TypeError) as error:
        raise FedamoleError(f"{path}: is no benchmark of a finished job ({error})") from error


def write_costs(path: Path, header: Header, costs: RunCosts) -> None:
    """Write a file of costs."""
    write_record(path, header, costs.model_dump(mode="json"))


def read_costs(path: Path, digest: str | None = None) -> RunCosts:
    """Read a file of costs.

    Raises
    ------
    FedamoleError
        If it is missing, broken, foreign, of another kind, or of other settings than the digest's.
    """
    return parse(RunCosts, read_record(path, KIND, digest)[1], str(path))


# Scenario -> method -> one for each seed.
StudyCosts = dict[str, dict[str, list[RunCosts]]]


def read_study_costs(paths: Iterable[Path], settings: ResultsStage) -> StudyCosts:
    """Read the files of costs of a study.

    Parameters
    ----------
    paths
        One file for each scenario, seed and method of the settings, in any order.
    settings
        The study.

    Raises
    ------
    FedamoleError
        As :func:`read_costs`, and if a file is missing, foreign, or given twice.
    """
    found: dict[tuple[str, str], RunCosts] = {}
    for path in paths:
        header, content = read_record(path, KIND)
        costs = parse(RunCosts, content, str(path))
        key = (costs.scenario, costs.method)
        # The digest that it needs depends on what the file says it is about.
        header.check(path, KIND, settings.digests.get(key[0], {}).get(key[1]))
        if key in found:
            raise FedamoleError(f"{path}: is a second file of costs of {key[1]} on {key[0]}")
        found[key] = costs
    return {
        name: {
            method: [_wanted(found, slug, method) for slug in slugs] for method in settings.methods
        }
        for name, slugs in settings.scenarios.items()
    }


def _wanted(found: Mapping[tuple[str, str], RunCosts], slug: str, method: str) -> RunCosts:
    if (slug, method) not in found:
        raise FedamoleError(f"no file of costs of {method} on {slug} was given")
    return found[slug, method]
