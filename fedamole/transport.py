"""The transport problem of RSEA, solved exactly as a minimum-cost flow with integer costs."""

# E = domain experts of one module, K = clients
from dataclasses import dataclass

import numpy as np
from ortools import __version__ as ortools_version
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

SOLVER = f"ortools {ortools_version} SimpleMinCostFlow"

# Scores become integers of this many bits below the largest one. Every float32 down to 2^-16 of the
# largest is exact; smaller ones are rounded to 2^-40 of it. The solver multiplies costs by the
# number of nodes and adds them up along paths, all in 64 bits: hence not more.
SCORE_BITS = 40


def integer_costs(scores_EK: np.ndarray) -> np.ndarray:
    """Turn scores into integer costs; the factor is a power of two, so that only rint rounds."""
    _, exponent = np.frexp(np.abs(scores_EK).max())
    return -np.rint(np.ldexp(scores_EK.astype(np.float64), SCORE_BITS - exponent)).astype(np.int64)


@dataclass(frozen=True)
class Flow:
    """A transport problem: units leave each expert, each client takes fewest to most of them."""

    supply_E: np.ndarray
    fewest_K: np.ndarray
    most_K: np.ndarray


def solve(flow: Flow, costs_EK: np.ndarray, allowed_EK: np.ndarray) -> np.ndarray:
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


def break_ties(
    flow: Flow, costs_EK: np.ndarray, optimal_EK: np.ndarray, choices: int
) -> np.ndarray:
    """Choose among all optimal assignments by the rule of :func:`assignment.assign_experts`.

    By complementary slackness these are the assignments that agree with one optimal assignment
    wherever a reduced cost is not zero. What remains is a transport problem over the other pairs.
    """
    experts, clients = costs_EK.shape
    reduced_EK, slack_K = _reduced_costs(flow, costs_EK, optimal_EK)
    free_EK = reduced_EK == 0
    kept_EK = optimal_EK & ~free_EK
    load_K = optimal_EK.sum(axis=0)
    rest = Flow(
        supply_E=flow.supply_E - kept_EK.sum(axis=1),
        fewest_K=np.where(slack_K, load_K, flow.fewest_K) - kept_EK.sum(axis=0),
        most_K=np.where(slack_K, load_K, flow.most_K) - kept_EK.sum(axis=0),
    )
    return kept_EK | solve(rest, dealing_distance(experts, clients, choices) ** 2, free_EK)


def dealing_distance(experts: int, clients: int, choices: int) -> np.ndarray:
    """How far an expert is from a client where experts are dealt like cards, (E, K) int.

    Expert 0 goes to the first ``choices`` clients, expert 1 to the next ones, and so on around.
    """
    distance_EK: np.ndarray = (np.arange(clients) - choices * np.arange(experts)[:, None]) % clients
    return distance_EK


def _reduced_costs(
    flow: Flow, costs_EK: np.ndarray, optimal_EK: np.ndarray
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
