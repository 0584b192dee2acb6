"""The command that looks at cluster and study before anything runs."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from fedamole.cli.study import read_config
from fedamole.config import Config
from fedamole.errors import FedamoleError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor", help="check cluster, profile and study for what would fail later"
    )
    parser.add_argument(
        "--configfile", type=Path, metavar="FILE", help="the study; without it only the site"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="Snakemake profile (default: ./slurm)"
    )
    parser.add_argument(
        "--from-node", action="store_true", help="also look from a node, by a small job"
    )
    parser.set_defaults(command=run_doctor)


def run_doctor(args: argparse.Namespace) -> None:
    """Print a line for each finding; exit with 1 if one is an error."""
    # Here, because the commands of the jobs need none of it.
    from fedamole.doctor import examine
    from fedamole.doctor.findings import error
    from fedamole.doctor.profile import find_profile

    profile = find_profile(args.profile)
    config, lines = _study(args.configfile)
    mistakes = [error("config", line, "correct the file") for line in lines]
    levels: Counter[str] = Counter()
    for findings in (mistakes, examine(profile, config, args.from_node)):
        for finding in findings:
            print(finding, flush=True)
            levels[finding.level] += 1
    print(f"{levels['error']} errors, {levels['warning']} warnings")
    sys.stdout.flush()
    if levels["error"]:
        sys.exit(1)


def _study(path: Path | None) -> tuple[Config | None, list[str]]:
    """Read the config, or what is wrong with it, a line for each mistake.

    Raises
    ------
    FedamoleError
        If there is no such file.
    """
    if path is None:
        return None, []
    if not path.is_file():
        raise FedamoleError(f"--configfile {path}: is no file")
    try:
        return read_config(path), []
    except FedamoleError as mistakes:
        return None, str(mistakes).splitlines()
