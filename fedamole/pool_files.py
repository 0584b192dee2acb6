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
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np

from fedamole.artifacts import Header
from fedamole.errors import FedamoleError
from fedamole.hdf5 import datasets, opened, read_array, read_arrays, read_rows, write_arrays
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


def write_pool(path: Path, header: Header, pool: Pool) -> None:
    """Write a pool."""
    arrays = _group_arrays(pool.groups)
    for name, group in pool.groups.items():
        arrays.update({f"groups/{name}/server/{key}": group.server[key] for key in group.server})
    facts = {"modules": _modules(pool.groups), "num_experts": pool.num_experts, "round": pool.round}
    if pool.provenance:
        for name in _provenance_arrays():
            arrays[f"provenance/{name}"] = getattr(pool.provenance, name)
    write_arrays(path, header, facts, arrays)


def read_pool(path: Path, digest: str | None = None) -> Pool:
    """Read a whole pool.

    Parameters
    ----------
    path
        The file.
    digest
        Digest of the stage settings it must have been written with; None accepts all.

    Raises
    ------
    FedamoleError
        If it is missing, broken, foreign, of another kind, or of another config.
    """
    with opened(path, "pool", digest) as (file, facts):
        groups = {
            name: PoolGroup(
                tuple(modules),
                **_tensors(file, name),
                server=read_arrays(file, f"groups/{name}/server"),
            )
            for name, modules in facts["modules"].items()
        }
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


def read_upload(path: Path, digest: str | None = None) -> Upload:
    """Read what a client sent; see :func:`read_pool` for parameters and errors."""
    with opened(path, "upload", digest) as (file, facts):
        names = facts["modules"]
        groups = {
            name: ClientGroup(
                modules=tuple(modules),
                module_N=read_array(file[f"groups/{name}/module"]),
                expert_N=read_array(file[f"groups/{name}/expert"]),
                **_tensors(file, name),
            )
            for name, modules in names.items()
        }
        return Upload(
            state=ClientState(groups),
            client_embeddings_MR=read_array(file["client_embeddings"]),
            expert_embeddings=_by_group(file, names, "expert_embeddings"),
            tokens=_by_group(file, names, "tokens"),
            **{key: facts[key] for key in ("client", "round", "num_examples")},
        )


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
    arrays = {}
    for name, group in groups.items():
        for part, tensors in (("experts", group.experts), ("shared", group.shared)):
            arrays.update({f"groups/{name}/{part}/{key}": tensors[key] for key in tensors})
    return arrays


def _tensors(file: h5py.File, name: str) -> dict[str, dict[str, np.ndarray]]:
    """Read the tensors of a group."""
    return {part: read_arrays(file, f"groups/{name}/{part}") for part in ("experts", "shared")}


def _by_group(file: h5py.File, names: Iterable[str], what: str) -> dict[str, np.ndarray]:
    """Read an array of each group that has it."""
    paths = {name: f"groups/{name}/{what}" for name in names}
    return {name: read_array(file[at]) for name, at in paths.items() if at in file}


def _provenance_arrays() -> list[str]:
    return [field.name for field in fields(Provenance) if field.name != "round"]


def _read_provenance(file: h5py.File, round_: int) -> Provenance | None:
    if "provenance" not in file:
        return None
    arrays = {name: read_array(file[f"provenance/{name}"]) for name in _provenance_arrays()}
    return Provenance(round=round_, **arrays)
