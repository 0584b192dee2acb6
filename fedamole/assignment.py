"""Reverse selection-based expert assignment (RSEA): the experts choose the clients.

Per module, arXiv:2411.19128, section on RSEA::

    max  sum_ek G_ek X_ek    with X_ek in {0, 1}
    s.t. sum_k X_ek = choices                            for every expert e
         min_experts <= sum_e X_ek <= max_experts        for every client k

The constraints are those of a transport problem, so that a minimum-cost flow with integer costs is
an exact solution, and no mixed-integer solver is needed. Other strategies under the same capacities
are in :mod:`fedamole.assignment_strategies`.
"""

# M = modules, E = domain experts of one module, K = clients, R = rank
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedamole.errors import FedamoleError
from fedamole.pools import Assignment
from fedamole.settings import AssignmentSettings
from fedamole.transport import SOLVER, Flow, break_ties, integer_costs, solve


def score_experts(
    expert_embeddings_MER: np.ndarray,
    client_embeddings_MKR: np.ndarray,
    clients: Sequence[int] | None = None,
    known_K: np.ndarray | None = None,
) -> np.ndarray:
    """Score how well experts fit clients: softmax over clients of <expert, client> / sqrt(R).

    Parameters
    ----------
    expert_embeddings_MER, client_embeddings_MKR
        Mean embeddings.
    clients
        Clients that take part: the softmax runs over these, all others score zero; default: all.
    known_K
        See :func:`similarities`.

    Returns
    -------
    np.ndarray
        (M, E, K) float32; rows over K sum to one.

    Raises
    ------
    FedamoleError
        If an embedding is not finite: training diverged.
    """
    all_MEK = similarities(expert_embeddings_MER, client_embeddings_MKR, known_K)
    taking = _columns(clients, all_MEK.shape[2])
    logits_MEK = all_MEK.take(taking, axis=2)
    exponentials_MEK = np.exp(logits_MEK - logits_MEK.max(axis=2, keepdims=True))
    scores_MEK = np.zeros(all_MEK.shape, dtype=np.float32)
    scores_MEK[:, :, taking] = exponentials_MEK / exponentials_MEK.sum(axis=2, keepdims=True)
    return scores_MEK


def similarities(
    expert_embeddings_MER: np.ndarray,
    client_embeddings_MKR: np.ndarray,
    known_K: np.ndarray | None = None,
) -> np.ndarray:
    """Compare experts with clients: <expert, client> / sqrt(R).

    Parameters
    ----------
    expert_embeddings_MER, client_embeddings_MKR
        Mean embeddings. That of an expert which nobody has held yet is zero: no client is more
        similar to it than another.
    known_K
        Whether a client has sent embeddings; the others, of which nothing is known, take the mean
        of those that have. Default: all have.

    Returns
    -------
    np.ndarray
        (M, E, K) float64.

    Raises
    ------
    FedamoleError
        If an embedding is not finite: training diverged.
    """
    clients_MKR = client_embeddings_MKR.astype(np.float64)
    if known_K is not None:
        mean_MR = clients_MKR[:, known_K].mean(axis=1)
        clients_MKR = np.where(known_K[:, None], clients_MKR, mean_MR[:, None])
    for what, values in (("expert", expert_embeddings_MER), ("client", clients_MKR)):
        if not np.isfinite(values).all():
            module, index = np.argwhere(~np.isfinite(values))[0][:2]
            raise FedamoleError(
                f"the embedding of {what} {index} in module {module} is not finite; "
                "lower the learning rate"
            )
    # einsum without BLAS, in float64: the scores do not depend on the number of threads.
    products_MEK = np.einsum("mer,mkr->mek", expert_embeddings_MER.astype(np.float64), clients_MKR)
    logits_MEK: np.ndarray = products_MEK / np.sqrt(expert_embeddings_MER.shape[2])
    return logits_MEK


def _columns(clients: Sequence[int] | None, count: int) -> np.ndarray:
    """Indices of the clients that take part; all by default."""
    return np.arange(count) if clients is None else np.array(clients, dtype=np.int64)


def random_scores(rng: np.random.Generator, modules: int, experts: int, clients: int) -> np.ndarray:
    """Draw scores (M, E, K) uniform in [0, 1), for the round before there are embeddings."""
    return rng.random((modules, experts, clients), dtype=np.float32)


@dataclass(frozen=True)
class Strategy:
    """A way to hand out the experts of one module.

    Attributes
    ----------
    name
        What assignment files call it.
    assign
        (scores (E, K), choices, min_experts, max_experts) -> who holds what, (E, K) bool. Refuses
        what :func:`check_capacities` refuses.
    """

    name: str
    assign: Callable[[np.ndarray, int, int, int], np.ndarray]


def assign_all(
    scores_MEK: np.ndarray,
    settings: AssignmentSettings,
    top_k: int,
    modules: tuple[str, ...],
    round_: int,
    clients: Sequence[int] | None = None,
    strategy: Strategy | None = None,
    by_MEK: np.ndarray | None = None,
) -> Assignment:
    """Assign the experts of every module.

    Parameters
    ----------
    scores_MEK
        How well experts fit clients; recorded, and summed up as the objective.
    settings
        Capacities.
    top_k
        Experts that work on a token; least that a client must hold.
    modules
        Names along M.
    round_
        The round that trains with the assignment.
    clients
        Clients that take part; the others hold nothing and score zero. Default: all.
    strategy
        How to assign; default: :data:`RSEA`, which maximises the objective.
    by_MEK
        What the strategy goes by instead of the scores, such as random numbers.

    Raises
    ------
    FedamoleError
        If the capacities are infeasible or a score is not finite.
    """
    taking, strategy = _columns(clients, scores_MEK.shape[2]), strategy or RSEA
    fewest, most = settings.bounds(top_k)
    recorded_MEK = np.zeros(scores_MEK.shape, dtype=np.float32)
    recorded_MEK[:, :, taking] = scores_MEK[:, :, taking]
    by_MEK = recorded_MEK if by_MEK is None else by_MEK
    holders_MEK = np.zeros(scores_MEK.shape, dtype=bool)
    for by_EK, holders_EK in zip(by_MEK, holders_MEK, strict=True):
        holders_EK[:, taking] = strategy.assign(by_EK[:, taking], settings.choices, fewest, most)
    objective_M = np.where(holders_MEK, recorded_MEK.astype(np.float64), 0.0).sum(axis=(1, 2))
    return Assignment(modules, holders_MEK, recorded_MEK, objective_M, strategy.name, round_)


def assign_experts(
    scores: np.ndarray, choices: int, min_experts: int, max_experts: int
) -> np.ndarray:
    """Assign the experts of one module to clients, exactly.

    Scores are rounded to multiples of 2^-40 of the largest one's power of two; for these the result
    is optimal. Ties: among the optimal assignments, one with the least sum over the chosen (e, k)
    of ((k - e * choices) mod K)^2. Equal scores are thereby dealt out like cards: expert 0 to
    clients 0, 1, ..., expert 1 to the next ones. The solver is sequential: threads change nothing.

    Parameters
    ----------
    scores
        (E, K) any finite numbers.
    choices
        Clients per expert.
    min_experts, max_experts
        Fewest and most experts of a client.

    Returns
    -------
    np.ndarray
        (E, K) bool.

    Raises
    ------
    FedamoleError
        If no assignment exists (the failing inequality), or a score is not finite.
    """
    scores_EK = scores
    experts, clients = scores_EK.shape
    check_capacities(scores_EK, choices, min_experts, max_experts)
    costs_EK = integer_costs(scores_EK)
    flow = Flow(
        supply_E=np.full(experts, choices),
        fewest_K=np.full(clients, min_experts),
        most_K=np.full(clients, max_experts),
    )
    optimal_EK = solve(flow, costs_EK, np.ones_like(scores_EK, dtype=bool))
    return break_ties(flow, costs_EK, optimal_EK, choices)


RSEA = Strategy(SOLVER, assign_experts)


def check_capacities(scores: np.ndarray, choices: int, min_experts: int, max_experts: int) -> None:
    """Refuse what has no solution; see :func:`assign_experts` for parameters and errors."""
    scores_EK = scores
    experts, clients = scores_EK.shape
    if min(choices, min_experts) < 1:
        raise FedamoleError(
            f"choices {choices} and min_experts {min_experts} must both be at least 1"
        )
    settings = AssignmentSettings.model_construct(
        num_experts=experts, choices=choices, min_experts=min_experts, max_experts=max_experts
    )
    if failing := settings.infeasibility(clients, top_k=1):
        raise FedamoleError(f"no assignment exists: {failing} does not hold")
    if not np.isfinite(scores_EK).all():
        expert, client = np.argwhere(~np.isfinite(scores_EK))[0]
        value = scores_EK[expert, client]
        raise FedamoleError(f"the score of expert {expert} for client {client} is {value}")
