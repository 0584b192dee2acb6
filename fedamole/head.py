"""Snakemake itself as a SLURM job: long, small, and back after a time-out or preemption.

submitit sends the job to the queue, catches SLURM's warning before the end, and puts the job back
into the queue. What the head had submitted goes on meanwhile; the next attempt waits for it, so
that no client is trained twice, and starts from what is there.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from fedamole import slurm
from fedamole.artifacts import replacing
from fedamole.errors import FedamoleError
from fedamole.owner import HEAD_JOB, was_left_by_a_dead_one

# submitit has set up this one, with the time in front, when the head runs.
logger = logging.getLogger("submitit")

# Between questions to SLURM while jobs of an earlier attempt end.
POLL_S = float(os.environ.get("FEDAMOLE_HEAD_POLL_S", "15"))
# Of submitit, which counts restarts after a time limit; no study should end because of it.
MAX_TIMEOUTS = 1000
# A preempted job gets SIGTERM some time before it is taken away.
GRACE_S = 300


@dataclass
class Head(submitit.helpers.Checkpointable):
    """What the head job does.

    Attributes
    ----------
    arguments
        Of Snakemake.
    folder
        Where Snakemake runs.
    results
        Results folder of the study.
    unlocks
        Whether the lock of the folder, if there is one, is that of a Snakemake that is gone.
    """

    arguments: list[str]
    folder: Path
    results: Path
    unlocks: bool = False

    def __call__(self) -> int:
        """Run Snakemake to its end.

        Raises
        ------
        RuntimeError
            If it failed; the job then counts as failed.
        """
        self._warned = False
        self._remember_warning()
        unlocks = self.unlocks or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        environment = _own_environment()
        os.chdir(self.folder)
        wait_for_jobs(self.results)
        if unlocks:
            logger.info("an earlier Snakemake was cut short: removing its lock")
            self._snakemake("--unlock", environment=environment).wait()
        self._process = self._snakemake(environment=environment)
        code = self._process.wait()
        if code and (code < 0 or self._warned):
            # The warning reached Snakemake as well. The job is about to be taken away or put back
            # into the queue; ending by itself, it would count as failed.
            time.sleep(GRACE_S)
        if code:
            raise RuntimeError(f"snakemake ended with exit status {code}")
        return code

    def _remember_warning(self) -> None:
        """Note SIGTERM on its way to submitit, which ignores it."""
        before = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            self._warned = True
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, note)

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """Leave the jobs alone, end Snakemake, and come back."""
        process = getattr(self, "_process", None)
        if process and process.poll() is None:
            # Asked politely, Snakemake would cancel its jobs or wait for all of them.
            os.killpg(process.pid, signal.SIGKILL)
        return DelayedSubmission(Head(self.arguments, self.folder, self.results, unlocks=True))

    def _snakemake(self, *more: str, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start Snakemake in a process group of its own."""
        command = [sys.executable, "-m", "snakemake", *self.arguments, *more]
        logger.info("%s", " ".join(command[1:]))
        return subprocess.Popen(command, env=environment, start_new_session=True)


def _own_environment() -> dict[str, str]:
    """The environment without what describes the head job: its jobs would inherit it."""
    ours = ("SLURM_", "SRUN_", "SBATCH_", "SUBMITIT_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) or name == "SLURM_CONF"
    }
    return {**kept, HEAD_JOB: os.environ.get("SLURM_JOB_ID", "")}


def wait_for_jobs(results: Path) -> None:
    """Wait until the running jobs of an earlier head are done; cancel those that only wait."""

    def none_left() -> bool:
        jobs = slurm.jobs_of_study(results)
        # One that has begun meanwhile is left alone, and waited for at the next look.
        slurm.cancel([job for job in jobs if job.waits], "--state=PENDING")
        slurm.cancel([job for job in jobs if job.is_held])
        if running := [job for job in jobs if not job.waits]:
            numbers = ", ".join(str(job.id) for job in running)
            logger.info("waiting for jobs of an earlier head: %s", numbers)
        return not jobs

    slurm.wait_until(none_left, POLL_S)


@dataclass(frozen=True)
class Resources:
    """What the head job asks for.

    Attributes
    ----------
    minutes
        Longest time before it goes back into the queue.
    mem_mb, cpus
        Of the one task.
    partition, account, qos, constraint
        As of sbatch; None leaves them out.
    """

    minutes: int = 1440
    mem_mb: int = 4000
    cpus: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


def head_file(results: Path) -> Path:
    """Where a study says which job is its head."""
    return results / "progress" / "head.json"


def _read_head(results: Path) -> dict[str, Any]:
    """What :func:`submit` wrote; empty if there was no head."""
    try:
        return dict(json.loads(head_file(results).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def living_head(results: Path) -> slurm.Job | None:
    """The head of a study if it is queued or running.

    Raises
    ------
    FedamoleError
        If SLURM does not answer.
    """
    number = _read_head(results).get("job")
    return next((job for job in slurm.my_jobs() if job.id == number), None)


def cancel_study(results: Path, patience_s: float = 120) -> list[int]:
    """End the head of a study, then all its jobs.

    Returns
    -------
    list of int
        Numbers of the jobs that were there.

    Raises
    ------
    FedamoleError
        If SLURM does not answer, or jobs do not go.
    """
    found: dict[int, None] = {}
    if head := living_head(results):
        found[head.id] = None
        # Asked politely, it would go on for a while and submit more.
        kind = () if head.waits else ("--signal=KILL", "--full")
        if head.state != "COMPLETING":
            slurm.cancel([head], *kind)
        if not slurm.wait_until(lambda: living_head(results) is None, 1, patience_s):
            raise FedamoleError(f"head job {head.id} does not end; see squeue -j {head.id}")
    # A Snakemake in a terminal would submit them again.
    was_left_by_a_dead_one(results, takes_over=True)

    def none_left() -> bool:
        jobs = slurm.jobs_of_study(results)
        found.update(dict.fromkeys(job.id for job in jobs))
        slurm.cancel([job for job in jobs if job.state != "COMPLETING"])
        return not jobs

    if not slurm.wait_until(none_left, 1, patience_s):
        raise FedamoleError(f"jobs of {results} do not end; see squeue --me")
    return list(found)


def submit(
    arguments: list[str], folder: Path, results: Path, resources: Resources, takes_over: bool
) -> int:
    """Send a head job to the queue.

    Parameters
    ----------
    arguments
        Of Snakemake.
    folder
        Where it runs.
    results
        Results folder of the study.
    resources
        What the job asks for.
    takes_over
        Whether a Snakemake on another host, which cannot be seen from here, is gone for sure.

    Returns
    -------
    int
        Number of the job.

    Raises
    ------
    FedamoleError
        If the study has a head, or SLURM refuses the job.
    """
    if job := living_head(results):
        raise FedamoleError(
            f"{results}: has a head already, job {job.id}; `fedamole cancel` ends it with its jobs"
        )
    unlocks = was_left_by_a_dead_one(results, takes_over)
    head = Head(arguments, folder, results.resolve(), unlocks)
    executor = submitit.SlurmExecutor(results / "logs" / "head", max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        job_name=f"{slurm.study_tag(results)}-head",
        time=resources.minutes,
        mem=f"{resources.mem_mb}MB",
        cpus_per_task=resources.cpus,
        nodes=1,
        ntasks_per_node=1,
        # Short limits are for tests: the warning must come before the end.
        signal_delay_s=min(120, resources.minutes * 20),
        stderr_to_stdout=True,
        additional_parameters=_flags(resources),
    )
    try:
        number = int(executor.submit(head).job_id)
    except submitit.core.utils.FailedJobError as error:
        said = str(error).strip().splitlines()
        raise FedamoleError(f"sbatch: {said[-1] if said else 'failed'}") from error
    record = {
        "job": number,
        "submitted": round(time.time(), 1),
        "arguments": arguments,
        "log": str(results / "logs" / "head" / f"{number}_0_log.out"),
    }
    with replacing(head_file(results)) as scratch:
        scratch.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return number


def _flags(resources: Resources) -> dict[str, Any]:
    """Options of sbatch that a site may or may not want."""
    named = ("partition", "account", "qos", "constraint")
    given = {name: getattr(resources, name) for name in named}
    return {"requeue": True, **{name: value for name, value in given.items() if value}}
