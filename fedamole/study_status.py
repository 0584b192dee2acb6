"""How far a study is: its rounds, their clients, failures, and when it may end (torch-free).

Pure functions from what the results folder, SLURM and the process table say, which
:mod:`fedamole.cli.status` reads, to what it prints.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from fedamole.config import Config
from fedamole.participation import Participation
from fedamole.planning.workload import RunWork, population_of, works_of
from fedamole.progress import ClientProgress, Work

# Finished rounds that tell how long the next ones will take. Older ones ran on other nodes or under
# another load, and a long study has too many to read.
LAST_ROUNDS = 5

ClientState = Literal["done", "running", "waiting", "failed", "lost", "dropped"]
# Of a job or a process: ``waits`` for a node; nobody can tell here if it is ``unknown``.
Life = Literal["waits", "lives", "gone", "unknown"]
LifeOf = Callable[[ClientProgress], Life]


@dataclass(frozen=True)
class Plan:
    """What a run has to do: train its clients, or test its averaged model on them.

    Attributes
    ----------
    scenario, run, work
        Scenario slug, name of the run, ``train`` or ``test``.
    rounds
        Numbers of the rounds, ascending; only 0 for a run without training.
    population
        Who takes part in which round of training.
    """

    scenario: str
    run: str
    work: Work
    rounds: tuple[int, ...]
    population: Participation

    def clients(self, round_: int) -> list[int]:
        """Clients that work in a round; averaged models are tested on all."""
        if self.work == "test":
            return list(range(self.population.clients))
        return self.population.reporting(round_)

    @property
    def may_drop(self) -> bool:
        """Whether a round goes on without a client that fails for good."""
        return self.work == "train" and self.population.settings.quorum < 1


@dataclass(frozen=True)
class RoundFacts:
    """What the results folder says about the clients of one round.

    Attributes
    ----------
    outputs, kept
        Clients whose metrics are in their place, or wait for the other clients of their job.
    records
        Progress of the clients that began; needed for :func:`rounds_to_read` only.
    """

    outputs: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    records: tuple[ClientProgress, ...] = ()


Rounds = Mapping[int, RoundFacts]


@dataclass(frozen=True)
class RoundStatus:
    """The clients of one round.

    Attributes
    ----------
    round, states
        Number of the round, and the state of each client that takes part in it.
    unknown
        Running clients of which nobody can tell here whether they still live.
    """

    round: int
    states: Mapping[int, ClientState]
    unknown: int = 0

    def count(self, state: ClientState) -> int:
        """Clients in this state."""
        return list(self.states.values()).count(state)


@dataclass(frozen=True)
class SlowestClient:
    """The client that took longest, measured by the others of its round.

    Attributes
    ----------
    round, client, running
        Which one, and whether it still runs.
    seconds, median
        What it took so far, and the median of those of its round that are done.
    """

    round: int
    client: int
    running: bool
    seconds: float
    median: float

    @property
    def ratio(self) -> float:
        """Its time in times of the median; records are exact to a tenth of a second."""
        return round(self.seconds / max(self.median, 0.1), 1)


@dataclass(frozen=True)
class Failure:
    """A client that ended without a result.

    Attributes
    ----------
    round, client, state
        Which one, and whether it ``failed`` with an error, is ``lost``: died without a word, or was
        ``dropped``: failed for good, and the round goes on without it.
    error
        Why, in one line.
    """

    round: int
    client: int
    state: ClientState
    error: str


@dataclass(frozen=True)
class WorkStatus:
    """How far one plan is.

    Attributes
    ----------
    plan
        What has to be done.
    begun
        Whether any client ever began.
    rounds_done
        Rounds of which every client is done; in training, those before the first gap.
    current
        The first round that is not done; None at the end.
    seconds_per_round
        Median of the last finished rounds; None before the first.
    slowest
        Of the last finished rounds and those not done; None before the first client is done.
    failures
        Of the rounds that are not done.
    dropouts
        Of these, and of the last finished rounds.
    """

    plan: Plan
    begun: bool
    rounds_done: int
    current: RoundStatus | None
    seconds_per_round: float | None
    slowest: SlowestClient | None
    failures: tuple[Failure, ...]
    dropouts: tuple[Failure, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Estimate; None before the first round is done."""
        rounds = len(self.plan.rounds) - self.rounds_done
        if rounds == 0 or self.seconds_per_round is None:
            return None if rounds else 0.0
        return rounds * self.seconds_per_round


@dataclass(frozen=True)
class HeadJob:
    """The job that runs Snakemake.

    Attributes
    ----------
    job, submitted, arguments, log
        SLURM's number, seconds since 1970, command line, and where it prints to.
    life
        Whether it waits, runs or is gone.
    """

    job: int
    submitted: float
    arguments: tuple[str, ...]
    log: str
    life: Life


@dataclass(frozen=True)
class StudyStatus:
    """How far a study is.

    Attributes
    ----------
    works
        Its runs, in the order of the config.
    head
        The job that runs Snakemake; None if it was never submitted.
    jobs
        Jobs of the study that run, and that wait; None if SLURM does not say.
    """

    works: tuple[WorkStatus, ...]
    head: HeadJob | None = None
    jobs: tuple[int, int] | None = None

    def seconds_left(self, work: WorkStatus) -> float | None:
        """Estimate for one of the works; tests end no sooner than the training of their models."""
        run = (work.plan.scenario, work.plan.run, "train")
        training = [
            other.seconds_left
            for other in self.works
            if (other.plan.scenario, other.plan.run, other.plan.work) == run
        ]
        left = [seconds for seconds in (work.seconds_left, *training) if seconds is not None]
        return max(left) if len(left) == 1 + len(training) else None


def plans_of(config: Config) -> list[Plan]:
    """List what the runs of a study have to do, in the order of the config."""
    return [
        Plan(slug, work.run, kind, rounds, population_of(config, slug, work))
        for slug in config.scenario_seeds()
        for work in works_of(config)
        for kind, rounds in _kinds_of(work, config.rounds)
    ]


def _kinds_of(work: RunWork, rounds: int) -> Iterator[tuple[Work, tuple[int, ...]]]:
    """Training, if the run trains, and tests, if a row asks for those of the averaged model."""
    numbers = tuple(range(1, rounds + 1)) if work.trains else (0,)
    if work.trains:
        yield "train", numbers
    if work.tests_average:
        yield "test", numbers


def done_rounds(plan: Plan, rounds: Rounds) -> list[int]:
    """List the finished rounds of a plan."""
    done: list[int] = []
    for round_ in plan.rounds:
        if rounds[round_].outputs.issuperset(plan.clients(round_)):
            done.append(round_)
        elif plan.work == "train":
            # What lies behind a gap comes from an earlier study, and will be trained again.
            break
    return done


def rounds_to_read(plan: Plan, rounds: Rounds) -> list[int]:
    """List the rounds whose records :func:`work_status` needs: the last done, and those open.

    Training goes round by round, tests do not: several of their rounds may be open.
    """
    done = done_rounds(plan, rounds)
    rest = [round_ for round_ in plan.rounds if round_ not in done]
    return done[-LAST_ROUNDS:] + (rest[:1] if plan.work == "train" else rest)


def work_status(plan: Plan, rounds: Rounds, life_of: LifeOf, now: float) -> WorkStatus:
    """Say how far one plan is.

    Parameters
    ----------
    plan
        What has to be done.
    rounds
        What is known of each round.
    life_of
        Whether what a record calls ``running`` still lives.
    now
        Seconds since 1970.
    """
    done = done_rounds(plan, rounds)
    states = {
        round_: _round_status(plan, round_, rounds[round_], life_of)
        for round_ in rounds_to_read(plan, rounds)
    }
    still_open = [states[round_] for round_ in states if round_ not in done]
    seconds = _round_seconds(plan, rounds, done[-LAST_ROUNDS:])
    slow = [client for each in states.values() for client in _timed(each, rounds[each.round], now)]
    return WorkStatus(
        plan=plan,
        begun=any(facts.outputs or facts.records for facts in rounds.values()),
        rounds_done=len(done),
        current=still_open[0] if still_open else None,
        seconds_per_round=median(seconds) if seconds else None,
        slowest=max(slow, key=lambda client: (client.ratio, client.round), default=None),
        failures=tuple(
            failure
            for each in still_open
            for failure in _failures(each, rounds[each.round], "failed", "lost")
        ),
        dropouts=tuple(
            failure
            for each in states.values()
            for failure in _failures(each, rounds[each.round], "dropped")
        ),
    )


def _round_status(plan: Plan, round_: int, facts: RoundFacts, life_of: LifeOf) -> RoundStatus:
    """The clients of one round."""
    records = {record.client: record for record in facts.records}
    lives = {
        client: life_of(record)
        for client, record in records.items()
        if record.state == "running" and client not in facts.outputs
    }
    states = {
        client: _state(client, records.get(client), facts, lives.get(client))
        for client in plan.clients(round_)
    }
    return RoundStatus(round_, states, list(lives.values()).count("unknown"))


def _state(
    client: int, record: ClientProgress | None, facts: RoundFacts, life: Life | None
) -> ClientState:
    """The state of one client: its results count more than its record."""
    there = client in facts.outputs or client in facts.kept
    if there and record and record.state == "dropped":
        # Its files hold no results; they say that there are none.
        return "dropped"
    if client in facts.outputs:
        return "done"
    if record and record.state == "failed":
        return "failed"
    if life == "gone":
        return "lost"
    # A job that SLURM took from its node, and will start again, comes back to its clients.
    if life in ("lives", "unknown"):
        return "running"
    # A record may say done of results that were removed, because they are to be made anew.
    return "done" if client in facts.kept else "waiting"


def _round_seconds(plan: Plan, rounds: Rounds, done: list[int]) -> list[float]:
    """Seconds of finished rounds, if they have records.

    A round of training lasts until the next begins, if it has: the server's work and the wait for
    nodes in between are part of it. Otherwise it lasts until its last client ends.
    """
    found = []
    for round_ in done:
        records = rounds[round_].records
        ends = [end for record in records if (end := _end(record)) is not None]
        if not ends:
            continue
        following = rounds.get(round_ + 1, RoundFacts()).records if plan.work == "train" else ()
        # What started earlier is of an earlier study, and will be trained again.
        later = [record.started for record in following if record.started >= max(ends)]
        begin = min(record.started for record in records)
        found.append(min(later, default=max(ends)) - begin)
    return found


def _end(record: ClientProgress) -> float | None:
    """When a client ended, in seconds since 1970; None if it runs."""
    if record.ended is not None or record.seconds is None:
        return record.ended
    # A record of an older version: its clients took all that went by since they began.
    return record.started + record.seconds


def _timed(status: RoundStatus, facts: RoundFacts, now: float) -> list[SlowestClient]:
    """The clients of a round with their times; those that run count too, for one may hang.

    Of clients that are trained together each counts its share.
    """
    seconds = {
        record.client: record.seconds
        for record in facts.records
        if record.seconds is not None and status.states[record.client] == "done"
    }
    running = {
        record.client: (now - record.started) / record.pack
        for record in facts.records
        if status.states[record.client] == "running"
    }
    middle = median(seconds.values()) if seconds else None
    return [
        SlowestClient(status.round, client, client in running, took, middle)
        for client, took in {**seconds, **running}.items()
        if middle is not None
    ]


def _failures(status: RoundStatus, facts: RoundFacts, *kinds: ClientState) -> list[Failure]:
    """The clients of a round that ended without a result in one of these ways."""
    return [
        Failure(status.round, record.client, status.states[record.client], _reason(record))
        for record in facts.records
        if status.states[record.client] in kinds
    ]


def _reason(record: ClientProgress) -> str:
    """Why a client ended without a result, in one line."""
    if record.error:
        return " ".join(record.error.split())
    job = "" if record.job is None else f" of job {record.job}"
    return f"process {record.process}{job} on {record.host} is gone and left no word"
