"""HDF5 files of pools, uploads, assignments, kept states: whole or absent, equal bytes if equal.

Layout (``fedamole pool show FILE`` and ``h5ls -r FILE`` print it)::

    /                                  attributes ``header`` and ``facts``, both JSON
    /groups/<group>/experts/<tensor>   (M, E, ...) in a pool, (N, ...) in an upload
    /groups/<group>/shared/<tensor>    (M, ...)
    /groups/<group>/server/<tensor>    (M, ...) in a pool, what the server keeps for itself
    /groups/<group>/module, expert     which rows an upload holds, with tokens and embeddings
    /provenance/<name>                 a trained pool; the names of pools.Provenance
    /holders, /scores, /objective      an assignment
    /groups/<group>/<tensor>           what a client keeps for itself

No compression, no pickle, no time stamps.
"""

# M = modules, E = domain experts of one module, K = clients, R = rank, N = rows a client holds
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np

from fedamole.artifacts import Header
from fedamole.errors import FedamoleError
from fedamole.hdf5 import (
    datasets,
    opened,
    read_array,
    read_arrays,
    read_rows,
    write_array,
    write_arrays,
    write_part,
    writing,
)
from fedamole.pool_parts import Part, by_module, joined, rows_of
from fedamole.pools import (
    Assignment,
    ClientGroup,
    ClientState,
    KeptState,
    Pool,
    PoolGroup,
    Provenance,
    Upload,
    held_rows,
)

GroupT = TypeVar("GroupT", PoolGroup, ClientGroup)
# The tensors of a group; a client has none that are the server's.
KINDS = ("experts", "shared", "server")


def write_pool(path: Path, header: Header, pool: Pool) -> None:
    """Write a pool."""
    write_parts(path, header, _modules(pool.groups), [pool])


def write_parts(
    path: Path, header: Header, modules: Mapping[str, Sequence[str]], parts: Iterable[Pool]
) -> None:
    """Write a pool that comes part by part; one is in memory at a time.

    Parameters
    ----------
    path, header
        The file, and what it says of itself.
    modules
        Group -> names of all its modules.
    parts
        One or more: together all modules, in their order.
    """
    rest = iter(parts)
    part: Pool | None = next(rest)
    assert part is not None, "there is at least one part"
    facts = {"modules": modules, "num_experts": part.num_experts, "round": part.round}
    made, written = [], dict.fromkeys(modules, 0)
    with writing(path, header, facts) as file:
        while part is not None:
            _write_tensors(file, part.groups, modules, written)
            made += [part.provenance] if part.provenance else []
            # Otherwise this part is kept while the next one is made.
            part = None
            part = next(rest, None)
        if made:
            provenance = joined(made)
            for name in sorted(_provenance_arrays()):
                write_array(file, f"provenance/{name}", getattr(provenance, name))


def _write_tensors(
    file: h5py.File,
    groups: Mapping[str, PoolGroup],
    modules: Mapping[str, Sequence[str]],
    written: dict[str, int],
) -> None:
    """Write the tensors of some modules behind those that are written, which are counted on."""
    arrays = _group_arrays(groups)
    for path in sorted(arrays):
        name = path.split("/")[1]
        write_part(file, path, arrays[path], written[name], len(modules[name]))
    for name, group in groups.items():
        written[name] += len(group.modules)


def read_sizes(
    path: Path, digest: str | None = None
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Read what a pool holds, not its tensors: names, and bytes of one module, by group.

    See :func:`read_pool` for parameters and errors.
    """
    with opened(path, "pool", digest) as (file, facts):
        modules: dict[str, list[str]] = facts["modules"]
        sizes = {
            name: sum(
                dataset.nbytes // max(1, len(names))
                for part in KINDS
                for dataset in datasets(file, f"groups/{name}/{part}").values()
            )
            for name, names in modules.items()
        }
        return modules, sizes


def read_pool(path: Path, digest: str | None = None, part: Part | None = None) -> Pool:
    """Read a pool.

    Parameters
    ----------
    path
        The file.
    digest
        Digest of the stage settings it must have been written with; None accepts all.
    part
        Which modules to read; None reads all.

    Raises
    ------
    FedamoleError
        If it is missing, broken, foreign, of another kind, or of another config.
    """
    with opened(path, "pool", digest) as (file, facts):
        names = facts["modules"]
        groups = {
            name: PoolGroup(
                tuple(names[name][rows]),
                **{kind: read_arrays(file, f"groups/{name}/{kind}", rows) for kind in KINDS},
            )
            for name, rows in _wanted(names, part).items()
        }
        provenance = _read_provenance(file, facts["round"], rows_of(names, _wanted(names, part)))
        return Pool(groups, facts["num_experts"], provenance)


def read_origin(path: Path, digest: str | None = None) -> Pool:
    """Read a pool without its tensors: names and provenance. See :func:`read_pool`."""
    with opened(path, "pool", digest) as (file, facts):
        groups = {name: PoolGroup(tuple(n), {}, {}) for name, n in facts["modules"].items()}
        return Pool(groups, facts["num_experts"], _read_provenance(file, facts["round"]))


def read_client_state(
    path: Path, assignment: Assignment | None, client: int, digest: str | None = None
) -> ClientState:
    """Read what one client holds out of a pool file; the other experts are not touched.

    Parameters
    ----------
    path
        The pool file.
    assignment
        Who holds what; None for a pool without domain experts: all clients hold the same.
    client
        Index of the client.
    digest
        As in :func:`read_pool`.

    Raises
    ------
    FedamoleError
        As :func:`read_pool`, and as :func:`fedamole.pools.held_rows` for an assignment that does
        not fit.
    """
    with opened(path, "pool", digest) as (file, facts):
        if assignment is None and facts["num_experts"]:
            raise FedamoleError(f"{path}: has domain experts; to read it needs an assignment")
        modules = {name: tuple(names) for name, names in facts["modules"].items()}
        empty = {name: PoolGroup(names, {}, {}) for name, names in modules.items()}
        rows = held_rows(assignment, empty, client) if assignment else {}
        groups = {}
        for name in modules:
            module_N, expert_N = rows.get(name, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
            experts = {
                key: read_rows(dataset, module_N, expert_N)
                for key, dataset in datasets(file, f"groups/{name}/experts").items()
            }
            shared = read_arrays(file, f"groups/{name}/shared")
            groups[name] = ClientGroup(modules[name], experts, module_N, expert_N, shared)
        return ClientState(groups)


def write_upload(path: Path, header: Header, upload: Upload) -> None:
    """Write what a client sends."""
    groups = upload.state.groups
    arrays = _group_arrays(groups)
    for name, group in groups.items():
        arrays[f"groups/{name}/module"] = group.module_N
        arrays[f"groups/{name}/expert"] = group.expert_N
    for what in ("expert_embeddings", "tokens"):
        for name, array in getattr(upload, what).items():
            arrays[f"groups/{name}/{what}"] = array
    arrays["client_embeddings"] = upload.client_embeddings_MR
    facts = {key: getattr(upload, key) for key in ("client", "round", "num_examples")}
    write_arrays(path, header, facts | {"modules": _modules(groups)}, arrays)


def read_upload(path: Path, digest: str | None = None, part: Part | None = None) -> Upload:
    """Read what a client sent; see :func:`read_pool` for parameters and errors."""
    with opened(path, "upload", digest) as (file, facts):
        names = facts["modules"]
        wanted = _wanted(names, part)
        rows = {name: _rows_of_modules(file, name, modules) for name, modules in wanted.items()}
        groups = {
            name: ClientGroup(
                modules=tuple(names[name][modules]),
                module_N=read_array(file[f"groups/{name}/module"], rows[name]) - modules.start,
                expert_N=read_array(file[f"groups/{name}/expert"], rows[name]),
                experts=read_arrays(file, f"groups/{name}/experts", rows[name]),
                shared=read_arrays(file, f"groups/{name}/shared", modules),
            )
            for name, modules in wanted.items()
        }
        embeddings_MR = read_array(file["client_embeddings"])
        if part is not None and embeddings_MR.size:
            embeddings_MR = embeddings_MR[rows_of(names, wanted)]
        return Upload(
            state=ClientState(groups),
            client_embeddings_MR=embeddings_MR,
            expert_embeddings=_by_group(file, rows, "expert_embeddings"),
            tokens=_by_group(file, rows, "tokens"),
            **{key: facts[key] for key in ("client", "round", "num_examples")},
        )


def _wanted(modules: Mapping[str, Sequence[str]], part: Part | None) -> dict[str, slice]:
    """Find the modules of a part that a file has; all by default."""
    every = {name: slice(0, len(names)) for name, names in modules.items()}
    return every if part is None else {name: part[name] for name in every if name in part}


def _rows_of_modules(file: h5py.File, name: str, modules: slice) -> slice:
    """Find the expert rows of some modules of a group; they are sorted by module."""
    module_N = read_array(file[f"groups/{name}/module"])
    start, stop = np.searchsorted(module_N, [modules.start, modules.stop]).tolist()
    return slice(start, stop)


def write_assignment(path: Path, header: Header, assignment: Assignment) -> None:
    """Write who holds what."""
    facts = {key: getattr(assignment, key) for key in ("modules", "solver", "round")}
    arrays = {
        "holders": assignment.holders_MEK,
        "scores": assignment.scores_MEK,
        "objective": assignment.objective_M,
    }
    write_arrays(path, header, facts, arrays)


def read_assignment(path: Path, digest: str | None = None) -> Assignment:
    """Read who holds what; see :func:`read_pool` for parameters and errors."""
    with opened(path, "assignment", digest) as (file, facts):
        return Assignment(
            modules=tuple(facts["modules"]),
            holders_MEK=read_array(file["holders"]),
            scores_MEK=read_array(file["scores"]),
            objective_M=read_array(file["objective"]),
            solver=facts["solver"],
            round=facts["round"],
        )


def write_dropout(path: Path, header: Header, client: int, round_: int, reason: str) -> None:
    """Write, in place of an upload, that a client dropped out of a round."""
    write_arrays(path, header, {"client": client, "round": round_, "reason": reason}, {})


def read_dropout(path: Path, digest: str | None = None) -> str | None:
    """Read why a client dropped out; None if the file is an upload. Errors as :func:`read_pool`."""
    if read_header(path).kind != "dropout":
        return None
    with opened(path, "dropout", digest) as (_, facts):
        return str(facts["reason"])


def write_kept(path: Path, header: Header, kept: KeptState) -> None:
    """Write what a client keeps for itself."""
    arrays = {
        f"groups/{name}/{key}": value
        for name, tensors in kept.groups.items()
        for key, value in tensors.items()
    }
    facts = {key: getattr(kept, key) for key in ("client", "round", "numbers")}
    write_arrays(path, header, facts | {"groups": list(kept.groups)}, arrays)


def read_kept(path: Path, digest: str | None = None) -> KeptState:
    """Read what a client has kept; see :func:`read_pool` for parameters and errors."""
    with opened(path, "kept", digest) as (file, facts):
        return KeptState(
            groups={name: read_arrays(file, f"groups/{name}") for name in facts["groups"]},
            **{key: facts[key] for key in ("client", "round", "numbers")},
        )


def read_owner(path: Path, digest: str | None = None) -> int:
    """Read which client keeps a state; its tensors are not touched. Errors as :func:`read_pool`."""
    with opened(path, "kept", digest) as (_, facts):
        return int(facts["client"])


def read_header(path: Path) -> Header:
    """Read what a file says of itself; errors as :func:`read_pool`."""
    with opened(path, None, None) as (file, _):
        return Header.from_mapping(json.loads(file.attrs["header"]), path)


def _modules(groups: Mapping[str, GroupT]) -> dict[str, list[str]]:
    return {name: list(group.modules) for name, group in groups.items()}


def _group_arrays(groups: Mapping[str, GroupT]) -> dict[str, np.ndarray]:
    """Collect the tensors of all groups by their path in the file."""
    return {
        f"groups/{name}/{kind}/{key}": tensor
        for name, group in groups.items()
        for kind in KINDS
        for key, tensor in getattr(group, kind, {}).items()
    }


def _by_group(file: h5py.File, rows: Mapping[str, slice], what: str) -> dict[str, np.ndarray]:
    """Read rows of an array of each group that has it."""
    paths = {name: f"groups/{name}/{what}" for name in rows}
    return {name: read_array(file[at], rows[name]) for name, at in paths.items() if at in file}


def _provenance_arrays() -> list[str]:
    return [field.name for field in fields(Provenance) if field.name != "round"]


def _read_provenance(file: h5py.File, round_: int, rows: slice | None = None) -> Provenance | None:
    """Read where a pool comes from, of some of all modules."""
    if "provenance" not in file:
        return None
    arrays = {
        name: read_array(file[f"provenance/{name}"], rows if name in by_module() else None)
        for name in _provenance_arrays()
    }
    return Provenance(round=round_, **arrays)
