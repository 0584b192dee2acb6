"""What breaks at night: each fault loses nothing, and the bytes are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_study import (
    NUMBERS,
    ClusterStudy,
    accounted,
    control,
    slow_study,
    slurm,
    submitted,
    wait_for,
)
from workflow_study import Study

pytestmark = pytest.mark.cluster


def restarts(job: int) -> int:
    """How often SLURM itself started a job anew."""
    shown = slurm("scontrol", "--oneliner", "show", "job", str(job))
    return int(shown.split("Restarts=")[1].split()[0])


@contextmanager
def recovery(what: str) -> Iterator[None]:
    """Print how long it took from the fault to the end of the study."""
    began = time.monotonic()
    yield
    print(f"recovery: {what}: {time.monotonic() - began:.0f} s from the fault to the end")


def check(study: ClusterStudy, undisturbed: Study) -> None:
    """Nothing is lost, nothing differs, nothing is left over."""
    expected, found = undisturbed.contents(*NUMBERS), study.contents(*NUMBERS)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    assert not [*study.results.rglob("*.part")]
    assert not study.jobs()


def taken_over(study: ClusterStudy, clients: set[int]) -> bool:
    """Whether the last attempt took these clients, and no other, from an earlier one."""
    log = "\n".join(path.read_text() for path in study.results.glob("logs/*/*/*/train_*.log"))
    listed = ", ".join(map(str, sorted(clients)))
    return f"clients {listed} were done by an earlier attempt" in log and not any(
        f"round 1 client {client}: " in log for client in clients
    )


def running_job(study: ClusterStudy) -> int:
    [job] = [job.id for job in study.jobs() if job.state == "RUNNING"]
    return job


def test_a_cancelled_job(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study")
    process = study.start()
    study.wait_for_clients(1)
    job = running_job(study)
    with recovery("scancel of a training job"):
        slurm("scancel", str(job))
        study.finish(process)
    check(study, undisturbed)
    before = {item.client for item in study.progress().values() if item.job == job}
    assert 0 in before and taken_over(study, before)


@pytest.mark.xdist_group("spare")
def test_a_node_that_dies(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study", "spare")
    process = study.start()
    study.wait_for_clients(1)
    job = running_job(study)
    node = slurm("squeue", "-h", "-j", str(job), "-o", "%N")
    try:
        with recovery("a node dies under a job"):
            control("node-kill", node)
            done = study.done()
            study.finish(process)
    finally:
        control("node-start", node)
    check(study, undisturbed)
    assert {item.job for item in study.progress().values()} == {job}, "SLURM requeued the job"
    assert restarts(job) == 1 and taken_over(study, done)


@pytest.mark.alone
def test_a_controller_that_restarts(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study")
    process = study.start()
    study.wait_for_clients(1)
    with recovery("slurmctld is gone for 15 s"):
        control("ctld-kill")
        time.sleep(15)
        control("ctld-start")
        study.finish(process)
    check(study, undisturbed)
    assert len(submitted(study.said())) == 1, "the job went on"


@pytest.mark.alone
def test_accounting_that_is_down(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study")
    control("db-kill")
    try:
        study.finish(study.start())
        assert subprocess.run(["sacct"], capture_output=True).returncode, "it is down"
    finally:
        control("db-start")
    check(study, undisturbed)
    assert len(submitted(study.said())) == 1


def test_a_head_that_is_killed(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study")
    process = study.start()
    study.wait_for_clients(1)
    job = running_job(study)
    with recovery("kill -9 of Snakemake"):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert study.snakemake("--unlock").returncode == 0
        second = study.snakemake("--quiet", "rules")
        assert second.returncode == 1
        said = second.stdout + second.stderr
        assert f"1 jobs of an earlier run of results are still there: {job}." in said
        assert "Traceback" not in said
        wait_for(lambda: not study.jobs())
        study.finish(study.start())
    check(study, undisturbed)
    # The second head took over what the job of the first had finished.
    assert "train_clients" not in study.said()
    assert {item.job for item in study.progress().values()} == {job}


def test_a_job_over_its_time_limit(tmp_path: Path) -> None:
    # SLURM counts in whole minutes. With so many clients, on a fast machine one is left after the
    # minute, and on one that is five times slower one is done.
    study = slow_study(tmp_path / "study", execution={"runtime": 1})
    study.config["scenarios"] = [
        {**study.config["scenarios"][0], "clients": 12, "min_examples": 15}
    ]
    study.config["assignment"] = {"num_experts": 15, "choices": 2, "max_experts": 6}
    study.config["training"] = {**study.config["training"], "steps": 800}
    local = Study(tmp_path / "local", {**study.config})
    local.folder.mkdir()
    process = study.start()
    with subprocess.Popen(local.command("--quiet", "all")) as beside:
        wait_for(lambda: study.jobs())
        job = study.jobs()[0].id
        wait_for(lambda: accounted(job, "State") == ["TIMEOUT"])
        with recovery("a job over its limit of one minute"):
            study.finish(process)
        assert beside.wait() == 0
    [state] = accounted(job, "State")
    assert state == "TIMEOUT"
    jobs = {item.client: item.job or 0 for item in study.progress().values()}
    attempts = sorted({job, *jobs.values()})
    kept = {client for client, number in jobs.items() if number != attempts[-1]}
    assert job in jobs.values() and 0 < len(kept) < 12 and taken_over(study, kept)
    # A slow machine needs a third attempt.
    limits = [accounted(number, "TimelimitRaw")[0] for number in attempts]
    assert len(limits) > 1 and limits == ["1", "2", "4"][: len(limits)]
    memory = [accounted(number, "ReqMem")[0] for number in attempts]
    assert memory == ["2000M", "3000M", "4500M"][: len(memory)]
    check(study, local)


@pytest.mark.xdist_group("spare")
def test_a_job_that_is_preempted(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study", "scavenger")
    process = study.start()
    study.wait_for_clients(1)
    job = running_job(study)
    with recovery("preemption"):
        slurm("srun", "-p", "spare", "-N", "2", "--exclusive", "sleep", "3")
        done = study.done()
        study.finish(process)
    check(study, undisturbed)
    assert {item.job for item in study.progress().values()} == {job}
    assert restarts(job) == 1 and taken_over(study, done)


@pytest.mark.parametrize("clients_per_job", [1, "all"])
def test_a_client_that_fails_for_good(
    tmp_path: Path, undisturbed: Study, clients_per_job: int | str
) -> None:
    execution = {"clients_per_job": clients_per_job}
    study = slow_study(tmp_path / "study", execution=execution)
    study.edits = {"retries: 2": "retries: 1"}
    assert study.snakemake("--quiet", "all", "--until", "tokenize").returncode == 0
    clients = next(study.results.glob("scenarios/*/tokens-*/clients.json"))
    whole = clients.read_text()
    record = json.loads(whole)
    record["clients"][2]["train"] = [0, 0]
    clients.write_text(json.dumps(record))

    process = study.start()
    assert process.wait(timeout=300) == 1
    said = study.said()
    assert "client 2 has no training examples" in said + study.logs()
    name = "train_clients_002" if clients_per_job == 1 else "train_clients_000_003"
    assert f"round_001/{name}.log" in said
    states = {item.client: item.state for item in study.progress().values()}
    assert states == {0: "done", 1: "done", 2: "failed", 3: "done"}
    status = study.fedamole("status", "--configfile", "config.yaml")
    assert "client 2 has no training examples" in status.stdout

    clients.write_text(whole)
    with recovery(f"a failing client is mended (clients_per_job {clients_per_job})"):
        study.finish(study.start())
    check(study, undisturbed)
    attempts = {item.client: item.job for item in study.progress().values()}
    assert attempts[2] == max(attempts.values()) and attempts[0] < attempts[2]


def test_a_head_job_that_runs_into_its_limit_comes_back(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study", execution={"clients_per_job": 2})
    arguments = ["--configfile", "config.yaml", "--snakefile", str(study.snakefile)]
    arguments += ["--jobs", "1"]
    # One job at a time: together they take longer than the head has.
    study.config["training"] = {**study.config["training"], "steps": 600}
    local = Study(tmp_path / "local", study.config)
    local.folder.mkdir()
    study.command()  # Writes config and profile.
    with subprocess.Popen(local.command("--quiet", "all")) as beside:
        short = ("--head-minutes", "1")
        done = study.fedamole("submit", *short, *arguments, FEDAMOLE_HEAD_POLL_S="1")
        again = study.fedamole("submit", *arguments)
        assert beside.wait() == 0
    assert done.returncode == 0, done.stderr
    head = json.loads((study.results / "progress/head.json").read_text())
    assert f"head job {head['job']} runs: snakemake --profile slurm" in done.stdout
    assert again.returncode == 2 and f"has a head already, job {head['job']}" in again.stderr

    wait_for(lambda: has_ended(head["job"]), 400)
    log = (study.folder / head["log"]).read_text()
    wait_for(lambda: accounted(head["job"], "State") == ["COMPLETED"], 30)
    assert "an earlier Snakemake was cut short: removing its lock" in log
    check(study, local)
    assert len(submitted(log)) == 2, "no client was trained twice"


def has_ended(job: int) -> bool:
    """Whether a job will not run again."""
    state = slurm("squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T")
    return state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


@pytest.mark.xdist_group("spare")
def test_a_head_job_that_is_preempted(tmp_path: Path, undisturbed: Study) -> None:
    study = slow_study(tmp_path / "study")
    study.command()  # Writes config and profile.
    arguments = ["--configfile", "config.yaml", "--snakefile", str(study.snakefile)]
    partition = ("--head-partition", "scavenger")
    done = study.fedamole("submit", *partition, *arguments, FEDAMOLE_HEAD_POLL_S="1")
    assert done.returncode == 0, done.stderr
    head = json.loads((study.results / "progress/head.json").read_text())
    study.wait_for_clients(1)
    with recovery("preemption of the head"):
        slurm("srun", "-p", "spare", "-N", "2", "--exclusive", "sleep", "3")
        wait_for(lambda: has_ended(head["job"]), 240)
    log = (study.folder / head["log"]).read_text()
    wait_for(lambda: accounted(head["job"], "State") == ["COMPLETED"], 30)
    assert restarts(head["job"]) == 1
    check(study, undisturbed)
    assert len(submitted(log)) == 1, "its job went on, and was not trained again"


def test_cancel_ends_the_head_and_its_jobs(tmp_path: Path) -> None:
    study = slow_study(tmp_path / "study")
    study.command()
    arguments = ["--configfile", "config.yaml", "--snakefile", str(study.snakefile)]
    done = study.fedamole("submit", *arguments)
    assert done.returncode == 0, done.stderr
    study.wait_for_clients(1)
    done = study.fedamole("cancel", "--configfile", "config.yaml")
    assert done.returncode == 0 and "cancelled: " in done.stdout
    again = ("cancel", "--configfile", "config.yaml")
    wait_for(lambda: "no jobs in the queue" in study.fedamole(*again).stdout, 60)
