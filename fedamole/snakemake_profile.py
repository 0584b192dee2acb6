"""The file behind ``snakemake --profile``: options of Snakemake, and what a site grants jobs."""

import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError

DEFAULT = Path("slurm")
# Rules whose jobs run on the cluster; shards add the numbers of their clients to the name.
RULES = ("train_clients", "evaluate_clients")
_FILE = re.compile(r"(?:profile|config)(?:\.v(\d+)\+)?\.yaml")


@dataclass(frozen=True)
class Profile:
    """A profile.

    Attributes
    ----------
    path
        Its file.
    options
        Snakemake's options.
    resources
        What jobs of the cluster get where their rule does not say otherwise.
    """

    path: Path
    options: Mapping[str, Any]
    resources: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        """Give a resource as text, as Snakemake understands it; None if it is not there."""
        value = self.resources.get(name)
        return None if value is None else unquoted(str(value)) or None

    def number(self, name: str) -> int | None:
        """Give a resource as a whole number; None if it is not there.

        Raises
        ------
        FedamoleError
            If it is none.
        """
        text = self.text(name)
        if text is None:
            return None
        if not text.isdecimal():
            raise FedamoleError(f"{self.path}: {name} {text!r} must be a whole number")
        return int(text)

    def option(self, name: str, default: int) -> int:
        """Give an option of Snakemake that is a number."""
        value = str(self.options.get(name, default))
        return int(value) if value.isdecimal() else default

    @property
    def partitions(self) -> list[str]:
        """Names of the partitions that jobs may go to; none stands for SLURM's default."""
        return [name for name in re.split(r"[,\s]+", self.text("slurm_partition") or "") if name]

    @property
    def attempts(self) -> int:
        """How often a job is started at most."""
        return self.option("retries", 0) + 1


def unquoted(value: str) -> str:
    """A resource of a profile without quotes of its own, and with its variables.

    To Snakemake it is an expression of Python, so a name may stand in quotes.
    """
    text = os.path.expandvars(value)
    return text[1:-1] if re.fullmatch(r"'[^']*'|\"[^\"]*\"", text) else text


def profile_file(given: Path | None) -> Path | None:
    """Find the file of a profile as Snakemake does; None if the default one does not exist.

    Raises
    ------
    FedamoleError
        If it was asked for by name and does not exist.
    """
    folder = given or DEFAULT
    path = folder if folder.is_file() else _newest(folder)
    if path is None and given:
        raise FedamoleError(f"--profile {given}: is no file and no folder with a config.yaml")
    return path


def _newest(folder: Path) -> Path | None:
    """Choose the file of a profile: of those for this Snakemake or older, the newest."""
    major = int(importlib.metadata.version("snakemake").split(".")[0])
    found = {path: _FILE.fullmatch(path.name) for path in sorted(folder.glob("*.yaml"))}
    versions = {path: int(match[1] or 0) for path, match in found.items() if match}
    known = [path for path, version in versions.items() if version <= major]
    return max(known, key=lambda path: versions[path], default=None)


def read_profile(path: Path) -> Profile:
    """Read the file of a profile.

    Raises
    ------
    FedamoleError
        If it is no YAML mapping.
    """
    options = read_yaml(path)
    if not isinstance(options, dict):
        raise FedamoleError(f"{path}: holds no options")
    resources = _mapping(options.get("default-resources"))
    for rule, values in _mapping(options.get("set-resources")).items():
        if str(rule).startswith(RULES):
            resources |= _mapping(values)
    return Profile(path, options, resources)


def _mapping(values: Any) -> dict[str, Any]:
    """Values by name; Snakemake also takes a list of ``name=value``."""
    if isinstance(values, list):
        return dict(str(value).split("=", 1) for value in values if "=" in str(value))
    return dict(values) if isinstance(values, dict) else {}
