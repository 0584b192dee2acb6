"""What a SLURM cluster has: partitions, nodes, accounts (torch-free)."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedamole.errors import FedamoleError
from fedamole.slurm import TIMEOUT_S, call


@dataclass(frozen=True)
class Partition:
    """A partition, as far as jobs must fit it.

    Attributes
    ----------
    name
        Its name.
    state
        ``UP``, or why it takes no jobs.
    is_default
        Whether jobs that name no partition go there.
    max_minutes
        Longest run time of a job; None if there is no limit.
    accounts
        Accounts that may use it; None stands for all.
    """

    name: str
    state: str
    is_default: bool
    max_minutes: int | None
    accounts: frozenset[str] | None


@dataclass(frozen=True)
class Node:
    """What a node has.

    Attributes
    ----------
    name
        Its name.
    cpus
        CPUs.
    mem_mb
        Memory in MB.
    gpus
        Number of GPUs by type; the type is empty where the site names none.
    state
        SLURM's long name of the state.
    """

    name: str
    cpus: int
    mem_mb: int
    gpus: Mapping[str, int]
    state: str

    @property
    def is_usable(self) -> bool:
        """Whether it can start jobs, now or when others have ended; a star means: is silent."""
        out = ("down", "drain", "fail", "error", "unknown", "inval", "future")
        return not self.state.lower().startswith(out) and "*" not in self.state


def setting(name: str) -> str | None:
    """Look up a setting of the cluster, such as ``MinJobAge``; None if it has no such setting.

    Raises
    ------
    FedamoleError
        See :func:`call`.
    """
    match = re.search(rf"^{name}\s*=\s*(.*?)\s*$", call("scontrol", "show", "config"), re.MULTILINE)
    return match[1] if match else None


def partitions() -> list[Partition]:
    """List the partitions, hidden ones too: a job may name them.

    Raises
    ------
    FedamoleError
        See :func:`call`.
    """
    lines = call("scontrol", "--all", "--oneliner", "show", "partition").splitlines()
    return [_partition(dict(re.findall(r"(\w+)=(\S*)", line))) for line in lines if "=" in line]


def _partition(values: Mapping[str, str]) -> Partition:
    """Read what scontrol says of a partition."""
    allowed = values.get("AllowAccounts", "ALL")
    return Partition(
        name=values["PartitionName"],
        state=values.get("State", "UP"),
        is_default=values.get("Default") == "YES",
        max_minutes=minutes(values.get("MaxTime", "UNLIMITED")),
        accounts=None if allowed == "ALL" else frozenset(allowed.split(",")),
    )


def minutes(time_limit: str) -> int | None:
    """Read a time limit as scontrol prints it, ``[days-]hours:minutes:seconds``; None: no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", time_limit)
    if not match:
        return None
    days, hours, whole, _ = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + whole


def nodes_of(names: Sequence[str]) -> list[Node]:
    """List the nodes of partitions, each once.

    Raises
    ------
    FedamoleError
        See :func:`call`.
    """
    wanted = f"--partition={','.join(names)}"
    lines = call("sinfo", "--noheader", "--Node", wanted, "--format=%N|%c|%m|%G|%T")
    found = {}
    for line in lines.splitlines():
        name, cpus, memory, gres, state = line.split("|")
        # A plus sign marks a group of unequal nodes.
        found[name] = Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus(gres), state)
    return list(found.values())


def gpus(gres: str) -> dict[str, int]:
    """Count the GPUs in generic resources such as ``gpu:a100:4(S:0-1),lscratch:800G``, by type."""
    found: dict[str, int] = {}
    for resource in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = resource.strip().split(":")
        if name != "gpu":
            continue
        count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
        kind = ":".join(part for part in rest if part != "no_consume")
        found[kind] = found.get(kind, 0) + count
    return found


def accounts_of(user: str) -> list[tuple[str, str]]:
    """List the accounts of a user, each with the partition it is good for; empty stands for all.

    Raises
    ------
    FedamoleError
        See :func:`call`; also if the cluster keeps no accounts.
    """
    lines = call(
        "sacctmgr",
        "--noheader",
        "--parsable2",
        "show",
        "assoc",
        f"user={user}",
        "format=account,partition",
    ).splitlines()
    pairs = (line.split("|") for line in lines if line.strip())
    return [(account, partition) for account, partition, *_ in pairs]


def try_submission(options: Sequence[str]) -> tuple[bool, str]:
    """Ask SLURM whether it would take a job, without submitting it.

    Returns
    -------
    tuple
        Whether it would, and its own words.

    Raises
    ------
    FedamoleError
        If sbatch is missing or does not answer.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *options, "--wrap=true"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise FedamoleError("sbatch: is not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise FedamoleError(f"sbatch: SLURM did not answer within {TIMEOUT_S} s") from error
    words = (done.stderr + done.stdout).strip().splitlines()
    return done.returncode == 0, "; ".join(line.removeprefix("sbatch: ") for line in words)
