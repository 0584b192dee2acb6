"""The Snakemake profile of a site: where jobs go, and what the site grants them."""

import ast
import builtins
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedamole.doctor.findings import Finding, error, ok, warning
from fedamole.errors import FedamoleError
from fedamole.snakemake_profile import DEFAULT, Profile, profile_file, read_profile

GPU_REQUESTS = ("gpus", "gres", "gpus-per-node")
_PLACEHOLDER = re.compile(r"CHANGE_?ME|FILL_?ME|^<[^<>]+>$|\bTODO\b|\bYOUR_\w+", re.IGNORECASE)
# What Snakemake offers to an expression of a resource, besides Python's own names.
_NAMES = {*dir(builtins), "attempt", "input", "shutil", "system_tmpdir", "threads", "wildcards"}


def find_profile(given: Path | None) -> Profile | Finding:
    """Find and read a profile, as Snakemake does.

    Returns
    -------
    Profile or Finding
        The profile, or why there is none.

    Raises
    ------
    FedamoleError
        If it was asked for by name and does not exist.
    """
    path = profile_file(given)
    if path is None:
        advice = "run in the folder of the Snakefile, or give --profile DIR"
        return error("profile", f"{DEFAULT}/config.yaml does not exist in {Path.cwd()}", advice)
    try:
        return read_profile(path)
    except FedamoleError as problem:
        return error("profile", str(problem), "correct the file")


def check(profile: Profile, slurm_answers: bool) -> Iterator[Finding]:
    """Check what stands in a profile.

    Parameters
    ----------
    profile
        The profile.
    slurm_answers
        Whether SLURM itself will be asked about partition and account.
    """
    asked = ("slurm_partition", "slurm_account") if slurm_answers else ()
    problems = [*_placeholders(profile, asked), *_site_keys(profile), *_expressions(profile)]
    problems += _options(profile)
    if not problems:
        jobs = f"{profile.options.get('jobs')} jobs at once"
        yield ok("profile", f"{profile.path}: {jobs}, {profile.attempts - 1} retries")
    yield from problems


def _placeholders(profile: Profile, asked: Collection[str]) -> Iterator[Finding]:
    """Find values that nobody has filled in; of those that SLURM is asked about it says more."""
    for name, value in _leaves(profile.options):
        if name not in asked and isinstance(value, str) and _PLACEHOLDER.search(value):
            advice = f"write this site's value into {profile.path}"
            yield error("profile", f"{name}: {value} is a placeholder", advice)


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through all values, each with its last name."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, name)
    else:
        yield name, values


def _site_keys(profile: Profile) -> Iterator[Finding]:
    """Check the keys that only fedamole reads."""
    way = profile.text("gpu_request")
    if way not in (None, *GPU_REQUESTS):
        yield error(
            "profile", f"gpu_request: {way} is unknown", f"allowed: {', '.join(GPU_REQUESTS)}"
        )
    for name, unit in (("max_runtime", "minutes"), ("max_mem_mb", "MB")):
        value = profile.text(name)
        if value is not None and not value.isdecimal():
            yield error("profile", f"{name}: {value} is no number", f"write whole {unit}")


def _expressions(profile: Profile) -> Iterator[Finding]:
    """Find names that mean something else to Python: Snakemake evaluates every resource."""
    for name in ("slurm_partition", "slurm_account", "qos", "constraint"):
        value = profile.resources.get(name)
        if isinstance(value, str) and _is_evaluated(value):
            advice = f"write {name}: \"'{value}'\""
            yield error("profile", f"{name}: {value} is a Python expression to Snakemake", advice)


def _is_evaluated(text: str) -> bool:
    """Whether Python gives something else than this text for it.

    An expression with an unknown name, such as ``gpu-long``, stays the text that it is.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    if isinstance(tree.body, ast.Constant):
        # A plain number keeps its digits, unless it is written as 1e5 or 0x1f.
        return not isinstance(tree.body.value, str) and str(tree.body.value) != text
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names <= _NAMES


def _options(profile: Profile) -> Iterator[Finding]:
    """Check Snakemake's own options."""
    options, where = profile.options, f"in {profile.path}"
    if options.get("executor") != "slurm":
        value = f"executor: {options.get('executor')} would run all jobs on this host"
        yield error("profile", value, f"write executor: slurm {where}")
    if not {"jobs", "cores"} & set(options):
        value = "jobs is not set: Snakemake will ask for --jobs"
        yield warning("profile", value, f"write jobs: 100 {where}")
    if profile.attempts < 2:
        value = "retries: none; a job that fails once ends its branch of the study"
        yield warning("profile", value, f"write retries: 2 {where}")
    for name in ("keep-going", "rerun-incomplete"):
        if options.get(name) is not True:
            yield warning("profile", f"{name} is not set", f"write {name}: true {where}")
    command = options.get("slurm-status-command")
    if command != "squeue":
        value = f"slurm-status-command: {command}; with sacct a cancelled job is waited for forever"
        yield error("profile", value, f"write slurm-status-command: squeue {where}")
