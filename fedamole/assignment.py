"""Reverse selection-based expert assignment (RSEA): the experts choose the clients.

Per module, arXiv:2411.19128, section on RSEA::

    max  sum_ek G_ek X_ek    with X_ek in {0, 1}
    s.t. sum_k X_ek = choices                            for every expert e
         min_experts <= sum_e X_ek <= max_experts        for every client k

The constraints are those of a transport problem, so that a minimum-cost flow with integer costs is
an exact solution, and no mixed-integer solver is needed.
"""

# M = modules, E = domain experts of one module, K = clients, R = rank
from dataclasses import dataclass

import numpy as np
from ortools import __version__ as ortools_version
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from fedamole.errors import FedamoleError
from fedamole.pools import Assignment
from fedamole.settings import AssignmentSettings

SOLVER = f"ortools {ortools_version} SimpleMinCostFlow"

# Scores become integers of this many bits below the largest one. Every float32 down to 2^-16 of the
# largest is exact; smaller ones are rounded to 2^-40 of it. The solver multiplies costs by the
# number of nodes and adds them up along paths, all in 64 bits: hence not more.
SCORE_BITS = 40


def score_experts(
    expert_embeddings_MER: np.ndarray, client_embeddings_MKR: np.ndarray
) -> np.ndarray:
    """Score how well experts fit clients: softmax over clients of <expert, client> / sqrt(R).

    Parameters
    ----------
    expert_embeddings_MER, client_embeddings_MKR
        Mean embeddings.

    Returns
    -------
    np.ndarray
        (M, E, K) float32; rows over K sum to one.

    Raises
    ------
    FedamoleError
        If an embedding is not finite: training diverged.
    """
    for what, values in (("expert", expert_embeddings_MER), ("client", client_embeddings_MKR)):
        if not np.isfinite(values).all():
            module, index = np.argwhere(~np.isfinite(values))[0][:2]
            raise FedamoleError(
                f"the embedding of {what} {index} in module {module} is not finite; "
                "lower the learning rate"
            )
    # einsum without BLAS, in float64: the scores do not depend on the number of threads.
    logits_MEK = np.einsum(
        "mer,mkr->mek",
        expert_embeddings_MER.astype(np.float64),
        client_embeddings_MKR.astype(np.float64),
    ) / np.sqrt(expert_embeddings_MER.shape[2])
    exponentials_MEK = np.exp(logits_MEK - logits_MEK.max(axis=2, keepdims=True))
    return (exponentials_MEK / exponentials_MEK.sum(axis=2, keepdims=True)).astype(np.float32)


def random_scores(rng: np.random.Generator, modules: int, experts: int, clients: int) -> np.ndarray:
    """Draw scores (M, E, K) uniform in [0, 1), for the round before there are embeddings."""
    return rng.random((modules, experts, clients), dtype=np.float32)


def assign_all(
    scores_MEK: np.ndarray,
    settings: AssignmentSettings,
    top_k: int,
    modules: tuple[str, ...],
    round_: int,
) -> Assignment:
    """Assign the experts of every module.

    Parameters
    ----------
    scores_MEK
        What to maximise.
    settings
        Capacities.
    top_k
        Experts that work on a token; least that a client must hold.
    modules
        Names along M.
    round_
        The round that trains with the assignment.

    Raises
    ------
    FedamoleError
        If the capacities are infeasible or a score is not finite.
    """
    fewest, most = settings.bounds(top_k)
    scores_MEK = scores_MEK.astype(np.float32, copy=False)
    holders_MEK = np.zeros(scores_MEK.shape, dtype=bool)
    for scores_EK, holders_EK in zip(scores_MEK, holders_MEK, strict=True):
        holders_EK[:] = assign_experts(scores_EK, settings.choices, fewest, most)
    objective_M = np.where(holders_MEK, scores_MEK.astype(np.float64), 0.0).sum(axis=(1, 2))
    return Assignment(modules, holders_MEK, scores_MEK, objective_M, SOLVER, round_)


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
    _check(scores_EK, choices, min_experts, max_experts)
    costs_EK = _integer_costs(scores_EK)
    flow = _Flow(
        supply_E=np.full(experts, choices),
        fewest_K=np.full(clients, min_experts),
        most_K=np.full(clients, max_experts),
    )
    optimal_EK = _solve(flow, costs_EK, np.ones_like(scores_EK, dtype=bool))
    return _break_ties(flow, costs_EK, optimal_EK, choices)


def _check(scores_EK: np.ndarray, choices: int, min_experts: int, max_experts: int) -> None:
    """Refuse what has no solution."""
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


def _integer_costs(scores_EK: np.ndarray) -> np.ndarray:
    """Turn scores into integer costs; the factor is a power of two, so that only rint rounds."""
    _, exponent = np.frexp(np.abs(scores_EK).max())
    return -np.rint(np.ldexp(scores_EK.astype(np.float64), SCORE_BITS - exponent)).astype(np.int64)


@dataclass(frozen=True)
class _Flow:
    """A transport problem: units leave each expert, each client takes fewest to most of them."""

    supply_E: np.ndarray
    fewest_K: np.ndarray
    most_K: np.ndarray


def _solve(flow: _Flow, costs_EK: np.ndarray, allowed_EK: np.ndarray) -> np.ndarray:
    """Choose from the allowed pairs with least cost: (E, K) bool.

    Nodes: experts, clients, sink. A client's own demand is its lower bound; what it takes beyond
    goes on to the sink.
    """
    experts, clients = costs_EK.shape
    sink = experts + clients
    expert_A, client_A = allowed_EK.nonzero()
    client_nodes = np.arange(experts, sink)
    solver = SimpleMinCostFlow()
    pairs = solver.add_arcs_with_capacity_and_unit_cost(
        expert_A, experts + client_A, np.ones_like(expert_A), costs_EK[allowed_EK]
    )
    solver.add_arcs_with_capacity_and_unit_cost(
        client_nodes,
        np.full(clients, sink),
        flow.most_K - flow.fewest_K,
        np.zeros(clients, dtype=np.int64),
    )
    surplus = flow.supply_E.sum() - flow.fewest_K.sum()
    supplies = np.concatenate([flow.supply_E, -flow.fewest_K, [-surplus]])
    solver.set_nodes_supplies(np.arange(sink + 1), supplies)
    status = solver.solve()
    if status != solver.OPTIMAL:
        raise RuntimeError(f"min-cost flow of {experts} experts, {clients} clients ended: {status}")
    chosen_EK = np.zeros(costs_EK.shape, dtype=bool)
    chosen_EK[allowed_EK] = solver.flows(pairs) > 0
    return chosen_EK


def _break_ties(
    flow: _Flow, costs_EK: np.ndarray, optimal_EK: np.ndarray, choices: int
) -> np.ndarray:
    """Choose among all optimal assignments by the rule of :func:`assign_experts`.

    By complementary slackness these are the assignments that agree with one optimal assignment
    wherever a reduced cost is not zero. What remains is a transport problem over the other pairs.
    """
    experts, clients = costs_EK.shape
    reduced_EK, slack_K = _reduced_costs(flow, costs_EK, optimal_EK)
    free_EK = reduced_EK == 0
    kept_EK = optimal_EK & ~free_EK
    load_K = optimal_EK.sum(axis=0)
    rest = _Flow(
        supply_E=flow.supply_E - kept_EK.sum(axis=1),
        fewest_K=np.where(slack_K, load_K, flow.fewest_K) - kept_EK.sum(axis=0),
        most_K=np.where(slack_K, load_K, flow.most_K) - kept_EK.sum(axis=0),
    )
    distance_EK = (np.arange(clients) - choices * np.arange(experts)[:, None]) % clients
    return kept_EK | _solve(rest, distance_EK**2, free_EK)


def _reduced_costs(
    flow: _Flow, costs_EK: np.ndarray, optimal_EK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Prove an assignment optimal: prices of the nodes by Bellman-Ford on the residual graph.

    Returns
    -------
    tuple
        Reduced costs (E, K), >= 0 where not chosen and <= 0 where chosen; and (K,) bool: whether
        all optimal assignments give the client the same number of experts.
    """
    experts, clients = costs_EK.shape
    load_K = optimal_EK.sum(axis=0)
    far = np.iinfo(np.int64).max // 4
    forward_EK, back_EK = np.where(optimal_EK, far, costs_EK), np.where(optimal_EK, -costs_EK, far)
    to_sink_K = np.where(load_K < flow.most_K, 0, far)
    from_sink_K = np.where(load_K > flow.fewest_K, 0, far)
    price_E, price_K, price_sink = np.zeros(experts, int), np.zeros(clients, int), 0
    # A shortest path visits each node once; a graph that has none such has a cheaper assignment.
    for _ in range(experts + clients + 1):
        new_K = np.minimum(price_K, (price_E[:, None] + forward_EK).min(axis=0))
        new_K = np.minimum(new_K, price_sink + from_sink_K)
        new_sink = min(price_sink, int((new_K + to_sink_K).min()))
        new_E = np.minimum(price_E, (new_K + back_EK).min(axis=1))
        if (new_K == price_K).all() and (new_E == price_E).all() and new_sink == price_sink:
            return price_E[:, None] + costs_EK - price_K, price_K != price_sink
        price_E, price_K, price_sink = new_E, new_K, new_sink
    raise RuntimeError("the min-cost flow is not optimal: a cheaper assignment exists")
