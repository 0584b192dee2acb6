"""How far a study is: from made-up results folders to what ``fedamole status`` prints."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from fedamole import slurm
from fedamole.cli import main
from fedamole.cli import status as status_command
from fedamole.config import load_config
from fedamole.errors import FedamoleError
from fedamole.participation import Participation
from fedamole.progress import ClientProgress, RoundProgress, State, Work
from fedamole.settings import ParticipationSettings
from fedamole.study_status import (
    Plan,
    RoundFacts,
    RoundStatus,
    StudyStatus,
    WorkStatus,
    plans_of,
    rounds_to_read,
    work_status,
)

SLUG = "chatterbot-dir0.5-s42"
HOST = "node17"
METRICS = {"train": "metrics", "test": "aggregated"}


# What a study has to do.


def settings(**changes: object) -> dict[str, object]:
    return {
        "results": "results/made-up",
        "rounds": 3,
        "backbone": "smollm2-135m",
        "scenarios": [{"dataset": "chatterbot", "partition": "dir0.5", "clients": 4}],
        "methods": ["fedamole", "fedit", "fedit-ft", "zero-shot"],
        "assignment": {"num_experts": 8, "choices": 2, "max_experts": 6},
        **changes,
    }


def plans(configs: Path, **changes: object) -> list[tuple[str, str, str, tuple[int, ...]]]:
    found = plans_of(load_config(settings(**changes), configs))
    return [(plan.scenario, plan.run, plan.work, plan.rounds) for plan in found]


def test_two_rows_of_a_run_are_trained_once_and_in_the_order_of_the_config(configs: Path) -> None:
    assert plans(configs, methods=["zero-shot", "fedit-ft", "fedamole", "fedit"]) == [
        (SLUG, "zero-shot", "test", (0,)),
        (SLUG, "fedit", "train", (1, 2, 3)),
        (SLUG, "fedit", "test", (1, 2, 3)),
        (SLUG, "fedamole", "train", (1, 2, 3)),
    ]


def test_a_row_of_the_average_needs_training_too(configs: Path) -> None:
    assert [work for _, _, work, _ in plans(configs, methods=["fedit"])] == ["train", "test"]


def test_scenarios_stand_in_the_order_of_the_config_and_seeds_inside_them(configs: Path) -> None:
    scenarios = [
        {"dataset": "snli", "partition": "iid"},
        {"dataset": "chatterbot", "partition": "dir0.5"},
    ]
    found = plans(configs, methods=["fedit-ft"], seeds=[7, 1], scenarios=scenarios)
    assert [slug for slug, *_ in found] == [
        "snli-iid-s7",
        "snli-iid-s1",
        "chatterbot-dir0.5-s7",
        "chatterbot-dir0.5-s1",
    ]


def test_every_point_of_a_sweep_is_a_plan_under_its_own_settings(configs: Path) -> None:
    sweep = {"participation.fraction": [0.5, 1.0]}
    found = plans_of(load_config(settings(sweep=sweep, methods=["fedit-ft"]), configs))
    assert {plan.scenario: plan.population.size for plan in found} == {
        "chatterbot-dir0.5-fraction0.5-s42": 2,
        "chatterbot-dir0.5-fraction1-s42": 4,
    }


# Facts of one plan.


def population(clients: int, **settings: float) -> Participation:
    return Participation(ParticipationSettings(**settings), clients, seed=42)


def plan(rounds: int = 4, clients: int = 3, work: Work = "train", **settings: float) -> Plan:
    who = population(clients, **settings)
    return Plan(SLUG, "fedit", work, tuple(range(1, rounds + 1)), who)


def record(
    client: int, started: float, seconds: float | None, state: State = "done"
) -> ClientProgress:
    return ClientProgress("train", client, state, started, seconds, HOST, 77)


def facts(started: float, *seconds: float, records: Iterable[ClientProgress] = ()) -> RoundFacts:
    """A round whose clients were trained one after another from a time on."""
    done = [
        record(client, started + sum(seconds[:client]), took) for client, took in enumerate(seconds)
    ]
    outputs = frozenset(range(len(seconds)))
    return RoundFacts(outputs, records=(*done, *records))


def status(plan: Plan, *rounds: RoundFacts, now: float = 0.0) -> WorkStatus:
    known = dict(zip(plan.rounds, rounds, strict=False))
    every = {round_: known.get(round_, RoundFacts()) for round_ in plan.rounds}
    return work_status(plan, every, lambda _: "lives", now)


def test_clients_of_a_pack_count_their_shares() -> None:
    """Two packs of two, of 20 and 40 s together: no client is slow, and the round takes 60 s."""
    ends = {0: 118.0, 1: 120.0, 2: 158.0, 3: 160.0}
    packed = tuple(
        replace(record(client, 100.0 + 20 * (client // 2), 10.0), ended=end, pack=2)
        for client, end in ends.items()
    )
    everyone = frozenset(ends)
    running = replace(record(0, 160.0, None, "running"), pack=2)
    rounds = RoundFacts(everyone, records=packed), RoundFacts(records=(running,))
    found = status(plan(3, clients=4), *rounds, now=180.0)
    assert found.seconds_per_round == 60
    assert found.slowest
    assert found.slowest.ratio == 1.0


def test_a_round_lasts_until_the_next_begins() -> None:
    # Starts at 100, 140 and 160; the last round ends with its last client, at 160 + 90.
    rounds = facts(100, 10, 10, 10), facts(140, 5, 5, 5), facts(160, 30, 30, 30)
    found = status(plan(rounds=5), *rounds)
    assert found.rounds_done == 3
    assert found.seconds_per_round == 40  # the median of 40, 20 and 90
    assert found.seconds_left == 2 * 40


def test_tests_of_a_round_last_until_their_last_client_ends() -> None:
    found = status(plan(work="test"), facts(100, 10, 10, 10), facts(500, 7, 8, 9))
    assert found.seconds_per_round == (30 + 24) / 2
    assert found.seconds_left == 2 * 27


def test_only_the_last_five_rounds_tell_the_pace() -> None:
    slow = [facts(1000 * number, 300, 300, 300) for number in range(4)]
    quick = [facts(4000 + 10 * number, 3, 3, 3) for number in range(5)]
    found = status(plan(rounds=20), *slow, *quick)
    assert found.seconds_per_round == 10
    assert found.seconds_left == 11 * 10


def test_there_is_no_estimate_before_the_first_round_is_done() -> None:
    found = status(plan(), facts(100, 10, 10), now=120.0)
    assert found.seconds_per_round is None
    assert found.seconds_left is None
    assert found.current == RoundStatus(1, {0: "done", 1: "done", 2: "waiting"})


def test_nothing_is_left_of_a_finished_run_without_records() -> None:
    everyone = RoundFacts(frozenset(range(3)))
    found = status(plan(rounds=2), everyone, everyone)
    assert (found.rounds_done, found.current, found.seconds_left) == (2, None, 0.0)
    assert found.slowest is None


def test_tests_end_no_sooner_than_the_training_of_their_models() -> None:
    training = status(plan(), facts(0, 100, 100, 100))
    tests = status(plan(work="test"), facts(300, 1, 1, 1))
    study = StudyStatus((training, tests))
    assert study.seconds_left(training) == 3 * 300
    assert tests.seconds_left == 3 * 3
    assert study.seconds_left(tests) == 3 * 300
    assert StudyStatus((status(plan()), tests)).seconds_left(tests) is None


def test_the_slowest_client_is_measured_by_its_round() -> None:
    # 90 s are many, but not in the second round.
    found = status(plan(), facts(0, 10, 12, 30), facts(60, 80, 85, 90)).slowest
    assert found is not None
    assert (found.round, found.client, found.seconds, found.median) == (1, 2, 30, 12)
    assert found.ratio == 2.5


def test_a_client_that_hangs_is_the_slowest_before_it_ends() -> None:
    hangs = record(2, 120, None, "running")
    found = status(plan(), facts(100, 10, 10, records=[hangs]), now=160.0).slowest
    assert found is not None
    assert (found.client, found.running, found.seconds, found.ratio) == (2, True, 40, 4)


def test_rounds_behind_a_gap_are_of_an_earlier_study() -> None:
    everyone = RoundFacts(frozenset(range(3)))
    gap = RoundFacts(frozenset({0}))
    assert status(plan(), everyone, gap, everyone, everyone).rounds_done == 1
    # Tests wait for nothing but their own round.
    assert status(plan(work="test"), everyone, gap, everyone, everyone).rounds_done == 3


def test_a_round_is_done_when_those_who_take_part_in_it_are() -> None:
    sampled = plan(rounds=30, clients=9, fraction=0.4, dropout_rate=0.3, quorum=0.5)
    who = population(9, fraction=0.4, dropout_rate=0.3, quorum=0.5)
    sets = [frozenset(who.reporting(round_)) for round_ in sampled.rounds]
    assert {len(clients) for clients in sets} == {2, 3, 4}
    done = status(sampled, *map(RoundFacts, sets[:20]))
    assert done.rounds_done == 20
    assert done.current == RoundStatus(21, dict.fromkeys(sorted(sets[20]), "waiting"))
    one_less = sets[6] - {min(sets[6])}
    assert status(sampled, *map(RoundFacts, [*sets[:6], one_less, *sets[7:]])).rounds_done == 6
    # Averaged models are tested on all.
    tests = plan(rounds=30, clients=9, work="test", fraction=0.4)
    assert status(tests, *map(RoundFacts, sets)).rounds_done == 0
    assert status(tests, RoundFacts(frozenset(range(9)))).rounds_done == 1


def test_few_records_are_read_of_a_long_study() -> None:
    everyone = RoundFacts(frozenset(range(3)))
    rounds = {round_: everyone for round_ in range(1, 21)}
    rounds |= {round_: RoundFacts() for round_ in range(21, 31)}
    assert rounds_to_read(plan(rounds=30), rounds) == [16, 17, 18, 19, 20, 21]
    open_tests = rounds_to_read(plan(rounds=30, work="test"), rounds)
    assert open_tests == [*range(16, 21), *range(21, 31)]


# The states of a client.


def state_of(round_facts: RoundFacts, life: str = "lives") -> str:
    one = plan(rounds=1, clients=1)
    current = work_status(one, {1: round_facts}, lambda _: life, 0.0).current  # type: ignore
    return current.states[0] if current else "done"


@pytest.mark.parametrize(
    ("life", "state"),
    [("lives", "running"), ("unknown", "running"), ("waits", "waiting"), ("gone", "lost")],
)
def test_a_client_is_what_became_of_its_job(life: str, state: str) -> None:
    assert state_of(RoundFacts(records=(record(0, 10, None, "running"),)), life) == state


@pytest.mark.parametrize("state", ["running", "failed", "done"])
def test_results_count_more_than_records(state: State) -> None:
    records = (record(0, 10, None, state),)
    assert state_of(RoundFacts(frozenset({0}), records=records), "gone") == "done"


def test_a_finished_client_waits_for_the_others_of_its_job() -> None:
    records = (record(0, 10, 5.0),)
    assert state_of(RoundFacts(kept=frozenset({0}), records=records)) == "done"
    # Snakemake removed its results, to have them made anew.
    assert state_of(RoundFacts(records=records)) == "waiting"


def test_files_of_a_client_that_dropped_out_are_no_results() -> None:
    records = (record(0, 10, 5.0, "dropped"),)
    one = plan(rounds=1, clients=2, quorum=0.5)

    def found(**places: frozenset[int]) -> WorkStatus:
        return work_status(one, {1: RoundFacts(records=records, **places)}, lambda _: "lives", 0.0)

    for place in ("outputs", "kept"):
        dropped = found(**{place: frozenset({0})})
        assert dropped.current == RoundStatus(1, {0: "dropped", 1: "waiting"})
        assert dropped.slowest is None
        assert not dropped.failures
        assert [each.client for each in dropped.dropouts] == [0]
    # Snakemake removed them, to have them made anew.
    assert found().current == RoundStatus(1, {0: "waiting", 1: "waiting"})
    assert found(outputs=frozenset({0, 1})).rounds_done == 1


def test_a_retry_counts_more_than_what_is_kept_of_the_attempt_before() -> None:
    failed = record(0, 10, 5.0, "failed")
    assert state_of(RoundFacts(kept=frozenset({0}), records=(failed,))) == "failed"


# Whole folders.


class Clock:
    """A clock that goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@dataclass
class Study:
    """A results folder as the jobs of a study would leave it."""

    folder: Path
    clock: Clock
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.folder / "results" / "made-up"

    def file(self) -> Path:
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(settings(**self.changes)))
        return path

    def progress(self, run: str, work: Work, round_: int) -> RoundProgress:
        name = f"round_{round_:03d}"
        return RoundProgress(self.results / "progress" / SLUG / run / name, work)

    def output(self, run: str, work: Work, round_: int, client: int) -> Path:
        name = f"{METRICS[work]}_{client:03d}.json"
        return self.results / "runs" / SLUG / run / f"round_{round_:03d}" / name

    def finish(
        self,
        run: str,
        work: Work,
        round_: int,
        *seconds: float,
        clients: Iterable[int] | None = None,
        fail: Iterable[int] = (),
    ) -> None:
        """Do clients one after another, as one job does: by default 0, 1, 2 ...

        Those that fail do so twice, and drop out.
        """
        progress = self.progress(run, work, round_)
        numbers = range(len(seconds)) if clients is None else clients
        outputs = {client: [self.output(run, work, round_, client)] for client in numbers}
        for client, took in zip(numbers, seconds, strict=True):
            if client in fail:
                for _ in range(2):
                    progress.end(progress.start(client), f"client {client} has no examples")
                progress.kept(outputs[client][0]).write_text("{}")
                progress.drop(client)
                continue
            began = progress.start(client)
            self.clock.now += took
            progress.kept(outputs[client][0]).write_text("{}")
            progress.end(began)
        progress.publish(outputs, lambda path: False)

    def everything(self) -> None:
        """The whole study."""
        for round_ in (1, 2, 3):
            self.finish("fedamole", "train", round_, 10, 10, 10, 30)
            self.finish("fedit", "train", round_, 8, 8, 8, 8)
            self.finish("fedit", "test", round_, 2, 2, 2, 2)
        self.finish("zero-shot", "test", 0, 1, 1, 1, 1)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """An empty study in a folder of its own, on a machine without SLURM."""
    clock = Clock()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    for name in ("SLURM_JOB_ID", "FEDAMOLE_LOG"):
        monkeypatch.delenv(name, raising=False)
    return Study(tmp_path, clock)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give SLURM some jobs; those named as the study's are counted as such."""

    def fill(states: dict[int, str], study: dict[int, str] | None = None) -> None:
        lines = "".join(f"{job}|{state}\n" for job, state in states.items())
        mine = [
            slurm.Job(job, state, "0:10", "n1", Path(), "fedamole", "rule_train_clients")
            for job, state in (study or {}).items()
        ]
        monkeypatch.setattr(slurm, "is_here", lambda: True)
        monkeypatch.setattr(slurm, "call", lambda *command: lines)
        monkeypatch.setattr(slurm, "jobs_of_study", lambda *study: mine)

    return fill


@pytest.fixture
def printed(study: Study, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Call the command and give what it prints, which fits a terminal."""

    def call() -> str:
        assert main(["status", "--configfile", str(study.file())]) == 0
        text = capsys.readouterr().out
        assert text.isascii()
        assert all(len(line) <= 100 for line in text.splitlines() if str(study.folder) not in line)
        return text

    return call


UP_TO_LOST, UP_TO_LEFT, CLIENTS = slice(0, 7), slice(0, 9), slice(2, 7)


def row(text: str, run: str, work: str, cells: slice = slice(0, 10)) -> str:
    """Cells of a run: rounds, now, done, run, wait, fail, lost, s/round, left (in two words)."""
    found = [line.split() for line in text.splitlines() if line.split()[:2] == [run, work]]
    assert len(found) == 1
    return " ".join(found[0][2:][cells])


def test_a_study_that_has_not_begun_says_how_to(study: Study, printed: Callable[[], str]) -> None:
    file = study.folder / "study.yaml"
    assert printed() == f"nothing has begun; run: snakemake --configfile {file} --cores all\n"


def test_what_comes_before_the_clients_has_logs(study: Study, printed: Callable[[], str]) -> None:
    (study.results / "logs").mkdir(parents=True)
    assert printed() == ("no client has begun; what comes before them is in results/made-up/logs\n")


def test_tables_without_training(study: Study, printed: Callable[[], str]) -> None:
    (study.results / "tables").mkdir(parents=True)
    (study.results / "tables" / "main.md").write_text("")
    assert "holds no rounds, but tables; run: fedamole show --configfile" in printed()


def test_a_study_at_work(study: Study, printed: Callable[[], str]) -> None:
    study.finish("fedamole", "train", 1, 10, 10, 10, 30)
    study.clock.now += 5
    progress = study.progress("fedamole", "train", 2)
    began = progress.start(0)
    study.clock.now += 12
    progress.kept(study.output("fedamole", "train", 2, 0)).write_text("{}")
    progress.end(began)
    progress.start(1)
    study.clock.now += 6
    text = printed()
    # 60 s of clients and 5 s until the next round; two rounds are left.
    assert row(text, "fedamole", "train") == "1/3 2 1 1 2 0 0 65.0 2 min"
    assert "  3 in round 1: 30 s, 3.0x\n" in text
    assert row(text, "fedit", "train") == "0/3 1 0 0 4 0 0 n/a n/a n/a"
    assert row(text, "fedit", "test") == "0/3 1 0 0 4 0 0 n/a n/a n/a"
    assert row(text, "zero-shot", "test") == "0/1 0 0 0 4 0 0 n/a n/a n/a"
    assert "failures" not in text
    # The clients of this machine are looked up among its processes.
    assert "unknown" not in text


def test_a_finished_study(study: Study, printed: Callable[[], str]) -> None:
    study.everything()
    text = printed()
    # From round to round 60 s of fedamole and 40 s of fedit; the last round has only the former.
    assert row(text, "fedamole", "train", UP_TO_LEFT) == "3/3 - - - - - - 100.0 done"
    assert row(text, "zero-shot", "test", UP_TO_LEFT) == "1/1 - - - - - - 4.0 done"
    assert text.endswith("all rounds are done; the tables are not drawn yet\n")
    (study.results / "tables").mkdir()
    (study.results / "tables" / "main.md").write_text("")
    file = study.folder / "study.yaml"
    assert printed().endswith(f"the study is done; run: fedamole show --configfile {file}\n")


def test_a_study_without_the_main_table_finishes_too(
    study: Study, printed: Callable[[], str]
) -> None:
    study.changes["tables"] = {"show": ["clients"]}
    study.everything()
    (study.results / "tables").mkdir()
    assert printed().endswith("all rounds are done; the tables are not drawn yet\n")
    (study.results / "tables" / "clients.md").write_text("")
    assert "the study is done; run: fedamole show" in printed()


def test_a_failing_client_is_named_with_its_log(study: Study, printed: Callable[[], str]) -> None:
    progress = study.progress("fedit", "train", 1)
    progress.end(progress.start(2), "CUDA out of memory:\n tried to allocate 20 GiB " + "x " * 99)
    logs = study.results / "logs" / SLUG / "fedit" / "round_001"
    logs.mkdir(parents=True)
    for age, name in [(0, "000_001"), (9, "000_003"), (5, "002_003"), (1, "003")]:
        path = logs / f"train_clients_{name}.log"
        path.write_text("")
        os.utime(path, (1000 - age, 1000 - age))
    (logs / "aggregate.log").write_text("")
    text = printed()
    assert row(text, "fedit", "train", UP_TO_LOST) == "0/3 1 0 0 3 1 0"
    lines = text.splitlines()
    start = lines.index(f"  {SLUG} fedit train, round 1, client 2: failed")
    assert lines[start + 1].startswith("    CUDA out of memory: tried to allocate 20 GiB x x")
    # Of the two jobs that had the client, the later one.
    assert lines[start + 2] == f"    log: results/made-up/logs/{SLUG}/fedit/round_001/" + (
        "train_clients_002_003.log"
    )


def test_a_retry_makes_good_for_a_failure(study: Study, printed: Callable[[], str]) -> None:
    progress = study.progress("fedit", "train", 1)
    progress.end(progress.start(0), "no space left on the device")
    assert "no space left" in printed()
    study.finish("fedit", "train", 1, 3, 3, 3, 3)
    assert "failures" not in printed()


def test_only_those_who_are_drawn_are_waited_for(study: Study, printed: Callable[[], str]) -> None:
    study.changes = {"participation": {"fraction": 0.5}, "methods": ["fedit", "fedit-ft"]}
    who = population(4, fraction=0.5)
    first, second = who.reporting(1), who.reporting(2)
    assert first != second
    study.finish("fedit", "train", 1, 8, 8, clients=first)
    # Of an earlier study, in which all took part.
    study.finish("fedit", "train", 2, 8, clients=sorted({0, 1, 2, 3} - set(second))[:1])
    text = printed()
    assert f"\n{SLUG}, 4 clients, 2 a round\n" in text
    assert row(text, "fedit", "train", UP_TO_LOST) == "1/3 2 0 0 2 0 0"
    assert row(text, "fedit", "test", UP_TO_LOST) == "0/3 1 0 0 4 0 0"
    study.finish("fedit", "train", 2, 8, 8, clients=second)
    study.finish("fedit", "train", 3, 8, 8, clients=who.reporting(3))
    assert row(printed(), "fedit", "train", UP_TO_LEFT).startswith("3/3 -")


def test_a_client_that_dropped_out_is_no_failure(study: Study, printed: Callable[[], str]) -> None:
    study.changes = {"participation": {"quorum": 0.5}, "methods": ["fedit", "fedit-ft"]}
    study.finish("fedit", "train", 1, 3, 3, 3, 3, fail=[2])
    progress = study.progress("fedit", "train", 2)
    progress.end(progress.start(1), "broken")
    text = printed()
    assert row(text, "fedit", "train", slice(0, 8)) == "1/3 2 0 0 3 1 0 0"
    failures, _, dropouts = text.partition("clients that dropped out of the last rounds")
    assert "round 2, client 1: failed" in failures
    assert "client 2" not in failures
    assert f"{SLUG} fedit train, round 1, client 2: dropped\n    client 2 has no" in dropouts
    assert "client 1" not in dropouts
    study.finish("fedit", "train", 2, 3, 3, 3, fail=[1])
    assert row(printed(), "fedit", "train", slice(0, 8)) == "1/3 2 2 0 1 0 0 1"


def test_where_nobody_may_drop_out_there_is_no_column(
    study: Study, printed: Callable[[], str]
) -> None:
    study.finish("fedit", "train", 1, 3)
    assert " drop " not in printed()


def test_pooled_data_have_one_client_and_all_test(study: Study, printed: Callable[[], str]) -> None:
    study.changes = {"methods": ["centralised"], "participation": {"fraction": 0.5}}
    study.finish("centralised", "train", 1, 30)
    study.finish("centralised", "test", 1, 2, 2)
    text = printed()
    assert f"\n{SLUG}, 4 clients\n" in text
    assert row(text, "centralised", "train", UP_TO_LOST) == "1/3 2 0 0 1 0 0"
    assert row(text, "centralised", "test", UP_TO_LOST) == "0/3 1 2 0 2 0 0"


def test_a_failed_test_behind_the_current_round_is_shown(
    study: Study, printed: Callable[[], str]
) -> None:
    for round_ in (1, 2):
        study.finish("fedit", "train", round_, 3, 3, 3, 3)
    progress = study.progress("fedit", "test", 2)
    progress.end(progress.start(1), "broken")
    text = printed()
    assert row(text, "fedit", "test", UP_TO_LOST) == "0/3 1 0 0 4 0 0"
    assert f"{SLUG} fedit test, round 2, client 1: failed" in text
    assert "log: none was written" in text


def start_elsewhere(study: Study, job: int | None, host: str = HOST) -> None:
    """Let a client begin on another host, under a SLURM job or none."""
    progress = study.progress("fedit", "train", 1)
    began = progress.start(0)
    path = progress.folder / "train_000.json"
    path.write_text(json.dumps({**vars(began), "job": job, "host": host}))


@pytest.mark.parametrize(
    ("jobs", "counts"),
    [
        ({4711: "RUNNING"}, "0 1 3 0 0"),
        ({4711: "SUSPENDED"}, "0 1 3 0 0"),
        ({4711: "PENDING"}, "0 0 4 0 0"),
        ({4711: "COMPLETED"}, "0 0 3 0 1"),
        ({4712: "RUNNING"}, "0 0 3 0 1"),
        ({}, "0 0 3 0 1"),
    ],
)
def test_a_client_whose_job_is_gone_is_lost(
    jobs: dict[int, str],
    counts: str,
    study: Study,
    queue: Callable[..., None],
    printed: Callable[[], str],
) -> None:
    start_elsewhere(study, 4711)
    queue(jobs)
    text = printed()
    assert row(text, "fedit", "train", CLIENTS) == counts
    lost = f"{SLUG} fedit train, round 1, client 0: lost"
    assert (lost in text) == counts.endswith("1")
    assert (f"of job 4711 on {HOST} is gone" in text) == counts.endswith("1")


def test_without_slurm_nobody_knows_about_other_hosts(
    study: Study, monkeypatch: pytest.MonkeyPatch, printed: Callable[[], str]
) -> None:
    start_elsewhere(study, 4711)
    text = printed()
    assert row(text, "fedit", "train", CLIENTS) == "0 1 3 0 0"
    assert "whether 1 running clients still live is unknown (squeue is not on this" in text
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "call", silent)
    assert "is unknown (squeue: SLURM did not answer within 60 s)" in printed()


def silent(*command: str) -> str:
    raise FedamoleError(f"{command[0]}: SLURM did not answer within 60 s")


def test_a_client_outside_slurm_on_another_host_is_unknown(
    study: Study, queue: Callable[..., None], printed: Callable[[], str]
) -> None:
    start_elsewhere(study, None)
    queue({})
    assert "is unknown (outside SLURM, on another host)" in printed()


def dead_process() -> int:
    """Number of a process that has just ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.mark.parametrize("job", [None, 4711])
def test_a_client_of_this_host_whose_process_is_gone_is_lost(
    job: int | None, study: Study, queue: Callable[..., None], printed: Callable[[], str]
) -> None:
    process = dead_process()
    start_elsewhere(study, job, socket.gethostname())
    path = study.progress("fedit", "train", 1).folder / "train_000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "process": process}))
    queue({4711: "RUNNING"})
    text = printed()
    assert row(text, "fedit", "train", CLIENTS) == "0 0 3 0 1"
    assert f"process {process}" in text


def test_a_process_that_began_after_the_record_has_only_its_number(
    study: Study, printed: Callable[[], str]
) -> None:
    study.clock.now -= 30 * 86400
    study.progress("fedit", "train", 1).start(0)
    study.clock.now += 30 * 86400
    assert row(printed(), "fedit", "train", CLIENTS) == "0 0 3 0 1"


@pytest.mark.parametrize(
    ("jobs", "state"),
    [
        ({9: "PENDING"}, "queued"),
        ({9: "RUNNING"}, "running"),
        ({}, "gone"),
        (None, "state unknown"),
    ],
)
def test_the_head_job_and_the_jobs_of_the_study(
    jobs: dict[int, str] | None,
    state: str,
    study: Study,
    queue: Callable[..., None],
    printed: Callable[[], str],
) -> None:
    head = {
        "job": 9,
        "submitted": study.clock.now - 7200,
        "arguments": ["snakemake", "--profile", "my profile"],
        "log": "results/made-up/logs/head-9.log",
    }
    path = study.results / "progress" / "head.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(head))
    if jobs is not None:
        queue(jobs, study={10: "RUNNING", 11: "RUNNING", 12: "PENDING"})
    lines = printed().splitlines()
    assert lines[0].startswith("no client has begun")
    assert lines[2:4] == [
        f"head job 9: {state}, submitted 2.0 h ago, log: results/made-up/logs/head-9.log",
        "  snakemake --profile 'my profile'",
    ]
    assert lines[4] == (
        "SLURM jobs of this study: 2 running, 1 pending"
        if jobs is not None
        else "whether the head job still lives is unknown (squeue is not on this machine)"
    )


def test_a_broken_head_record_is_named(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    path = study.results / "progress" / "head.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"job": 9}')
    assert main(["status", "--configfile", str(study.file())]) == 2
    assert "head.json: is no record of a head job (KeyError('arguments'))" in (
        capsys.readouterr().err
    )


def test_a_large_study_fits_the_terminal(study: Study, printed: Callable[[], str]) -> None:
    study.changes = {
        "rounds": 100,
        "scenarios": [{"dataset": "chatterbot", "partition": "dir0.5", "clients": 101}],
        "methods": ["fedit-ft", "zero-shot"],
    }
    for round_ in range(1, 12):
        study.finish("fedit", "train", round_, *[0.0] * 49, *[60.0] * 51, 6000.0)
    text = printed()
    assert row(text, "fedit", "train") == "11/100 12 0 0 101 0 0 9060.0 9.3 d"
    assert "  100 in round 11: 100 min, 100.0x" in text


def test_clients_of_an_earlier_larger_study_do_not_count(
    study: Study, printed: Callable[[], str]
) -> None:
    study.finish("fedamole", "train", 1, 1, 1, 1, 1, 50)
    progress = study.progress("fedamole", "train", 2)
    progress.end(progress.start(4), "broken")
    text = printed()
    assert row(text, "fedamole", "train", UP_TO_LOST) == "1/3 2 0 0 4 0 0"
    assert "failures" not in text


def test_watching_goes_on_until_it_is_interrupted(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        study.finish("zero-shot", "test", 0, 1, 1, 1, 1)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status_command.time, "sleep", sleep)
    assert main(["status", "--configfile", str(study.file()), "--watch", "2.5"]) == 0
    text = capsys.readouterr().out
    assert pauses == [2.5] * 3
    assert text.startswith("nothing has begun")
    assert text.count("zero-shot test     1/1") == 2
    # Only a terminal can be cleared.
    assert "\033" not in text


@pytest.mark.parametrize("pause", ["0", "-1", "soon", "nan"])
def test_a_pause_is_a_number_above_0(pause: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", "--watch", pause])
    assert ended.value.code == 2
    assert "must be a number of seconds above 0" in capsys.readouterr().err


def test_the_demo_is_the_study_of_those_who_name_none(
    study: Study, capsys: pytest.CaptureFixture[str], configs: Path
) -> None:
    assert main(["status"]) == 0
    assert f"--configfile {configs / 'demo.yaml'}" in capsys.readouterr().out
    (study.folder / "configs").symlink_to(configs)
    assert main(["status"]) == 0
    assert "--configfile configs/demo.yaml" in capsys.readouterr().out


def test_18000_clients_are_read_in_a_moment(study: Study, printed: Callable[[], str]) -> None:
    study.changes = {
        "rounds": 31,
        "seeds": list(range(30)),
        "methods": ["fedamole", "fedit-ft"],
        "scenarios": [{"dataset": "chatterbot", "partition": "dir0.5", "clients": 10}],
        "assignment": {},
    }
    study.finish("fedamole", "train", 1, 20)
    text = (study.progress("fedamole", "train", 1).folder / "train_000.json").read_text()
    for seed in range(30):
        for run in ("fedamole", "fedit"):
            for round_ in range(1, 31):
                place = Path(f"chatterbot-dir0.5-s{seed}") / run / f"round_{round_:03d}"
                write_round(study.results, place, text)
    began = time.perf_counter()
    shown = printed()
    took = time.perf_counter() - began
    assert shown.count("30/31") == 60
    # One second here; a busy machine may take a few.
    assert took < 10


def write_round(results: Path, place: Path, record: str) -> None:
    """Write the files of ten clients, without the care of real jobs."""
    for kind in ("runs", "progress"):
        (results / kind / place).mkdir(parents=True)
    for client in range(10):
        (results / "runs" / place / f"metrics_{client:03d}.json").touch()
        (results / "runs" / place / f"client_{client:03d}.h5").touch()
        own = record.replace('"client":0', f'"client":{client}')
        (results / "progress" / place / f"train_{client:03d}.json").write_text(own)
