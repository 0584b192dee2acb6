"""Pools of experts, what one client holds of them, and who holds what. Torch-free.

Modules of equal shape and role are stacked into one group (all ``q_proj`` layers, say), so that a
pool is a handful of arrays. Expert tensors start with the axes M and E, shared ones (shared expert,
token projection) with M. Files of these are in :mod:`fedamole.pool_files`.
"""

# M = modules = wrapped linear layers, E = domain experts of one module, K = clients, R = rank,
# N = expert rows that a client holds over the modules of one group, sorted by module, then expert
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedamole.errors import FedamoleError

# NumPy has no bfloat16. This dtype holds its bits and survives slicing, stacking and files.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])


@dataclass(frozen=True)
class ModuleShape:
    """Name and size of a linear layer that gets adapters."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, eq=False)
class PoolGroup:
    """The adapters of modules of equal shape.

    Attributes
    ----------
    modules
        Full names, in the order of axis M.
    experts
        Tensor name -> (M, E, ...); empty for a method without domain experts.
    shared
        Tensor name -> (M, ...): what every client gets.
    server
        Tensor name -> (M, ...): what the server keeps for itself, such as a momentum.
    """

    modules: tuple[str, ...]
    experts: dict[str, np.ndarray]
    shared: dict[str, np.ndarray]
    server: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Provenance:
    """Where a trained pool comes from. M runs over all modules, in the order of ``Pool.modules``.

    Attributes
    ----------
    round
        The round that made the pool, from 1.
    tokens_MEK
        int64: tokens that expert e was given at client k; zero where k did not hold it.
    holders_MEK
        bool: the assignment that it was trained under.
    scores_MEK
        float32: the scores behind that assignment.
    objective_M
        float64: sum of the scores of the holders.
    expert_embeddings_MER, client_embeddings_MKR
        float32: what the next assignment is computed from, the last ones of each expert and client;
        R is 0 without domain experts.
    num_examples_K
        int64: training examples of each client when it last took part; 0 if it never did.
    """

    round: int
    tokens_MEK: np.ndarray
    holders_MEK: np.ndarray
    scores_MEK: np.ndarray
    objective_M: np.ndarray
    expert_embeddings_MER: np.ndarray
    client_embeddings_MKR: np.ndarray
    num_examples_K: np.ndarray


@dataclass(frozen=True, eq=False)
class Pool:
    """All experts after a round.

    Attributes
    ----------
    groups
        Group name -> its adapters; empty for a method that trains nothing.
    num_experts
        Domain experts E per module.
    provenance
        None before training (round 0).
    """

    groups: dict[str, PoolGroup]
    num_experts: int
    provenance: Provenance | None

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules, group by group: the axis M of assignments and provenance."""
        return tuple(name for group in self.groups.values() for name in group.modules)

    @property
    def round(self) -> int:
        """The round that made the pool; 0 before training."""
        return self.provenance.round if self.provenance else 0


@dataclass(frozen=True, eq=False)
class ClientGroup:
    """What one client holds of a group.

    Attributes
    ----------
    modules
        All modules of the group.
    experts
        Tensor name -> (N, ...).
    module_N, expert_N
        int64: row n is expert ``expert_N[n]`` of the pool, of module ``modules[module_N[n]]``.
    shared
        Tensor name -> (M, ...).
    """

    modules: tuple[str, ...]
    experts: dict[str, np.ndarray]
    module_N: np.ndarray
    expert_N: np.ndarray
    shared: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class ClientState:
    """All that one client holds, by group."""

    groups: dict[str, ClientGroup]

    @property
    def has_experts(self) -> bool:
        """Whether there are domain experts, not only shared tensors."""
        return any(group.experts for group in self.groups.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules, group by group."""
        return tuple(name for group in self.groups.values() for name in group.modules)


@dataclass(frozen=True, eq=False)
class Upload:
    """What a client sends after local training.

    Attributes
    ----------
    client, round
        Who, and in which round.
    state
        The trained tensors.
    num_examples
        Size of the client's training set.
    client_embeddings_MR
        float32: mean token embedding per module, in the order of ``state.modules``.
    expert_embeddings
        Group -> (N, R) float32, for the rows of ``state``; empty without domain experts.
    tokens
        Group -> (N,) int64: tokens routed to each row; empty without domain experts.
    """

    client: int
    round: int
    state: ClientState
    num_examples: int
    client_embeddings_MR: np.ndarray
    expert_embeddings: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class KeptState:
    """What a client keeps for itself from one round to the next; the server never sees it.

    Attributes
    ----------
    client, round
        Whose, and after which round.
    groups
        Group -> tensor name -> array; axes as in :class:`ClientGroup`.
    numbers
        Single values by name, such as the weight of an ensemble.
    """

    client: int
    round: int
    groups: dict[str, dict[str, np.ndarray]]
    numbers: dict[str, float]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who holds which experts in a round.

    Attributes
    ----------
    modules
        Axis M: ``Pool.modules``.
    holders_MEK
        bool: client k holds expert e.
    scores_MEK
        float32: the scores of RSEA; what a strategy goes by may differ.
    objective_M
        float64: sum of the scores of the holders.
    solver
        What computed it.
    round
        The round that trains with it, from 1.
    """

    modules: tuple[str, ...]
    holders_MEK: np.ndarray
    scores_MEK: np.ndarray
    objective_M: np.ndarray
    solver: str
    round: int


def group_modules(shapes: Sequence[ModuleShape]) -> dict[str, tuple[ModuleShape, ...]]:
    """Collect modules of equal role and shape.

    Parameters
    ----------
    shapes
        Modules in model order, which is kept inside a group.

    Returns
    -------
    dict
        Sorted by group name: the last component of the module names (``q_proj``), followed by
        ``-{in_features}x{out_features}`` where modules of that role differ in shape.
    """
    sizes: dict[str, set[tuple[int, int]]] = {}
    for shape in shapes:
        sizes.setdefault(_role(shape), set()).add((shape.in_features, shape.out_features))
    groups: dict[str, list[ModuleShape]] = {}
    for shape in shapes:
        role = _role(shape)
        size = f"-{shape.in_features}x{shape.out_features}" if len(sizes[role]) > 1 else ""
        groups.setdefault(role + size, []).append(shape)
    return {name: tuple(groups[name]) for name in sorted(groups)}


def _role(shape: ModuleShape) -> str:
    """Last component of a module's name."""
    return shape.name.rpartition(".")[2]


def group_slices(groups: Mapping[str, PoolGroup] | Mapping[str, ClientGroup]) -> dict[str, slice]:
    """Find each group's part of the axis M of all modules."""
    slices, start = {}, 0
    for name, group in groups.items():
        slices[name] = slice(start, start + len(group.modules))
        start += len(group.modules)
    return slices


def held_rows(
    assignment: Assignment,
    groups: Mapping[str, PoolGroup] | Mapping[str, ClientGroup],
    client: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """List the experts that a client holds.

    Parameters
    ----------
    assignment
        Who holds what.
    groups
        Groups of the pool that is assigned.
    client
        Index of the client.

    Returns
    -------
    dict
        Group -> (module_N, expert_N) of :class:`ClientGroup`.

    Raises
    ------
    FedamoleError
        If the assignment is of other modules, or has no such client.
    """
    modules = tuple(name for group in groups.values() for name in group.modules)
    if assignment.modules != modules:
        raise FedamoleError(
            f"the assignment of round {assignment.round} is for {_brief(assignment.modules)}; "
            f"the pool has {_brief(modules)}"
        )
    clients = assignment.holders_MEK.shape[2]
    if not 0 <= client < clients:
        raise FedamoleError(f"client {client} does not exist; allowed: 0 to {clients - 1}")
    held_ME = assignment.holders_MEK[:, :, client]
    parts = {name: held_ME[part].nonzero() for name, part in group_slices(groups).items()}
    return {name: (module_N, expert_N) for name, (module_N, expert_N) in parts.items()}


def _brief(modules: tuple[str, ...]) -> str:
    """Describe a list of modules in a few words."""
    return f"{len(modules)} modules ({modules[0]} ... {modules[-1]})" if modules else "no modules"


def to_float32(values: np.ndarray) -> np.ndarray:
    """Widen values, bfloat16 or any float, to float32 (the same array if it is float32)."""
    if values.dtype != BFLOAT16:
        return values.astype(np.float32, copy=False)
    return (values.view("<u2").astype(np.uint32) << 16).view(np.float32)


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round float32 values to a dtype, bfloat16 or any float: to the nearest, ties to even."""
    if dtype != BFLOAT16:
        return values.astype(dtype, copy=False)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # The carry of rounding would turn a NaN's bits into those of zero or infinity.
    quiet = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
    return quiet.astype("<u2").view(BFLOAT16)
