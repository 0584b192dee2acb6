"""The commands that send Snakemake itself to the cluster, and that call a study off."""

import argparse
import re
from pathlib import Path

from fedamole.cli.study import default_config, read_config
from fedamole.config import Config
from fedamole.errors import FedamoleError
from fedamole.planning.memory import job_memory_mb
from fedamole.planning.model_size import model_size
from fedamole.snakemake_profile import DEFAULT, Profile, profile_file, read_profile

DAY_MIN = 24 * 60
HEAD_MB = 4000


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    submit = subparsers.add_parser(
        "submit",
        allow_abbrev=False,
        help="run Snakemake as a SLURM job that outlives your login",
        usage="fedamole submit [--head-...] [arguments of snakemake]",
        description="All other arguments are Snakemake's. Without --profile, `slurm` is taken.",
    )
    add = submit.add_argument
    add("--head-minutes", type=int, help="then it goes back into the queue (a day, or max_runtime)")
    add("--head-mem-mb", type=int, help="memory (4000, more while the model is to be prepared)")
    add("--head-partition", help="default: that of the profile")
    add("--head-account", help="default: that of the profile")
    add("--head-qos")
    add("--head-constraint")
    add("--head-takes-over", action="store_true", help="a Snakemake on another host is gone")
    submit.set_defaults(command=run_submit, passes_on=True)
    cancel = subparsers.add_parser("cancel", help="end the head of a study and all its jobs")
    cancel.add_argument(
        "--configfile", type=Path, metavar="FILE", help="config of the study (configs/demo.yaml)"
    )
    cancel.set_defaults(command=run_cancel)


def run_submit(args: argparse.Namespace) -> None:
    """Check the config here and now, then send the head."""
    from fedamole import head

    rest = list(args.passed_on)
    _check_arguments(rest)
    config = _config(rest)
    results = Path(config.results)
    if _option(rest, "--profile") is None:
        rest = ["--profile", str(DEFAULT), *rest]
    profile = _profile(Path(_option(rest, "--profile") or DEFAULT))
    resources = head.Resources(
        minutes=args.head_minutes or min(DAY_MIN, profile.number("max_runtime") or DAY_MIN),
        mem_mb=args.head_mem_mb or _head_memory(config),
        partition=args.head_partition or profile.text("slurm_partition"),
        account=args.head_account or profile.text("slurm_account"),
        qos=args.head_qos or profile.text("qos"),
        constraint=args.head_constraint,
    )
    number = head.submit(rest, Path.cwd(), results, resources, args.head_takes_over)
    same = " ".join(_study_options(rest))
    print(
        f"head job {number} runs: snakemake {' '.join(rest)}\n"
        f"log     {results}/logs/head/{number}_0_log.out\n"
        f"status  fedamole status {same}\n"
        f"end it  fedamole cancel {same}"
    )


def run_cancel(args: argparse.Namespace) -> None:
    """Cancel the head first, so that it submits nothing more, then its jobs."""
    from fedamole import head

    config = read_config(args.configfile or default_config())
    numbers = head.cancel_study(Path(config.results))
    listed = ", ".join(map(str, numbers))
    print(f"cancelled: {listed}" if numbers else f"{config.results}: no jobs in the queue")


def _check_arguments(arguments: list[str]) -> None:
    """Refuse what a head cannot do.

    Raises
    ------
    FedamoleError
        For a dry run, another folder, or several sources of the study.
    """
    dry = ("--dry-run", "--dryrun")
    if any(word in dry or re.fullmatch(r"-[a-zA-Z]*n[a-zA-Z]*", word) for word in arguments):
        raise FedamoleError("submit: a dry run needs no job; run: snakemake --profile slurm -n ...")
    if found := [word for word in arguments if word.split("=")[0] in ("-d", "--directory")]:
        raise FedamoleError(f"submit: {found[0]} is not allowed; call it from that folder instead")
    if _values(arguments, "--config", "-C") or len(_configfiles(arguments)) > 1:
        raise FedamoleError(
            "submit: one --configfile and no --config are allowed: status and cancel must find the "
            "same study"
        )


def _profile(given: Path) -> Profile:
    """Read the profile; without one the head would fail in the queue.

    Raises
    ------
    FedamoleError
        If it does not exist or was not edited yet.
    """
    path = profile_file(given)
    assert path is not None, "profile_file refuses a given one that does not exist"
    profile = read_profile(path)
    for name, value in profile.resources.items():
        if "CHANGE_ME" in str(value):
            raise FedamoleError(
                f"{path}: default-resources: {name} is CHANGE_ME; set it to that of your cluster, "
                "then let `fedamole doctor` check it"
            )
    return profile


def _head_memory(config: Config) -> int:
    """Memory of the head in MB: its light rules convert the backbone if it is not there yet."""
    prepared = Path(config.results) / "backbones" / config.backbone.name
    if (prepared / "backbone.json").is_file():
        return HEAD_MB
    return max(HEAD_MB, job_memory_mb(config, model_size(config.backbone, prepared)))


def _study_options(arguments: list[str]) -> list[str]:
    """Options by which status and cancel find the study."""
    return ["--configfile", str(_configfiles(arguments)[0])]


def _config(arguments: list[str]) -> Config:
    """Read and check the config that Snakemake will see.

    Raises
    ------
    FedamoleError
        See :func:`fedamole.config.load_config`.
    """
    return read_config(_configfiles(arguments)[0])


def _configfiles(arguments: list[str]) -> list[Path]:
    """Config files among the arguments of Snakemake."""
    given = _values(arguments, "--configfile", "--configfiles")
    return [Path(name) for name in given] or [default_config()]


def _values(arguments: list[str], *names: str) -> list[str]:
    """Values of an option that takes several: all words up to the next option."""
    found: list[str] = []
    inside = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if name in names and equals:
            found, inside = [value], False
        elif word in names:
            found, inside = [], True
        elif word.startswith("-"):
            inside = False
        elif inside:
            found.append(word)
    return found


def _option(arguments: list[str], name: str) -> str | None:
    """Value of an option that takes one."""
    return next(iter(_values(arguments, name)), None)
