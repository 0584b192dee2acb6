"""The manifest of a folder of metrics files: what each of them is, and where it comes from.

Light (no torch, no SciPy): the Snakefile reads it. It guards against mistakes, not against forgers:
it holds checksums, no signature.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from fedamole import records
from fedamole.artifacts import Header, canonical, parse_record, record_text, replacing
from fedamole.config import parse
from fedamole.costs import read_costs
from fedamole.errors import FedamoleError
from fedamole.machine import Platform
from fedamole.registry import lookup
from fedamole.results import json_line, read_run
from fedamole.settings import Section
from fedamole.settings.section import Slug
from fedamole.stages import ResultsStage, Versions, versions_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
KIND = "manifest"


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


class CostsEntry(Section):
    """What the manifest says of a file of costs."""

    sha256: str
    """SHA-256 of the file."""
    size: int
    """Bytes."""


class Manifest(Section):
    """Where the numbers of a cache come from."""

    files: dict[str, Entry]
    """Path in the folder -> the metrics file."""
    costs: dict[str, CostsEntry] = {}
    """Path in the folder -> the file of costs beside a metrics file."""
    machines: list[Platform]
    """Where the files were first described, in the order of the files; see :func:`describe`."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        for name, entry in self.files.items():
            if name != metrics_name(entry.scenario, entry.method):
                raise ValueError(f"{name!r} is not the place of {entry.method} on {entry.scenario}")
            if entry.machine >= len(self.machines):
                raise ValueError(f"{name!r}: machine {entry.machine} is not in the list")
        beside = {costs_name(entry.scenario, entry.method) for entry in self.files.values()}
        if strange := sorted(set(self.costs) - beside):
            raise ValueError(f"{strange[0]!r} is beside no metrics file")
        return self


def metrics_name(scenario: str, method: str) -> str:
    """Path of a metrics file in its folder."""
    return f"{scenario}/{method}.jsonl"


def costs_name(scenario: str, method: str) -> str:
    """Path of a file of costs in the folder of the metrics."""
    return f"{scenario}/{method}.costs.json"


def check_bytes(path: Path, content: bytes | None, entry: Entry | CostsEntry | None) -> bytes:
    """Compare the bytes of a file with what the manifest says of them, and return them.

    Raises
    ------
    FedamoleError
        If they differ, or one is missing.
    """
    if content is None:
        raise FedamoleError(f"{path}: is missing")
    if entry is None:
        raise FedamoleError(f"{path}: is not in the manifest")
    found = hashlib.sha256(content).hexdigest()
    if (found, len(content)) != (entry.sha256, entry.size):
        raise FedamoleError(
            f"{path}: differs from the manifest (SHA-256 {found[:12]}, {len(content)} bytes; the "
            f"manifest says {entry.sha256[:12]}, {entry.size} bytes)"
        )
    return content


def checked(path: Path, content: bytes | None, entry: Entry | None) -> Entry:
    """Compare a file with what the manifest says of it.

    Parameters
    ----------
    path
        Name for messages.
    content
        What the file holds; None if there is none.
    entry
        What the manifest says; None if nothing.

    Raises
    ------
    FedamoleError
        If they differ, or one is missing.
    """
    content = check_bytes(path, content, entry)
    assert entry is not None
    for name, value in facts_of(content, path):
        if value != getattr(entry, name):
            said = f"{getattr(entry, name)!r}, the file {value!r}"
            raise FedamoleError(f"{path}: the manifest says {name} {said}")
    return entry


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
    machine: Platform,
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
    found: dict[str, _Located] = {}
    problems: list[str] = []
    for path in sorted(paths):
        try:
            entry, where = _entry(folder, path, machine, settings, known)
        except FedamoleError as error:
            problems.append(str(error))
            continue
        found[metrics_name(entry.scenario, entry.method)] = entry, where
    if problems:
        raise FedamoleError("\n".join(problems))
    return _assembled(found, _costs(folder, (entry for entry, _ in found.values())))


def with_others(folder: Path, made: Manifest, old: Manifest) -> Manifest:
    """Add what an older manifest says of other files of a folder, which other studies made.

    A file that is missing or has other bytes by now is left out, with a warning: the study that
    made it describes it again. A file of costs whose metrics are of other settings by now is left
    out as well.

    Parameters
    ----------
    folder
        Where the manifest will lie.
    made
        The manifest of the files that are known; its word counts for them.
    old
        The manifest so far.
    """
    kept = _unchanged(folder, {n: e for n, e in old.files.items() if n not in made.files})
    files = {**_located(old, kept), **_located(made, made.files)}
    beside = {
        costs_name(entry.scenario, entry.method)
        for name, entry in old.files.items()
        if name in files and files[name][0].digest == entry.digest
    }
    others = {name: old.costs[name] for name in old.costs if name in beside - set(made.costs)}
    costs = _unchanged(folder, others)
    return _assembled(files, {**costs, **made.costs}) if kept or costs else made


# What is said of a metrics file, and where it was made.
_Located = tuple[Entry, Platform]


def _located(manifest: Manifest, names: Iterable[str]) -> dict[str, _Located]:
    entries = {name: manifest.files[name] for name in names}
    return {name: (entry, manifest.machines[entry.machine]) for name, entry in entries.items()}


def _assembled(files: Mapping[str, _Located], costs: dict[str, CostsEntry]) -> Manifest:
    """Make a manifest; its machines stand in the order of the files, each once."""
    # The order of paths: by folder, then by name.
    ordered = dict(sorted(files.items(), key=lambda item: item[0].split("/")))
    machines: list[Platform] = []
    for _, machine in ordered.values():
        machines += [machine] if machine not in machines else []
    entries = {
        name: entry.model_copy(update={"machine": machines.index(machine)})
        for name, (entry, machine) in ordered.items()
    }
    return Manifest(files=entries, costs=costs, machines=machines)


_AnyEntry = TypeVar("_AnyEntry", Entry, CostsEntry)


def _unchanged(folder: Path, entries: Mapping[str, _AnyEntry]) -> dict[str, _AnyEntry]:
    """Entries of the files that have their bytes still; the others are said in the log."""
    found: dict[str, _AnyEntry] = {}
    for name, entry in entries.items():
        try:
            check_bytes(folder / name, content_of(folder / name), entry)
            found[name] = entry
        except FedamoleError as error:
            logger.warning("%s; it is left out of the manifest", error)
    return found


def _costs(folder: Path, entries: Iterable[Entry]) -> dict[str, CostsEntry]:
    """Describe the files of costs beside metrics files.

    One of other settings, or a broken one, is left out with a warning: of a study that shows no
    costs nothing renews it.
    """
    found: dict[str, CostsEntry] = {}
    for entry in entries:
        name = costs_name(entry.scenario, entry.method)
        try:
            content = content_of(folder / name)
            if content is None:
                continue
            read_costs(folder / name, entry.digest)
        except FedamoleError as error:
            logger.warning("%s; it is left out of the manifest", error)
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        found[name] = CostsEntry(sha256=sha256, size=len(content))
    return found


def _entry(
    folder: Path, path: Path, machine: Platform, settings: ResultsStage | None, known: Manifest
) -> tuple[Entry, Platform]:
    """Describe one file, whose every line is checked, and say which machine it is of."""
    read_run(path)
    content = path.read_bytes()
    facts = facts_of(content, path)
    name = metrics_name(facts.scenario, facts.method)
    if path.absolute() != (folder / name).absolute():
        raise FedamoleError(
            f"{path}: holds {facts.method} on {facts.scenario}; its place is {folder / name}"
        )
    sha256 = hashlib.sha256(content).hexdigest()
    before = known.files.get(name)
    if before and before.sha256 == sha256:
        versions, machine = before.versions, known.machines[before.machine]
    else:
        versions = _versions_by(settings, facts, path)
    entry = Entry(
        **facts.model_dump(), sha256=sha256, size=len(content), versions=versions, machine=0
    )
    return entry, machine


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
    with replacing(path) as scratch:
        scratch.write_bytes(manifest_text(manifest))


def manifest_text(manifest: Manifest) -> bytes:
    """Give the bytes of a manifest."""
    content = manifest.model_dump(mode="json")
    return record_text(Header(KIND, _own_digest(content)), content).encode()


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
