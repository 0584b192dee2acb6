"""The commands of the server between two rounds: aggregate and assign."""

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.artifacts import Header, sha256
from fedamole.cli.arguments import add_quorum
from fedamole.config import parse
from fedamole.stages import RunStage, digest, with_quorum

if TYPE_CHECKING:
    from fedamole.pool_parts import Part
    from fedamole.pools import Assignment, Pool, Upload

# Tensors of a pool that are in memory at a time; with the sums and one upload that is half a GB.
PART_BYTES = 2**27

logger = logging.getLogger(__name__)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    aggregate = subparsers.add_parser("aggregate", help="average what the clients uploaded")
    aggregate.add_argument("--settings", required=True, help="JSON of the stage's settings")
    aggregate.add_argument("--pool", type=Path, required=True, help="pool of the round before")
    aggregate.add_argument("--assignment", type=Path, required=True, help="who held what")
    aggregate.add_argument("--uploads", type=Path, nargs="+", required=True, metavar="FILE")
    add_quorum(aggregate)
    aggregate.add_argument("--out-pool", type=Path, required=True, metavar="FILE")
    aggregate.set_defaults(command=run_aggregate)
    assign = subparsers.add_parser("assign", help="choose who holds which experts next")
    assign.add_argument("--settings", required=True, help="JSON of the stage's settings")
    assign.add_argument("--pool", type=Path, required=True, help="pool to hand out")
    assign.add_argument("--out-assignment", type=Path, required=True, metavar="FILE")
    assign.set_defaults(command=run_assign)


def run_aggregate(args: argparse.Namespace) -> None:
    """Average the uploads into the next pool, in the order they are given.

    A file that says that its client dropped out is no upload; the method decides how many it needs.
    """
    from fedamole.pool_files import read_assignment, read_sizes, write_parts
    from fedamole.pool_parts import cut

    settings = parse(RunStage, args.settings, "--settings")
    run_digest = digest(settings)
    modules, sizes = read_sizes(args.pool, run_digest)
    assignment = read_assignment(args.assignment, run_digest)
    label = f"{settings.label} round {assignment.round}"
    reported = [path for path in args.uploads if not _dropped_out(path, run_digest, label)]
    parts = cut({name: len(names) for name, names in modules.items()}, sizes, PART_BYTES)
    current = with_quorum(settings, args.quorum)
    _keep_freed_memory()
    averaged = (
        _average(args.pool, run_digest, current, assignment, reported, part) for part in parts
    )
    parents = {"pool": sha256(args.pool), "assignment": sha256(args.assignment)}
    parents |= {f"upload_{i:04}": sha256(path) for i, path in enumerate(args.uploads)}
    write_parts(args.out_pool, Header("pool", run_digest, parents), modules, averaged)
    logger.info("%s: %d uploads averaged", label, len(reported))


def _average(
    pool: Path,
    run_digest: str,
    current: RunStage,
    assignment: "Assignment",
    uploads: list[Path],
    part: "Part",
) -> "Pool":
    """Average some modules, under the quorum that holds now."""
    from fedamole.methods import load
    from fedamole.pool_files import read_pool
    from fedamole.pool_parts import assignment_of

    previous = read_pool(pool, run_digest, part)
    own = assignment_of(assignment, previous.modules)
    reported = _uploads(uploads, run_digest, part)
    return load(current.run).aggregate(current, previous, own, reported)


def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory for the next upload.

    It does so once a block of almost 32 MiB was freed. Otherwise the system clears the pages of
    every upload anew, which takes as long as reading it.
    """
    import numpy as np

    np.empty(2**25 - 2**16, dtype=np.uint8)


def _dropped_out(path: Path, run_digest: str, label: str) -> bool:
    """Whether a file says that its client dropped out; the log then says it too."""
    from fedamole.pool_files import read_dropout

    reason = read_dropout(path, run_digest)
    if reason is not None:
        warn_of_dropout(label, path, reason)
    return reason is not None


def warn_of_dropout(label: str, path: Path, reason: str) -> None:
    """Log why a client dropped out, and how its file comes to be made anew."""
    again = f"snakemake --forcerun {path} lets it try again"
    logger.warning("%s: %s dropped out: %s (%s)", label, path.stem, reason, again)


def _uploads(paths: list[Path], run_digest: str, part: "Part") -> "Iterator[Upload]":
    """Read one upload after another, so that one is in memory at a time."""
    from fedamole.pool_files import read_upload

    for path in paths:
        yield read_upload(path, run_digest, part)


def run_assign(args: argparse.Namespace) -> None:
    """Choose who holds which experts in the round after that of the pool."""
    from fedamole.methods import load
    from fedamole.pool_files import read_origin, write_assignment

    settings = parse(RunStage, args.settings, "--settings")
    run_digest = digest(settings)
    pool = read_origin(args.pool, run_digest)
    method, began = load(settings.run), time.perf_counter()
    assignment = method.assign(settings, pool, pool.round + 1)
    milliseconds = 1000 * (time.perf_counter() - began)
    header = Header("assignment", run_digest, {"pool": sha256(args.pool)})
    write_assignment(args.out_assignment, header, assignment)
    logger.info(
        "%s round %d: assigned in %.0f ms, objective %.6f",
        settings.label,
        assignment.round,
        milliseconds,
        assignment.objective_M.sum(),
    )
