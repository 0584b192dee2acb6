"""The folders that jobs read and write: whether files there behave, and whether nodes see them."""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedamole.config import Config
from fedamole.doctor.findings import Finding, error, ok, warning
from fedamole.planning.model_size import model_size
from fedamole.planning.volumes import disk_of, volumes_of
from fedamole.planning.workload import works_of

# A file system on the network carries one of many names; one in this machine has one of these.
IN_MEMORY = ("tmpfs", "ramfs", "overlay")
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
# Snakemake compares times of files; below this nothing runs twice.
MAX_SKEW_S = 2.0
# What to leave free where the size of a study is not known.
ENOUGH_GB = 10


def working_folder() -> Finding:
    """Check that this is where Snakemake is to be called."""
    here = Path.cwd()
    if not any((here / name).is_file() for name in ("Snakefile", "workflow/Snakefile")):
        return warning("working folder", f"{here} has no Snakefile", "run in the project's folder")
    return ok("working folder", str(here))


def check(folder: Path, nodes: int, config: Config | None = None) -> Iterator[Finding]:
    """Check the results folder.

    Parameters
    ----------
    folder
        The folder; it may not exist yet.
    nodes
        Nodes that have to see it.
    config
        The study, for its need of space.
    """
    try:
        with scratch(folder) as place:
            rename = _rename(place)
            yield rename
            if rename.level != "error":
                yield skew("clock", place)
                yield _kind(folder, nodes)
                yield _space(folder, config)
    except OSError as problem:
        words = f"{folder.absolute()} cannot be written ({problem.strerror}: {problem.filename})"
        yield error("results folder", words, "set results: to a folder that you may write")


def existing(folder: Path) -> Path:
    """Nearest folder above that exists, or the folder itself."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make a new folder in a folder, or where that would be made, and remove it at the end."""
    place = Path(tempfile.mkdtemp(prefix=".fedamole-doctor-", dir=existing(folder)))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _rename(place: Path) -> Finding:
    """Check that a file can replace another, and that files can be linked."""
    what, folder = "results folder", place.parent
    old, new = place / "old", place / "new"
    old.write_text("old")
    new.write_text("new")
    try:
        new.replace(old)
    except OSError as problem:
        value = f"{folder}: no rename over a file ({problem.strerror})"
        return error(what, value, "set results: to another file system")
    try:
        os.link(old, place / "link")
    except OSError as problem:
        value = f"{folder}: writable, no hard links ({problem.strerror})"
        return warning(what, value, "files of finished clients are copied instead")
    return ok(what, f"{folder}: writable, atomic rename, hard links")


def skew(what: str, place: Path) -> Finding:
    """Compare the clock of the file system with that of this machine."""
    path = place / "clock"
    before = time.time()
    path.write_text("now")
    after, there = time.time(), path.stat().st_mtime
    distance = max(before - there, there - after, 0.0)
    if distance > MAX_SKEW_S:
        value = f"{distance:.1f} s between this machine and the file system of {place.parent}"
        return warning(what, value, "jobs may run twice; ask the site's support for NTP")
    return ok(what, f"{distance:.1f} s from the file system's")


def mounts(path: Path, table: str) -> tuple[str, str]:
    """Find the mount point of a path and the type of its file system.

    Parameters
    ----------
    path
        Absolute, without links.
    table
        Content of ``/proc/self/mountinfo``.
    """
    found = ("/", "unknown")
    for line in table.splitlines():
        fields, _, rest = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields.split()[4])
        # Of two on one point the later one hides the other.
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            found = point, rest.split()[0]
    return found


def file_system(folder: Path) -> tuple[str, str]:
    """Mount point and type of the file system that a folder is, or will be, on."""
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return mounts(existing(folder).resolve(), table)


def _kind(folder: Path, nodes: int) -> Finding:
    """Check whether other machines can see a folder, as far as the file system tells."""
    what = "file system"
    point, kind = file_system(folder)
    value = f"{kind} on {point}"
    if nodes > 1 and kind in (*IN_MEMORY, *LOCAL):
        advice = "prove it with --from-node, or set results: to a shared file system"
        return warning(what, f"{value}: compute nodes may not see this", advice)
    return ok(what, value)


def _space(folder: Path, config: Config | None) -> Finding:
    """Compare the free space with what the study writes."""
    what, free = "free space", shutil.disk_usage(existing(folder)).free
    needed = need(config) if config else None
    words = "the study writes"
    if needed is None:
        needed, words = ENOUGH_GB * 1e9, "the size of the model is not known; enough for most is"
    value = f"{free / 1e9:.1f} GB, {words} {needed / 1e9:.3g} GB (a quota is not looked at)"
    if free < needed:
        return warning(what, value, "free some, or set results: to a larger file system")
    return ok(what, value)


def need(config: Config) -> float | None:
    """Bytes that all rounds of a study take; None if the size of the model is not known."""
    size = model_size(config.backbone, Path(config.results) / "backbones" / config.backbone.name)
    if size is None:
        return None
    return sum(
        disk_of(
            point.config,
            volumes_of(point.config, size, point.data, work),
            point.data.seeded_slug(seed),
            work,
        )
        for point in config.points.values()
        for seed in config.seeds
        for work in works_of(config)
    )
