"""What SLURM knows: jobs, partitions, accounts. Thin calls of its own commands (torch-free)."""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from fedamole.errors import FedamoleError

logger = logging.getLogger(__name__)

# A controller that restarts answers late; one that is gone should not hold a person up for long.
TIMEOUT_S = 60
# %A job, %T state, %M time used, %N nodes, %Z working directory, %j name, %k comment.
_FORMAT = "%A|%T|%M|%N|%Z|%j|%k"
# A person must let these go on.
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
# States in which a job holds, or will get, a node.
ALIVE = (
    *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING"),
    *("REQUEUE_FED", "SIGNALING", "STAGE_OUT", "STOPPED"),
    *HELD,
)


@dataclass(frozen=True)
class Job:
    """A job in the queue.

    Attributes
    ----------
    id
        SLURM's number.
    state
        SLURM's long name of the state.
    used
        Time used, as SLURM prints it.
    nodes
        Node list; empty while it waits.
    folder
        Working directory.
    name, comment
        As submitted. Snakemake's plugin puts rule and wildcards into the comment.
    """

    id: int
    state: str
    used: str
    nodes: str
    folder: Path
    name: str
    comment: str

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", *HELD)

    @property
    def is_held(self) -> bool:
        """Whether it would wait for ever."""
        return self.state in HELD


def is_here() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("squeue") is not None


def call(*command: str) -> str:
    """Run one of SLURM's commands and give what it prints.

    Raises
    ------
    FedamoleError
        If the command is missing, fails, or does not answer; with its own words.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise FedamoleError(
            f"{command[0]}: is not on this machine; a host with SLURM is needed"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FedamoleError(f"{command[0]}: SLURM did not answer within {TIMEOUT_S} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FedamoleError(
            f"{command[0]}: {said[-1] if said else f'ended with {done.returncode}'}"
        )
    return done.stdout


def my_jobs() -> list[Job]:
    """List my own living jobs.

    Raises
    ------
    FedamoleError
        See :func:`call`.
    """
    user = str(os.getuid())
    # Without it, suspended jobs are left out.
    states = "--states=all"
    lines = call("squeue", "--noheader", states, "--user", user, "--format", _FORMAT).splitlines()
    return [job for job in map(_job, lines) if job.state in ALIVE]


def _job(line: str) -> Job:
    """Read a line of squeue; the comment is last, because it may hold anything."""
    number, state, used, nodes, folder, name, comment = line.split("|", 6)
    return Job(int(number), state, used, nodes, Path(folder), name, comment)


def study_tag(results: Path) -> str:
    """Begin of the names of all jobs of a study: tells the jobs of two studies apart.

    Snakemake's plugin asks for the state of its jobs by their common name, so the name cannot say
    more; rule, scenario, run, round and clients are in the comment.
    """
    whole = str(results.resolve())
    readable = re.sub(r"[^A-Za-z0-9-]+", "-", results.name)[:24].strip("-")
    return f"fedamole-{readable}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def jobs_of_study(results: Path) -> list[Job]:
    """List the living jobs that Snakemake submitted for a results folder.

    Raises
    ------
    FedamoleError
        See :func:`call`.
    """
    tag = study_tag(results)
    return [job for job in my_jobs() if job.name.startswith(f"{tag}_")]


def cancel(jobs: Sequence[Job], *options: str) -> None:
    """Cancel jobs; options are those of scancel."""
    if jobs:
        call("scancel", *options, *(str(job.id) for job in jobs))


def wait_until(condition: Callable[[], bool], poll_s: float, patience_s: float = inf) -> bool:
    """Wait until a question about the queue is answered with yes; a silent SLURM is asked again.

    Returns
    -------
    bool
        False if that did not happen in time.

    Raises
    ------
    FedamoleError
        If this machine has no SLURM, which no waiting will change.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if condition():
                return True
        except FedamoleError as silence:
            # The controller restarts; what it knows comes back with it.
            if not is_here():
                raise
            logger.warning("%s; asking again", silence)
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
