"""Which Snakemake works on a study: a second one is not let in, and a dead one keeps none out."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fedamole import slurm
from fedamole.artifacts import replacing
from fedamole.errors import FedamoleError

# Set by the head job for its Snakemake, which must not see SLURM's own variables.
HEAD_JOB = "FEDAMOLE_HEAD_JOB"


@dataclass(frozen=True)
class Owner:
    """A Snakemake that has begun and, as far as it could say, not ended.

    Attributes
    ----------
    host, process
        Where it runs.
    job
        SLURM job around it; None if it was started by hand.
    started
        Seconds since 1970.
    """

    host: str
    process: int
    job: int | None
    started: float


def owner_file(results: Path) -> Path:
    """Where a study says who works on it."""
    return results / "progress" / "snakemake.json"


def claim(results: Path) -> None:
    """Say that this process works on a study."""
    job = os.environ.get(HEAD_JOB, "")
    owner = Owner(
        socket.gethostname(), os.getpid(), int(job) if job.isdigit() else None, time.time()
    )
    with replacing(owner_file(results)) as scratch:
        scratch.write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")


def release(results: Path) -> None:
    """Say that this process has ended its work on a study."""
    owner_file(results).unlink(missing_ok=True)


def read_owner(results: Path) -> Owner | None:
    """Read who works on a study; None if nobody says so."""
    try:
        return Owner(**json.loads(owner_file(results).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def was_left_by_a_dead_one(results: Path, takes_over: bool) -> bool:
    """Whether the last Snakemake of a study died without a word, so that its lock is no one's.

    Parameters
    ----------
    results
        Results folder of the study.
    takes_over
        What to believe of one on another host, which cannot be seen from here.

    Raises
    ------
    FedamoleError
        If it lives, or may live.
    """
    owner = read_owner(results)
    if owner is None:
        return False
    if owner.job is not None:
        if owner.job in {job.id for job in slurm.my_jobs()}:
            raise FedamoleError(f"{results}: Snakemake is at work, in job {owner.job}")
    elif owner.host == socket.gethostname():
        if _is_snakemake(owner.process):
            raise FedamoleError(f"{results}: Snakemake is at work here, process {owner.process}")
    elif not takes_over:
        raise FedamoleError(
            f"{results}: Snakemake was started on {owner.host}, process {owner.process}, and has "
            "not said that it ended; if it is gone for sure, add --head-takes-over"
        )
    return True


def _is_snakemake(process: int) -> bool:
    """Whether a process of this host lives and is a Snakemake; numbers are used again."""
    try:
        return b"snakemake" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
