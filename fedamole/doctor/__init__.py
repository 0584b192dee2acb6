"""A look at cluster and study before anything runs, at what would otherwise fail at 3 a.m.

Every check is a small function that gives findings; :func:`examine` runs them one after the other.
A check that cannot be made is a warning that says why, and none hides another. Torch-free.
"""

from collections.abc import Generator, Iterator
from pathlib import Path

from fedamole.config import Config
from fedamole.doctor import demands, folders, host, node, profile, site, study
from fedamole.doctor.findings import Finding, attempt, warning
from fedamole.doctor.site import Site
from fedamole.snakemake_profile import Profile

__all__ = ["Finding", "examine"]


def examine(
    given: Profile | Finding, config: Config | None, from_node: bool = False
) -> Iterator[Finding]:
    """Run all checks, and give each finding as soon as it is known.

    Parameters
    ----------
    given
        The profile, or why there is none.
    config
        The study; without one only the site is looked at.
    from_node
        Whether a small job looks at the study from a node.

    Yields
    ------
    Finding
        In the order of the checks.
    """
    yield from attempt("packages", host.packages)
    yield from attempt("libraries", lambda: [host.libraries()])
    answers = yield from _watched(attempt("SLURM", site.commands))
    yield from attempt("sacct", lambda: [site.sacct()])
    if isinstance(given, Finding):
        yield given
        here = None
    else:
        yield from attempt("profile", lambda: profile.check(given, answers))
        here = Site(given) if answers else None
    cluster_is_well = yield from _watched(_cluster(here, config))
    study_is_well = yield from _watched(_study(here, config, from_node))
    if from_node and here and cluster_is_well and study_is_well:
        yield from attempt("node", lambda: node.look(here.profile, config))
    elif from_node:
        yield warning("node", "not checked: correct the errors above first")


def _watched(findings: Iterator[Finding]) -> Generator[Finding, None, bool]:
    """Pass findings on, and return whether none is an error."""
    well = True
    for finding in findings:
        well = well and finding.level != "error"
        yield finding
    return well


def _cluster(here: Site | None, config: Config | None) -> Iterator[Finding]:
    """Check what the profile and the jobs ask of SLURM."""
    if here is None:
        yield warning("cluster", "not checked: SLURM and a profile are needed")
        return
    yield from attempt("status by squeue", lambda: [site.status(here.profile)])
    yield from attempt("slurm_partition", lambda: site.partitions(here))
    yield from attempt("slurm_account", lambda: site.accounts(here))
    fits = yield from _watched(attempt("training jobs", lambda: demands.check(here, config)))
    fits = fits and bool(here.chosen)
    yield from attempt("dry submission", lambda: [demands.dry_submission(here, config, not fits)])


def _study(here: Site | None, config: Config | None, from_node: bool) -> Iterator[Finding]:
    """Check the folders, the backbone and the data."""
    yield from attempt("working folder", lambda: [folders.working_folder()])
    if config is None:
        return
    yield from attempt("results folder", lambda: _results(here, config, from_node))
    yield from attempt("backbone", lambda: [study.backbone(config)])
    yield from attempt("data", lambda: study.data(config))


def _results(here: Site | None, config: Config, from_node: bool) -> Iterator[Finding]:
    """Check the results folder."""
    # A look from a node proves what the file system only suggests.
    nodes = len(here.nodes) if here and here.chosen and not from_node else 1
    yield from folders.check(Path(config.results), nodes, config)
