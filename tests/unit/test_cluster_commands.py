"""What fedamole makes of SLURM's words, and of a Snakemake that is or is not at work.

SLURM is a script here that prints what it is told; tests/cluster has a real one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from fedamole import head, launching, owner, slurm
from fedamole.cli import clients, main
from fedamole.errors import ClientError, FedamoleError
from fedamole.meter import Meter
from fedamole.progress import RoundProgress, read_progress
from fedamole.snakemake_profile import read_profile, unquoted

REPOSITORY = Path(__file__).parents[2]


class FakeSlurm:
    """squeue and scancel that keep a list of jobs in a file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue, self.calls = folder / "queue", folder / "calls"
        self.queue.write_text("")
        self.calls.write_text("")
        commands = {
            "squeue": f"cat {self.queue}",
            # Like SLURM's, it forgets a pending job at once.
            "scancel": f'echo "$@" >> {self.calls}; for job; do '
            f'sed -i "/^$job|PENDING|/d" {self.queue}; done',
        }
        for name, text in commands.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

    def add(self, number: str, state: str, name: str, comment: str = "(null)") -> None:
        line = f"{number}|{state}|1:00|n1|/work|{name}|{comment}\n"
        self.queue.write_text(self.queue.read_text() + line)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_jobs_of_a_study_are_found_among_others(fake: FakeSlurm, results: Path) -> None:
    tag = slurm.study_tag(results)
    fake.add("7", "SUSPENDED", f"{tag}_1234", "rule_train_clients_wildcards_a|b_c_001")
    fake.add("8", "RUNNING", f"{slurm.study_tag(results / 'other')}_1234")
    fake.add("9", "COMPLETED", f"{tag}_1234")
    fake.add("10", "RUNNING", f"{tag}-head")
    [job] = slurm.jobs_of_study(results)
    assert (job.id, job.state, job.comment) == (7, "SUSPENDED", fake_comment(fake))


def fake_comment(fake: FakeSlurm) -> str:
    return fake.queue.read_text().splitlines()[0].split("|", 6)[6]


def test_two_results_folders_of_one_name_have_two_tags(tmp_path: Path) -> None:
    one, other = slurm.study_tag(tmp_path / "a/demo"), slurm.study_tag(tmp_path / "b/demo")
    assert one != other and one.startswith("fedamole-demo-")
    # What the plugin allows in the name of a job.
    long = slurm.study_tag(tmp_path / ("long name with spaces" * 9))
    assert len(long) <= 50 and set(long) <= set("-abcdefghijklmnopqrstuvwxyz0123456789")


def test_a_head_waits_for_running_jobs_and_cancels_waiting_ones(
    fake: FakeSlurm, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = slurm.study_tag(results)
    fake.add("7", "PENDING", f"{tag}_1")
    fake.add("8", "RUNNING", f"{tag}_1")
    waited = []

    def end_job(seconds: float) -> None:
        # Python itself sleeps for milliseconds while it waits for squeue.
        waited.extend([seconds] * (seconds >= 1))
        if len(waited) == 2:
            fake.queue.write_text("")

    monkeypatch.setattr(time, "sleep", end_job)
    head.wait_for_jobs(results)
    assert len(waited) == 2
    # One that has begun between question and answer must not be hit.
    assert fake.calls.read_text() == "--state=PENDING 7\n"


def test_a_host_without_slurm_is_no_reason_to_wait(
    monkeypatch: pytest.MonkeyPatch, results: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FedamoleError, match="squeue: is not on this machine"):
        head.wait_for_jobs(results)


def test_cancel_kills_the_head_before_its_jobs(
    fake: FakeSlurm, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = slurm.study_tag(results)
    fake.add("5", "RUNNING", f"{tag}-head")
    fake.add("6", "PENDING", f"{tag}_1")
    head.head_file(results).parent.mkdir(parents=True)
    head.head_file(results).write_text(json.dumps({"job": 5}))

    def go_on(seconds: float) -> None:
        lines = fake.queue.read_text().splitlines(keepends=True)
        fake.queue.write_text("".join(line for line in lines if not line.startswith("5|")))

    monkeypatch.setattr(time, "sleep", go_on)
    assert head.cancel_study(results) == [5, 6]
    assert fake.calls.read_text().splitlines() == ["--signal=KILL --full 5", "6"]


def test_a_checkpoint_ends_snakemake_and_takes_its_lock(tmp_path: Path) -> None:
    job = head.Head(["--configfile", "x"], tmp_path, tmp_path / "results")
    job._process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    again = job.checkpoint().function
    assert job._process.wait(10) == -signal.SIGKILL
    assert again.unlocks and again.arguments == job.arguments


@pytest.mark.parametrize("alive", [True, False])
def test_a_snakemake_at_work_keeps_a_head_out(fake: FakeSlurm, results: Path, alive: bool) -> None:
    code = f"from fedamole.owner import *; claim(Path({str(results)!r})); import time; "
    with subprocess.Popen(
        [sys.executable, "-c", f"{code} print('ready', flush=True); time.sleep(60)", "snakemake"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        if alive:
            with pytest.raises(FedamoleError, match=f"at work here, process {process.pid}"):
                owner.was_left_by_a_dead_one(results, takes_over=True)
        process.kill()
        process.wait()
    assert owner.was_left_by_a_dead_one(results, takes_over=False)
    owner.release(results)
    assert not owner.was_left_by_a_dead_one(results, takes_over=False)


def test_a_snakemake_on_another_host_is_believed_to_live(
    fake: FakeSlurm, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.claim(results)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(FedamoleError, match="if it is gone for sure, add --head-takes-over"):
        owner.was_left_by_a_dead_one(results, takes_over=False)
    assert owner.was_left_by_a_dead_one(results, takes_over=True)


def test_a_head_in_the_queue_is_at_work(
    fake: FakeSlurm, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(owner.HEAD_JOB, "5")
    owner.claim(results)
    assert owner.was_left_by_a_dead_one(results, takes_over=False)
    fake.add("5", "RUNNING", "head")
    with pytest.raises(FedamoleError, match="Snakemake is at work, in job 5"):
        owner.was_left_by_a_dead_one(results, takes_over=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n"], "a dry run needs no job"),
        (["--directory", "x"], "--directory is not allowed; call it from that folder"),
        (["--config", "rounds=2"], "one --configfile and no --config are allowed"),
        (["--configfile", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--profile", "nowhere"], "--profile nowhere: is no file and no folder"),
        ([], "slurm/config.yaml: default-resources: slurm_account is CHANGE_ME"),
    ],
)
def test_submit_refuses_in_one_line_before_anything_is_queued(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    given = ["--configfile", "configs/smoke.yaml"] if "--configfile" not in arguments else []
    assert main(["submit", *given, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_unknown_arguments_of_other_commands_are_still_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", "--jobs", "5"])
    assert ended.value.code == 2 and "unrecognized arguments: --jobs 5" in capsys.readouterr().err


@pytest.mark.parametrize("resources", [["slurm_partition='all'", "max_runtime=90"], None])
def test_a_profile_is_read_as_snakemake_reads_it(
    tmp_path: Path, resources: list[str] | None
) -> None:
    given = resources or {"slurm_partition": "'all'", "max_runtime": 90}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"default-resources": given}))
    profile = read_profile(tmp_path / "config.yaml")
    assert profile.text("slurm_partition") == "all" and profile.number("max_runtime") == 90
    assert profile.text("qos") is None
    assert unquoted('"a100"') == "a100" and unquoted("it's") == "it's"


def outputs(folder: Path) -> dict[int, list[Path]]:
    return {k: [folder / f"client_{k}.h5", folder / f"metrics_{k}.json"] for k in (0, 1)}


def is_current(path: Path) -> bool:
    return path.is_file() and path.read_text() == "right"


def test_two_copies_of_a_job_publish_once(tmp_path: Path) -> None:
    """SLURM starts a job anew whose node is silent; the first copy may still be at work there."""
    progress, files = RoundProgress(tmp_path / "progress", "train"), outputs(tmp_path / "out")
    progress.folder.mkdir()
    for path in (path for paths in files.values() for path in paths):
        progress.kept(path).write_text("right")
    assert progress.finished(files, is_current) == {0, 1}
    progress.publish(files, is_current)
    times = {path: path.stat().st_mtime_ns for paths in files.values() for path in paths}
    assert progress.finished(files, is_current) == {0, 1}
    # The other copy: nothing is kept any more, everything is in its place.
    progress.publish(files, is_current)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not [*progress.folder.iterdir()]


def test_a_client_is_done_only_with_all_its_files(tmp_path: Path) -> None:
    progress, files = RoundProgress(tmp_path, "train"), outputs(tmp_path / "out")
    progress.kept(files[0][0]).write_text("right")
    progress.kept(files[1][0]).write_text("right")
    progress.kept(files[1][1]).write_text("of other settings")
    assert progress.finished(files, is_current) == set()


def test_progress_says_where_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    progress = RoundProgress(tmp_path, "test")
    progress.end(progress.start(3), "no space left")
    progress.start(4)
    failed, running = read_progress(tmp_path)
    assert (failed.client, failed.state, failed.error) == (3, "failed", "no space left")
    assert (running.state, running.job, running.process) == ("running", 77, os.getpid())
    (tmp_path / "train_000.json").write_text("{")
    with pytest.raises(FedamoleError, match="train_000.json: is no record of a client's progress"):
        read_progress(tmp_path)


def test_attempts_count_failures_under_the_same_settings_and_no_interruption(
    tmp_path: Path,
) -> None:
    progress = RoundProgress(tmp_path, "train", "these settings")
    assert progress.attempts(0) == 0
    progress.end(progress.start(0), "no examples")
    assert progress.attempts(0) == 1
    progress.end(progress.start(0), "its job was ended", interrupted=True)
    assert progress.attempts(0) == 1
    # Killed: nobody says how it ended.
    progress.start(0)
    assert progress.attempts(0) == 2
    assert RoundProgress(tmp_path, "train", "others").attempts(0) == 0
    progress.end(progress.start(0))
    assert progress.attempts(0) == 0


def test_a_client_that_fails_drops_out_alone_where_it_interrupts_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes that wait for each other all end when one dies."""
    progress, done, dropped = RoundProgress(tmp_path, "train"), set[int](), []

    def start(job: Any, wanted: list[int], do: Any, first: Any) -> None:
        began = {client: progress.start(client) for client in wanted}
        if 1 in wanted:
            progress.end(began[0], "its job was ended", interrupted=True)
            progress.end(began[1], "out of memory")
            raise FedamoleError("4 of 4 processes died")
        done.update(wanted)

    def drop(job: Any, client: int) -> None:
        dropped.append(progress.drop(client))
        done.add(client)

    monkeypatch.setattr(clients, "_start", start)
    monkeypatch.setattr(clients, "_drop", drop)
    job = SimpleNamespace(
        progress=progress,
        tolerant=True,
        layout=launching.Layout(lanes=2, ranks=2),
        outputs={0: [], 1: []},
        missing=lambda: [client for client in (0, 1) if client not in done],
        is_current=is_current,
    )
    clients._run(cast(Any, job), cast(Any, None))
    assert dropped == ["out of memory"]
    assert progress.attempts(0) == 1


def test_workers_get_their_own_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    found = launching._environment(launching.Layout(lanes=4, cpu_threads=2), "here")
    assert {found[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"2"}


def turns_of(progress: RoundProgress, monkeypatch: pytest.MonkeyPatch) -> clients._Turns:
    monkeypatch.setenv("RANK", "0")
    job = SimpleNamespace(progress=progress, layout=launching.Layout(), work="train")
    return clients._Turns(cast(Any, job), [0, 1, 2], Meter(), pack=3)


def test_a_client_of_a_pack_counts_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve seconds of training together, then tests of two seconds in turn, of one to embed."""
    now = stopped_clock(monkeypatch)
    progress = RoundProgress(tmp_path, "train")
    turns = turns_of(progress, monkeypatch)
    meter = turns.meter
    with turns:
        with turns.of_all():
            with meter.phase("loading"):
                now(3)
            now(12)
        for client in turns.waiting():
            with turns.of(client):
                with meter.phase("testing"):
                    now(2)
                with meter.phase("embedding"):
                    now(1)
                meter.count(upload_bytes=10 + client)
    found = read_progress(tmp_path)
    assert [item.seconds for item in found] == [(3 + 12) / 3 + 3] * 3
    assert [item.ended - item.started for item in found if item.ended] == [15 + 3, 15 + 6, 15 + 9]
    costs = [item.costs for item in found if item.costs]
    assert [item.training_seconds for item in costs] == [4, 4, 4]
    assert [item.testing_seconds for item in costs] == [2, 2, 2]
    assert [item.embedding_seconds for item in costs] == [1, 1, 1]
    assert [item.upload_bytes for item in costs] == [10, 11, 12]
    assert all(item.peak_memory_mb > 10 for item in costs)


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop all clocks; the function given lets seconds go by."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def go(seconds: float) -> None:
        clock.now += seconds

    return go


def test_a_retried_client_costs_what_its_last_attempt_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = stopped_clock(monkeypatch)
    progress = RoundProgress(tmp_path, "train")
    turns = turns_of(progress, monkeypatch)
    with turns:
        for client in turns.waiting():
            with turns.of(client):
                now(5)
                if client == 1:
                    raise ClientError("it diverged")
    assert [bool(item.costs) for item in read_progress(tmp_path)] == [True, False, True]
    job = SimpleNamespace(progress=progress, layout=launching.Layout(), work="train")
    with clients._Turns(cast(Any, job), [1], Meter()) as again, again.of(1):
        now(7)
    seconds = [item.costs.training_seconds for item in read_progress(tmp_path) if item.costs]
    assert seconds == [5, 7, 5]


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    old = {"work": "train", "client": 0, "state": "done", "started": 5.0, "seconds": 2.0}
    (tmp_path / "train_000.json").write_text(json.dumps(old))
    (found,) = read_progress(tmp_path)
    assert (found.seconds, found.ended, found.pack, found.costs) == (2.0, None, 1, None)


def test_what_fails_for_a_whole_pack_is_the_try_of_no_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a quorum clients that fail twice drop out: not for what another has done."""
    progress = RoundProgress(tmp_path, "train")
    for _ in range(3):
        turns = turns_of(progress, monkeypatch)
        with turns, turns.of_all():
            raise RuntimeError("out of memory")
        assert turns.waiting() == []
    found = read_progress(tmp_path)
    assert [(item.state, item.error) for item in found] == [
        ("failed", "RuntimeError: out of memory")
    ] * 3
    assert [progress.attempts(client) for client in (0, 1, 2)] == [0, 0, 0]


def test_only_the_client_whose_turn_it_is_loses_a_try_to_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = RoundProgress(tmp_path, "train")
    turns = turns_of(progress, monkeypatch)
    with turns.of(0):
        pass
    # Killed: nothing is said any more.
    left = turns.of(1)
    left.__enter__()
    assert [item.state for item in read_progress(tmp_path)] == ["done", "running", "running"]
    assert [progress.attempts(client) for client in (0, 1, 2)] == [0, 1, 0]


def test_the_error_of_a_client_of_a_pack_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = RoundProgress(tmp_path, "train")
    turns = turns_of(progress, monkeypatch)
    with turns:
        for client in turns.waiting():
            with turns.of(client):
                if client == 1:
                    raise ClientError("it diverged")
    assert [item.state for item in read_progress(tmp_path)] == ["done", "failed", "done"]
    assert [progress.attempts(client) for client in (0, 1, 2)] == [0, 1, 0]
