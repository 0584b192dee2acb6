"""The cluster: SLURM's commands, its partitions, the user's account."""

import getpass
import os
import re
import shutil
from collections.abc import Iterator
from functools import cached_property

from fedamole import slurm, slurm_site
from fedamole.doctor.findings import Finding, error, ok, warning
from fedamole.errors import FedamoleError
from fedamole.snakemake_profile import Profile

COMMANDS = ("sbatch", "squeue", "scancel", "srun", "scontrol", "sinfo")
# What Snakemake's plugin waits before it first asks, unless the profile says otherwise.
FIRST_POLL_S = 40


class Site:
    """The part of a cluster that the jobs of a profile go to; SLURM is asked once.

    Parameters
    ----------
    profile
        Says which partitions.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @cached_property
    def partitions(self) -> list[slurm_site.Partition]:
        """All partitions of the cluster."""
        return slurm_site.partitions()

    @cached_property
    def chosen(self) -> list[slurm_site.Partition]:
        """Partitions that jobs may go to; none if the profile names none that exists."""
        names = self.profile.partitions
        return [
            partition
            for partition in self.partitions
            if (partition.name in names if names else partition.is_default)
        ]

    @cached_property
    def nodes(self) -> list[slurm_site.Node]:
        """Nodes of the chosen partitions."""
        return slurm_site.nodes_of([partition.name for partition in self.chosen])

    @property
    def usable(self) -> list[slurm_site.Node]:
        """Nodes that can start jobs, now or later."""
        return [node for node in self.nodes if node.is_usable]

    @property
    def name(self) -> str:
        """Chosen partitions, for messages."""
        return ",".join(partition.name for partition in self.chosen)


def commands() -> Iterator[Finding]:
    """Check that SLURM's commands are here and that its controller answers."""
    versions = {name: _version(name) for name in COMMANDS}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        advice = "run this on a host that submits jobs, or load SLURM's module"
        yield error("SLURM", f"{', '.join(missing)}: not on the PATH, or broken", advice)
    else:
        found = ", ".join(sorted({version for version in versions.values() if version}))
        yield ok("SLURM", f"{' '.join(COMMANDS)}: {found}")
    if "squeue" not in missing:
        yield _controller()


def _version(command: str) -> str | None:
    """Version of a command; None if it does not run."""
    try:
        return slurm.call(command, "--version").strip()
    except FedamoleError:
        return None


def _controller() -> Finding:
    """Check that the controller answers."""
    try:
        lines = slurm.call("squeue", "--noheader", "--user", str(os.getuid())).splitlines()
    except FedamoleError as problem:
        return error("squeue", f"does not answer ({problem})", "wait, or ask the site's support")
    return ok("squeue", f"answers, {len(lines)} jobs of yours")


def sacct() -> Finding:
    """Check that accounting answers; only reports of used resources need it."""
    try:
        slurm.call("sacct", "--noheader", "--allocations")
    except FedamoleError as problem:
        return warning("sacct", f"does not answer ({problem})", "only reports of used time need it")
    return ok("sacct", "answers")


def status(profile: Profile) -> Finding:
    """Check that Snakemake can follow its jobs by squeue.

    Its plugin falls back to sacct if finished jobs leave the queue before its third look; and with
    sacct it waits forever for a job that was cancelled.
    """
    what = "status by squeue"
    first = profile.option("slurm-init-seconds-before-status-checks", FIRST_POLL_S)
    age = slurm_site.setting("MinJobAge")
    match = re.match(r"(\d+)\s*(h)?", age or "")
    if not match:
        return warning(what, f"MinJobAge {age} is not understood", "it has to be 3 polls or longer")
    seconds = int(match[1]) * (3600 if match[2] else 1)
    value = f"MinJobAge {seconds} s, first look after {first} s"
    if seconds >= 3 * first:
        return ok(what, value)
    advice = f"slurm-init-seconds-before-status-checks must be at most {seconds // 3}"
    if shutil.which("sacct"):
        return error(what, f"{value}: the plugin would fall back to sacct", advice)
    return warning(what, f"{value}: jobs may vanish unseen", advice)


def partitions(site: Site) -> Iterator[Finding]:
    """Check that the partitions exist and take jobs."""
    everything = ", ".join(partition.name for partition in site.partitions)
    known = {partition.name for partition in site.partitions}
    for name in site.profile.partitions:
        if name not in known:
            yield error("slurm_partition", f"{name} does not exist", f"allowed: {everything}")
    if not site.profile.partitions:
        yield _default_partition(site, everything)
    for partition in site.chosen:
        yield _partition(site, partition)


def _default_partition(site: Site, everything: str) -> Finding:
    """Check that jobs may name no partition."""
    what, advice = "slurm_partition", f"write one of {everything} into {site.profile.path}"
    if site.chosen:
        return warning(what, f"not set; jobs go to SLURM's default {site.name}", advice)
    return error(what, "not set, and SLURM has no default", advice)


def _partition(site: Site, partition: slurm_site.Partition) -> Finding:
    """Check that a partition takes jobs."""
    what, advice = "slurm_partition", "wait, choose another partition, or ask the site's support"
    if partition.state != "UP":
        return error(what, f"{partition.name} is {partition.state}", advice)
    usable, total = len(site.usable), len(site.nodes)
    if not usable:
        return error(what, f"{partition.name}: none of its {total} nodes is up", advice)
    limit = partition.max_minutes
    time = f"at most {limit} min a job" if limit else "no time limit"
    return ok(what, f"{partition.name}: up, {usable} of {total} nodes, {time}")


def accounts(site: Site) -> Iterator[Finding]:
    """Check that the accounts exist for this user and may use the partitions."""
    what, user = "slurm_account", getpass.getuser()
    names = re.split(r"[,\s]+", site.profile.text("slurm_account") or "")
    if not any(names) and site.profile.options.get("slurm-no-account") is True:
        yield ok(what, "none, as slurm-no-account says")
        return
    try:
        rows = slurm_site.accounts_of(user)
    except FedamoleError as problem:
        yield warning(what, f"{', '.join(names)} cannot be checked ({problem})")
        return
    mine = ", ".join(sorted({row[0] for row in rows}))
    if not any(names):
        advice = f"write one of yours ({mine or 'none known'}) into {site.profile.path}"
        yield warning(what, "not set; the plugin guesses from your last job", advice)
    elif not rows:
        yield warning(what, f"{', '.join(names)} cannot be checked (SLURM knows none of {user})")
    else:
        yield from (_account(site, name, rows, mine) for name in names if name)


def _account(site: Site, name: str, rows: list[tuple[str, str]], mine: str) -> Finding:
    """Check an account against those of the user and of the partitions."""
    what = "slurm_account"
    good_for = {partition for account, partition in rows if account.lower() == name.lower()}
    if not good_for:
        return error(what, f"{name} is no account of {getpass.getuser()}", f"allowed: {mine}")
    for partition in site.chosen:
        allowed = partition.accounts
        if allowed is not None and name not in allowed:
            advice = f"allowed there: {', '.join(sorted(allowed))}"
            return error(what, f"{name} may not use partition {partition.name}", advice)
        if not good_for & {"", partition.name}:
            advice = f"it is good for {', '.join(sorted(good_for))}"
            return error(what, f"{name} is not good for partition {partition.name}", advice)
    return ok(what, name)
