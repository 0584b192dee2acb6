"""The cache of a study: its metrics files, and a manifest that says where each comes from.

Light (no torch, no SciPy): the Snakefile checks a cache while it is parsed. The manifest guards
against mistakes, not against forgers: it holds checksums, no signature.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fedamole import records
from fedamole.artifacts import Header, canonical, parse_record, write_record
from fedamole.config import Config, parse
from fedamole.errors import FedamoleError
from fedamole.machine import Machine
from fedamole.registry import lookup
from fedamole.results import expected, json_line, read_run
from fedamole.settings import Section
from fedamole.settings.section import Slug
from fedamole.stages import (
    ResultsStage,
    Versions,
    client_stage,
    digest,
    results_stage,
    versions_of,
)

MANIFEST = "manifest.json"
KIND = "manifest"

logger = logging.getLogger(__name__)


class Facts(Section):
    """What a metrics file says of itself."""

    scenario: Slug
    """Slug of the scenario, with the seed."""
    seed: int
    """Root seed."""
    method: Slug
    """Row of the tables."""
    rounds: int
    """Federated rounds; 0 without training. They are in no digest."""
    digest: str
    """Digest of the :class:`fedamole.stages.ClientStage` that it was made with."""
    package: str
    """Version of fedamole that wrote it."""


class Entry(Facts):
    """What the manifest says of a metrics file."""

    sha256: str
    """SHA-256 of the file."""
    size: int
    """Bytes."""
    versions: Versions
    """Versions of the stages that it comes from."""
    machine: int = Field(ge=0)
    """Place in the list of machines."""


class Manifest(Section):
    """Where the numbers of a cache come from."""

    files: dict[str, Entry]
    """Path in the folder -> the file."""
    machines: list[Machine]
    """Where the files were first described, in the order of the files; see :func:`describe`."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        for name, entry in self.files.items():
            if name != metrics_name(entry.scenario, entry.method):
                raise ValueError(f"{name!r} is not the place of {entry.method} on {entry.scenario}")
            if entry.machine >= len(self.machines):
                raise ValueError(f"{name!r}: machine {entry.machine} is not in the list")
        return self


@dataclass(frozen=True)
class Cache:
    """A cache that was found to be that of a study.

    Attributes
    ----------
    metrics
        The metrics files, in the order of the tables.
    settings
        The settings to draw tables and figures with: those of the config, with the digests that
        the files have. They differ from :func:`fedamole.stages.results_stage` for accepted stale
        files only.
    """

    metrics: list[Path]
    settings: ResultsStage


def metrics_name(scenario: str, method: str) -> str:
    """Path of a metrics file in its folder."""
    return f"{scenario}/{method}.jsonl"


def check_cache(folder: Path, config: Config, accept_stale: bool = False) -> Cache:
    """Make sure that a folder holds the metrics of a study, whole and unchanged.

    Files that the study does not ask for may lie beside them.

    Parameters
    ----------
    folder
        Metrics files with their manifest.
    config
        The study.
    accept_stale
        Take files of other versions of the code, with a warning for each; their settings must
        agree all the same.

    Raises
    ------
    FedamoleError
        One line for each file that is missing, changed, of other settings or rounds, or stale.
    """
    manifest = read_manifest(folder / MANIFEST)
    settings = results_stage(config)
    problems: list[str] = []
    stale: dict[tuple[str, str], Versions] = {}
    for key in expected(settings):
        path, entry = folder / metrics_name(*key), manifest.files.get(metrics_name(*key))
        problem = fault(path, content_of(path), entry)
        if problem is None and entry:
            problem = _of_other_study(path, entry, config)
        if problem is None and entry and entry.digest != settings.digests[key[0]][key[1]]:
            stale[key] = entry.versions
        problems += [problem] if problem else []
    warnings = [
        _stale(folder / metrics_name(*key), key[1], versions) for key, versions in stale.items()
    ]
    if lines := problems + [line for line in warnings if not accept_stale]:
        raise FedamoleError("\n".join(lines))
    for line in warnings:
        logger.warning("%s; accepted", line)
    paths = [folder / metrics_name(*key) for key in expected(settings)]
    return Cache(paths, results_stage(config, stale) if stale else settings)


def _of_other_study(path: Path, entry: Entry, config: Config) -> str | None:
    """Say why a file is not of a study, whatever version of the code made it."""
    row = lookup(entry.method)
    made = client_stage(config, entry.scenario, row.run, entry.versions)
    if entry.digest != digest(made):
        wanted = digest(client_stage(config, entry.scenario, row.run))
        return (
            f"{path}: was made with other settings (digest {entry.digest[:12]}, the config gives "
            f"{wanted[:12]})"
        )
    if row.trains and entry.rounds != config.rounds:
        return f"{path}: has {entry.rounds} rounds; the config says {config.rounds}"
    return None


def _stale(path: Path, method: str, made_by: Versions) -> str:
    """Say which versions of the code a stale file comes from."""
    now = versions_of(lookup(method).run)
    differing = [
        f"stage {stage}: version {version}, now {getattr(now, stage)}"
        for stage, version in made_by
        if version != getattr(now, stage)
    ]
    return f"{path}: is stale, made by other code ({'; '.join(differing)}); numbers may differ"


def fault(path: Path, content: bytes | None, entry: Entry | None) -> str | None:
    """Say what is wrong with a file of a cache; None if nothing is.

    Parameters
    ----------
    path
        Name for the message.
    content
        What the file holds; None if there is none.
    entry
        What the manifest says of it; None if nothing.

    Raises
    ------
    FedamoleError
        If it is no metrics file although the manifest says so.
    """
    if content is None:
        return f"{path}: is missing"
    if entry is None:
        return f"{path}: is not in the manifest"
    found = hashlib.sha256(content).hexdigest()
    if (found, len(content)) != (entry.sha256, entry.size):
        return (
            f"{path}: differs from the manifest (SHA-256 {found[:12]}, {len(content)} bytes; the "
            f"manifest says {entry.sha256[:12]}, {entry.size} bytes)"
        )
    facts = facts_of(content, path)
    wrong = [name for name, value in facts if value != getattr(entry, name)]
    if wrong:
        said = f"{getattr(entry, wrong[0])!r}, the file {getattr(facts, wrong[0])!r}"
        return f"{path}: the manifest says {wrong[0]} {said}"
    return None


def facts_of(content: bytes, path: Path) -> Facts:
    """What a metrics file says of itself; its numbers are not looked at.

    Raises
    ------
    FedamoleError
        If it is no metrics file.
    """
    lines = content.decode("utf-8", "replace").splitlines() or [""]
    header = Header.from_mapping(json_line(path, 0, lines[0]).get("header"), path)
    header.check(path, records.KIND, None)
    for number, line in enumerate(lines[1:], 1):
        record = json_line(path, number, line)
        if record.get("record") == "run":
            run = parse(records.RunRecord, record, f"{path}:{number + 1}")
            facts = run.model_dump(include=set(Facts.model_fields))
            facts |= {"digest": header.digest, "package": header.package}
            return parse(Facts, facts, str(path))
    raise FedamoleError(f"{path}: has no run record")


def describe(
    folder: Path,
    paths: Iterable[Path],
    machine: Machine,
    settings: ResultsStage | None = None,
    old: Manifest | None = None,
) -> Manifest:
    """Describe the metrics files of a folder.

    What the old manifest says of versions and machine stays for a file whose bytes are the same.
    Every other file must have been made by this code under the settings; it gets the machine given.

    Parameters
    ----------
    folder
        Where the manifest will lie.
    paths
        Metrics files in the folder.
    machine
        Where this process runs. Metrics files do not say where they were made.
    settings
        Of the tables; None accepts only files of the old manifest.
    old
        The manifest so far, if there is one.

    Raises
    ------
    FedamoleError
        One line for each file that is broken, in a wrong place, or of unknown code.
    """
    known = old or Manifest(files={}, machines=[])
    files: dict[str, Entry] = {}
    machines: list[Machine] = []
    problems: list[str] = []
    for path in sorted(paths):
        try:
            name, facts = _name_in(folder, path), _whole(path)
            entry, where = _entry(path, name, facts, machine, settings, known)
        except FedamoleError as error:
            problems.append(str(error))
            continue
        machines += [where] if where not in machines else []
        files[name] = entry.model_copy(update={"machine": machines.index(where)})
    if problems:
        raise FedamoleError("\n".join(problems))
    return Manifest(files=files, machines=machines)


def _name_in(folder: Path, path: Path) -> str:
    """Path in a folder."""
    try:
        return path.absolute().relative_to(folder.absolute()).as_posix()
    except ValueError as error:
        raise FedamoleError(f"{path}: is not in {folder}, where the manifest is to lie") from error


def _whole(path: Path) -> Facts:
    """Facts of a file whose every line was checked."""
    read_run(path)
    return facts_of(path.read_bytes(), path)


def _entry(
    path: Path,
    name: str,
    facts: Facts,
    machine: Machine,
    settings: ResultsStage | None,
    known: Manifest,
) -> tuple[Entry, Machine]:
    """Describe one file, and say which machine it is of."""
    place = metrics_name(facts.scenario, facts.method)
    if name != place:
        raise FedamoleError(
            f"{path}: holds {facts.method} on {facts.scenario}; its place is {place}"
        )
    content = path.read_bytes()
    sums = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "machine": 0}
    before = known.files.get(name)
    if before and before.sha256 == sums["sha256"]:
        versions, machine = before.versions, known.machines[before.machine]
    else:
        versions = _versions_by(settings, facts, path)
    return Entry(**facts.model_dump(), **sums, versions=versions), machine


def _versions_by(settings: ResultsStage | None, facts: Facts, path: Path) -> Versions:
    """Versions of this code, once the settings show that it made a file."""
    if settings is None:
        raise FedamoleError(
            f"{path}: no manifest knows this file; --configfile says which study it is of"
        )
    wanted = settings.digests.get(facts.scenario, {}).get(facts.method)
    if wanted is None:
        raise FedamoleError(f"{path}: {facts.method} on {facts.scenario} is not in the settings")
    if wanted != facts.digest:
        raise FedamoleError(
            f"{path}: was made with other settings or by other code (digest {facts.digest[:12]}, "
            f"the settings give {wanted[:12]})"
        )
    return versions_of(lookup(facts.method).run)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest; the digest in its header is that of its own content."""
    content = manifest.model_dump(mode="json")
    write_record(path, Header(KIND, _own_digest(content)), content)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises
    ------
    FedamoleError
        If there is none, or it is broken or was changed.
    """
    content = content_of(path)
    if content is None:
        raise FedamoleError(
            f"{path}: there is no manifest; where the study was run, make one: "
            f"fedamole cache manifest {path.parent} --configfile FILE"
        )
    return parse_manifest(content, path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Read a manifest from its bytes; the path is for messages.

    Raises
    ------
    FedamoleError
        If it is broken or was changed.
    """
    header, content = parse_record(text, path, KIND)
    if header.digest != _own_digest(content):
        raise FedamoleError(
            f"{path}: was changed after it was written (its content does not have the digest that "
            f"it names, {header.digest[:12]}); take the original, or delete it and make it anew"
        )
    return parse(Manifest, content, str(path))


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def content_of(path: Path) -> bytes | None:
    """Bytes of a file; None if there is none.

    Raises
    ------
    FedamoleError
        If it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
