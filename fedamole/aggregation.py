"""The server's mean over clients, one upload in memory at a time (pure NumPy)."""

# M = modules, E = domain experts of one module, K = clients, R = rank,
# N = expert rows of one upload in one group
from collections.abc import Iterable
from typing import Literal

import numpy as np

from fedamole.errors import FedamoleError
from fedamole.participation import Participation
from fedamole.pools import (
    Assignment,
    Pool,
    PoolGroup,
    Provenance,
    Upload,
    cast,
    group_slices,
    held_rows,
    to_float32,
)

Weighting = Literal["uniform", "examples", "tokens"]

# Weight of a holder that was given no token. Beside one token it vanishes in float32; where no
# holder has any, all weigh the same and the mean is the plain one instead of 0 / 0.
NO_TOKENS = 2.0**-40


def aggregate(
    previous: Pool,
    assignment: Assignment,
    uploads: Iterable[Upload],
    weighting: Weighting,
    population: Participation,
) -> Pool:
    """Average each tensor over the clients that hold it (McMahan et al. 2017, Alg. 1).

    A client without an expert does not pull it towards zero: weights are normalised per expert. An
    expert that nobody holds keeps its previous value. Sums are float32 whatever the dtype of the
    pool, and run in the order of ``uploads``: the same order gives the same bits.

    Parameters
    ----------
    previous
        The pool that the round started from; gives dtypes and shapes.
    assignment
        Who held what in the round.
    uploads
        One for each client; read once, none is kept.
    weighting
        ``uniform``: all clients equal (the paper). ``examples``: by training examples. ``tokens``:
        an expert and its embedding by the tokens that it was given (equal where it got none at any
        holder), shared tensors by training examples.
    population
        Who takes part in the round, and how many of them must report.

    Raises
    ------
    FedamoleError
        If too many uploads are missing, or one is doubled, of another round, of a client that does
        not take part, or does not hold what was assigned.
    """
    _check_round(previous, assignment, population.clients)
    sums = _Sums(previous, assignment, weighting)
    seen: set[int] = set()
    for upload in uploads:
        _check_upload(upload, previous, assignment, seen)
        sums.add(upload)
        seen.add(upload.client)
        # The loop's variable would keep this upload while the next one is read.
        del upload
    check_quorum(seen, population, assignment.round)
    return sums.pool()


def check_quorum(reported: set[int], population: Participation, round_: int) -> None:
    """Refuse a round from which too few clients, or other clients, have reported.

    Raises
    ------
    FedamoleError
        With the clients that are missing, or do not belong there.
    """
    expected = set(population.reporting(round_))
    if strangers := sorted(reported - expected):
        raise FedamoleError(f"round {round_}: clients {strangers} do not take part in it")
    if len(reported) < population.fewest:
        missing = sorted(expected - reported)
        raise FedamoleError(
            f"round {round_}: no upload of clients {missing}; {len(reported)} of "
            f"{population.size} reported, the quorum is {population.fewest}"
        )


class _Sums:
    """Weighted sums over the uploads so far."""

    def __init__(self, previous: Pool, assignment: Assignment, weighting: Weighting) -> None:
        self._previous, self._assignment, self._weighting = previous, assignment, weighting
        self._slices = group_slices(previous.groups)
        self._experts = _zeros({name: g.experts for name, g in previous.groups.items()})
        self._shared = _zeros({name: g.shared for name, g in previous.groups.items()})
        holders_MEK = assignment.holders_MEK
        self._weight_ME = np.zeros(holders_MEK.shape[:2], dtype=np.float64)
        self._weight = 0.0
        self._tokens_MEK = np.zeros(holders_MEK.shape, dtype=np.int64)
        self._num_examples_K = np.zeros(holders_MEK.shape[2], dtype=np.int64)
        # The rank of the embeddings is known with the first upload only.
        self._expert_MER: np.ndarray | None = None
        self._client_MKR: np.ndarray | None = None

    def add(self, upload: Upload) -> None:
        """Add one client."""
        shared_weight = 1.0 if self._weighting == "uniform" else float(upload.num_examples)
        self._weight += shared_weight
        self._num_examples_K[upload.client] = upload.num_examples
        self._add_client_embeddings(upload)
        for name, group in upload.state.groups.items():
            for key, values in group.shared.items():
                self._shared[name][key] += _scaled(values, np.array(shared_weight))
            if group.experts:
                self._add_experts(upload, name, shared_weight)

    def _add_experts(self, upload: Upload, name: str, client_weight: float) -> None:
        """Add the expert rows of a group; each row is there once, so that += loses none."""
        group, tokens_N = upload.state.groups[name], upload.tokens[name]
        part, rows = self._slices[name], (group.module_N, group.expert_N)
        weight_N = np.full(len(tokens_N), client_weight)
        if self._weighting == "tokens":
            weight_N = np.maximum(tokens_N, NO_TOKENS)
        self._weight_ME[part][rows] += weight_N
        self._tokens_MEK[part, :, upload.client][rows] = tokens_N
        for key, values in group.experts.items():
            sums = self._experts[name][key]
            # Row by row: indexing all at once copies them twice.
            for row, module, expert in zip(_scaled(values, weight_N), *rows, strict=True):
                sums[module, expert] += row
        embeddings_NR = upload.expert_embeddings[name]
        self._expert_embeddings(embeddings_NR.shape[1])[part][rows] += _scaled(
            embeddings_NR, weight_N
        )

    def _expert_embeddings(self, rank: int) -> np.ndarray:
        """Give the sums of expert embeddings (M, E, R), made when R is first known."""
        if self._expert_MER is None:
            self._expert_MER = np.zeros((*self._weight_ME.shape, rank), dtype=np.float32)
        return self._expert_MER

    def _add_client_embeddings(self, upload: Upload) -> None:
        """Keep a client's embeddings; R is 0 without domain experts."""
        modules, _, clients = self._assignment.holders_MEK.shape
        rank = upload.client_embeddings_MR.shape[1]
        if self._client_MKR is None:
            self._client_MKR = self._embeddings_before((modules, clients, rank))
        if rank:
            self._client_MKR[:, upload.client] = upload.client_embeddings_MR

    def _embeddings_before(self, shape: tuple[int, ...]) -> np.ndarray:
        """Client embeddings so far: of clients that do not report, the last ones stay."""
        before = self._previous.provenance
        if before and before.client_embeddings_MKR.shape == shape:
            return before.client_embeddings_MKR.copy()
        return np.zeros(shape, dtype=np.float32)

    def pool(self) -> Pool:
        """Divide by the weights; experts that nobody holds keep what they were."""
        groups = {}
        for name, group in self._previous.groups.items():
            weight_ME = self._weight_ME[self._slices[name]]
            experts = {
                key: cast(_mean(self._experts[name][key], weight_ME, value), value.dtype)
                for key, value in group.experts.items()
            }
            weight_M = np.full(len(group.modules), self._weight)
            shared = {
                key: cast(_mean(self._shared[name][key], weight_M, value), value.dtype)
                for key, value in group.shared.items()
            }
            groups[name] = PoolGroup(group.modules, experts, shared)
        return Pool(groups, self._previous.num_experts, self._provenance())

    def _provenance(self) -> Provenance:
        """Say who trained what."""
        assert self._client_MKR is not None, "there is at least one upload"
        sums_MER = self._expert_embeddings(0)
        before = self._previous.provenance
        before_MER = before.expert_embeddings_MER if before else np.zeros_like(sums_MER)
        if before:
            silent_K = self._num_examples_K == 0
            self._num_examples_K[silent_K] = before.num_examples_K[silent_K]
        return Provenance(
            round=self._assignment.round,
            tokens_MEK=self._tokens_MEK,
            holders_MEK=self._assignment.holders_MEK,
            scores_MEK=self._assignment.scores_MEK,
            objective_M=self._assignment.objective_M,
            expert_embeddings_MER=_mean(sums_MER, self._weight_ME, before_MER),
            client_embeddings_MKR=self._client_MKR,
            num_examples_K=self._num_examples_K,
        )


def _zeros(tensors: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Make a float32 sum for each tensor of each group."""
    return {
        name: {key: np.zeros(value.shape, dtype=np.float32) for key, value in by_key.items()}
        for name, by_key in tensors.items()
    }


def _over(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Append axes of length one, so that weights of the leading axes multiply values."""
    missing = values.ndim - weights.ndim
    return weights.astype(np.float32).reshape(*weights.shape, *(1,) * missing)


def _scaled(values: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """Multiply rows by their weights, in float32."""
    wide = to_float32(values)
    return wide if (weight_N == 1).all() else wide * _over(weight_N, wide)


def _mean(sums: np.ndarray, weights: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Divide sums by the weights of the leading axes, in place; previous value where that is 0."""
    divisor = _over(weights, sums)
    np.divide(sums, divisor, out=sums, where=divisor > 0)
    nobody = weights == 0
    if nobody.any():
        sums[nobody] = to_float32(previous[nobody])
    return sums


def _check_round(previous: Pool, assignment: Assignment, clients: int) -> None:
    """Refuse an assignment that does not follow the pool."""
    if assignment.round != previous.round + 1:
        raise FedamoleError(
            f"the assignment is for round {assignment.round}; after a pool of round "
            f"{previous.round} one for round {previous.round + 1} is needed"
        )
    expected = (len(previous.modules), previous.num_experts, clients)
    if assignment.holders_MEK.shape != expected:
        raise FedamoleError(
            f"the assignment of round {assignment.round} is for modules x experts x clients = "
            f"{assignment.holders_MEK.shape}; the pool and the config have {expected}"
        )


def _check_upload(upload: Upload, previous: Pool, assignment: Assignment, seen: set[int]) -> None:
    """Refuse an upload of another round, a second one, and one of other tensors."""
    who = f"upload of client {upload.client}, round {upload.round}"
    if upload.round != assignment.round:
        raise FedamoleError(f"{who}: round {assignment.round} is being aggregated")
    if upload.client in seen:
        raise FedamoleError(f"{who}: is there twice")
    if upload.state.modules != previous.modules:
        names = set(upload.state.modules) ^ set(previous.modules)
        raise FedamoleError(f"{who}: its modules are not those of the pool; in one only: {names}")
    rows = held_rows(assignment, previous.groups, upload.client)
    for name, group in upload.state.groups.items():
        ours = previous.groups[name]
        if not all(map(np.array_equal, (group.module_N, group.expert_N), rows[name])):
            raise FedamoleError(f"{who}: group {name} does not hold the experts assigned to it")
        count = len(group.module_N)
        experts = {key: (count, *value.shape[2:]) for key, value in ours.experts.items()}
        shared = {key: value.shape for key, value in ours.shared.items()}
        _check_shapes(f"{who}: group {name}", group.experts, experts)
        _check_shapes(f"{who}: group {name}", group.shared, shared)


def _check_shapes(
    where: str, tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]
) -> None:
    """Refuse tensors of other names or shapes than the pool's."""
    shapes = {key: value.shape for key, value in tensors.items()}
    if shapes != expected:
        raise FedamoleError(f"{where}: has tensors {shapes}; the pool needs {expected}")
