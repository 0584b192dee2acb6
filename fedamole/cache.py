"""The cache of a study: metrics files that its tables are redrawn from, without model or data.

Light (no torch, no SciPy): the Snakefile checks a cache while it is parsed.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedamole.config import Config
from fedamole.errors import FedamoleError
from fedamole.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    check_bytes,
    checked,
    content_of,
    costs_name,
    metrics_name,
    read_manifest,
)
from fedamole.registry import lookup
from fedamole.results import asks_for_costs, expected
from fedamole.stages import (
    ResultsStage,
    Versions,
    client_stage,
    digest,
    results_stage,
    versions_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """A cache that was found to be that of a study.

    Attributes
    ----------
    metrics
        The metrics files, in the order of the tables.
    costs
        The files of costs, in the same order, where the study shows them.
    settings
        The settings to draw tables and figures with: those of the config, with the digests that
        the files have. They differ from :func:`fedamole.stages.results_stage` for accepted stale
        files only.
    """

    metrics: list[Path]
    costs: list[Path]
    settings: ResultsStage


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
        Take files of other versions of the code, with a warning; their settings must agree all the
        same.

    Raises
    ------
    FedamoleError
        One line for each file that is missing, changed, of other settings or rounds, or stale.
    """
    manifest = read_manifest(folder / MANIFEST)
    settings = results_stage(config)
    paths: list[Path] = []
    problems: list[str] = []
    stale: dict[tuple[str, str], Versions] = {}
    for slug, method in expected(settings):
        name = metrics_name(slug, method)
        paths.append(folder / name)
        try:
            entry = checked(folder / name, content_of(folder / name), manifest.files.get(name))
            if _is_stale(folder / name, entry, config, settings.digests[slug][method]):
                stale[slug, method] = entry.versions
        except FedamoleError as error:
            problems.append(str(error))
    costs, broken = _costs(folder, settings, manifest)
    problems += broken
    changes = {key: _changes(key[1], made_by) for key, made_by in stale.items()}
    if not accept_stale:
        problems += [
            f"{folder / metrics_name(*key)}: is stale, made by other code ({change}); its numbers "
            f"may differ from those of this code"
            for key, change in changes.items()
        ]
    if problems:
        raise FedamoleError("\n".join(problems))
    for change, count in Counter(changes.values()).items():
        logger.warning("%s: %d stale files, made by other code (%s)", folder, count, change)
    return Cache(paths, costs, results_stage(config, stale) if stale else settings)


def _costs(
    folder: Path, settings: ResultsStage, manifest: Manifest
) -> tuple[list[Path], list[str]]:
    """Files of costs that the study shows, and what is wrong with them."""
    paths: list[Path] = []
    problems: list[str] = []
    for slug, method in expected(settings) if asks_for_costs(settings) else ():
        name = costs_name(slug, method)
        paths.append(folder / name)
        try:
            check_bytes(folder / name, content_of(folder / name), manifest.costs.get(name))
        except FedamoleError as error:
            problems.append(str(error))
    return paths, problems


def _is_stale(path: Path, entry: Entry, config: Config, wanted: str) -> bool:
    """Whether a file of the study was made by other code.

    Raises
    ------
    FedamoleError
        If it was made with other settings, whichever code made it, or with other rounds.
    """
    row, stale = lookup(entry.method), entry.digest != wanted
    if stale:
        made = digest(client_stage(config, entry.scenario, row.run, entry.versions))
        if entry.digest != made:
            changes = _changes(entry.method, entry.versions)
            raise FedamoleError(
                f"{path}: was made with other settings (digest {entry.digest[:12]}, the config "
                f"gives {wanted[:12]})" + f", and by other code ({changes})" * bool(changes)
            )
    if row.trains and entry.rounds != config.rounds:
        raise FedamoleError(f"{path}: has {entry.rounds} rounds; the config says {config.rounds}")
    return stale


def _changes(method: str, made_by: Versions) -> str:
    """Stages that have another version now."""
    now = versions_of(lookup(method).run)
    return ", ".join(
        f"stage {stage}: version {version}, now {getattr(now, stage)}"
        for stage, version in made_by
        if version != getattr(now, stage)
    )
