"""A round module by module: a server holds as much of a pool in memory as it likes, and no more.

Modules know nothing of each other between two rounds, so that a mean over clients is the same
whether it runs over all modules at once or over some at a time.
"""

# M = modules, E = domain experts of one module, K = clients
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fedamole.pools import Assignment, Provenance

# Group -> which of its modules; groups that are not named have none of them.
Part = Mapping[str, slice]


def cut(modules: Mapping[str, int], module_bytes: Mapping[str, int], most: int) -> list[Part]:
    """Cut a pool into parts of about equal size.

    Parameters
    ----------
    modules
        Group -> its number of modules, in the order of the pool.
    module_bytes
        Group -> bytes of the tensors of one module.
    most
        Most bytes of a part; one that has a single module may have more.

    Returns
    -------
    list
        The whole pool as one part if it fits; otherwise parts of one group each. At least one.
    """
    if sum(count * module_bytes[name] for name, count in modules.items()) <= most:
        return [{name: slice(0, count) for name, count in modules.items()}]
    parts: list[Part] = []
    for name, count in modules.items():
        pieces = math.ceil(count / max(1, most // max(1, module_bytes[name])))
        edges = [count * i // pieces for i in range(pieces + 1)]
        parts += [{name: slice(*edge)} for edge in pairwise(edges)]
    return parts


def rows_of(groups: Mapping[str, Sequence[str]], part: Part) -> slice:
    """Find a part's modules, which follow each other, on the axis M of all modules.

    Parameters
    ----------
    groups
        Group -> names of its modules, in the order of the pool.
    part
        Some of them.
    """
    starts = dict(zip(groups, accumulate(map(len, groups.values()), initial=0), strict=False))
    rows = [(starts[name] + own.start, starts[name] + own.stop) for name, own in part.items()]
    return (
        slice(min(start for start, _ in rows), max(stop for _, stop in rows)) if rows else slice(0)
    )


def assignment_of(assignment: Assignment, modules: Sequence[str]) -> Assignment:
    """Give the assignment of some modules, as far as it has them; itself if these are all."""
    if assignment.modules == tuple(modules):
        return assignment
    at = {name: row for row, name in enumerate(assignment.modules)}
    rows = [at[name] for name in modules if name in at]
    return replace(
        assignment,
        modules=tuple(assignment.modules[row] for row in rows),
        holders_MEK=assignment.holders_MEK[rows],
        scores_MEK=assignment.scores_MEK[rows],
        objective_M=assignment.objective_M[rows],
    )


def joined(parts: Sequence[Provenance]) -> Provenance:
    """Put the provenance of all parts of a pool together, in their order."""
    if len(parts) == 1:
        return parts[0]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in by_module()
    }
    return replace(parts[0], **arrays)


def by_module() -> list[str]:
    """List the arrays of a provenance whose first axis is M."""
    return [
        field.name for field in fields(Provenance) if field.name.rpartition("_")[2].startswith("M")
    ]
