"""Other ways to hand out experts than RSEA: what the choice by the experts, and its optimum, bring.

A strategy is a function of scores (E, K) and capacities, like :func:`assignment.assign_experts`,
which is the reference. A random assignment is that function on random scores.

Where RSEA has a solution all of these have one: K b_min <= E c <= K b_max means that b_min is at
most floor(E c / K), and b_max at least ceil(E c / K).
"""

# E = domain experts of one module, K = clients, P = pairs of an expert and a client
import numpy as np

from fedamole.assignment import Strategy, assign_experts, check_capacities
from fedamole.transport import SOLVER, dealing_distance


def assign_evenly(
    scores: np.ndarray, choices: int, min_experts: int, max_experts: int
) -> np.ndarray:
    """Give all clients the same number of experts, E c / K or the integers next to it, optimally.

    RSEA with b_min = floor(E c / K) and b_max = ceil(E c / K); see
    :func:`assignment.assign_experts` for parameters and errors.
    """
    experts, clients = scores.shape
    check_capacities(scores, choices, min_experts, max_experts)
    fewest, rest = divmod(experts * choices, clients)
    return assign_experts(scores, choices, fewest, fewest + (rest > 0))


def choose_as_clients(
    scores: np.ndarray, choices: int, min_experts: int, max_experts: int
) -> np.ndarray:
    """Let every client choose the experts that score highest for it: the conventional direction.

    A client holds floor(E c / K) experts, the first E c mod K clients one more, so that as many
    pairs are chosen as by RSEA. Nothing holds for an expert: it may have any number of clients, or
    none. Ties: the expert with the lower index. See :func:`assignment.assign_experts` for
    parameters and errors.
    """
    scores_EK = scores
    experts, clients = scores_EK.shape
    check_capacities(scores_EK, choices, min_experts, max_experts)
    fewest, rest = divmod(experts * choices, clients)
    load_K = fewest + (np.arange(clients) < rest)
    order_EK = np.argsort(-scores_EK, axis=0, kind="stable")
    chosen_EK = np.zeros(scores_EK.shape, dtype=bool)
    np.put_along_axis(chosen_EK, order_EK, np.arange(experts)[:, None] < load_K, axis=0)
    return chosen_EK


def assign_greedily(
    scores: np.ndarray, choices: int, min_experts: int, max_experts: int
) -> np.ndarray:
    """Choose the best pair that still fits, again and again.

    A pair fits while its expert has choices left, its client has room, and what remains is enough
    for the clients below ``min_experts``. At the end an expert may have choices left, because all
    clients with room hold it already. It then goes to a client without room, which hands another
    expert on to one with room; of these exchanges the best. There is one: who lacks the expert has
    no room, so it holds more experts than who has room, hence one that the latter lacks.

    Ties: as dealt like cards; see :func:`assignment.assign_experts`, also for parameters and
    errors.
    """
    scores_EK = scores
    check_capacities(scores_EK, choices, min_experts, max_experts)
    chosen_EK = _choose_while_it_fits(scores_EK, choices, min_experts, max_experts)
    for expert, missing in enumerate(choices - chosen_EK.sum(axis=1)):
        for _ in range(missing):
            load_K = chosen_EK.sum(axis=0)
            surplus = chosen_EK.shape[0] * choices - np.maximum(load_K, min_experts).sum()
            room_K = load_K < (max_experts if surplus else min_experts)
            _exchange(chosen_EK, expert, scores_EK, room_K)
    return chosen_EK


def _choose_while_it_fits(
    scores_EK: np.ndarray, choices: int, fewest: int, most: int
) -> np.ndarray:
    """Go through the pairs by falling score, and choose those that fit."""
    experts, clients = scores_EK.shape
    distance_EK = dealing_distance(experts, clients, choices)
    order_P = np.lexsort((distance_EK.ravel(), -scores_EK.ravel()))
    pairs = zip(*(axis_P.tolist() for axis_P in np.divmod(order_P, clients)), strict=True)
    left_E, load_K = [choices] * experts, [0] * clients
    surplus = experts * choices - clients * fewest
    chosen_EK = np.zeros(scores_EK.shape, dtype=bool)
    for expert, client in pairs:
        beyond = load_K[client] >= fewest
        if not left_E[expert] or load_K[client] == most or (beyond and not surplus):
            continue
        chosen_EK[expert, client] = True
        left_E[expert] -= 1
        load_K[client] += 1
        surplus -= beyond
    return chosen_EK


def _exchange(
    chosen_EK: np.ndarray, expert: int, scores_EK: np.ndarray, room_K: np.ndarray
) -> None:
    """Give an expert to a client that hands another on to one with room, in place."""
    takers_EK = np.where(room_K & ~chosen_EK, scores_EK, -np.inf)
    gain_EK = scores_EK[expert] - scores_EK + takers_EK.max(axis=1, keepdims=True)
    gain_EK[~chosen_EK | chosen_EK[expert]] = -np.inf
    handed, giver = np.unravel_index(gain_EK.argmax(), gain_EK.shape)
    chosen_EK[expert, giver], chosen_EK[handed, giver] = True, False
    chosen_EK[handed, takers_EK[handed].argmax()] = True


GREEDY = Strategy("greedy", assign_greedily)
CLIENTS_CHOOSE = Strategy("clients choose", choose_as_clients)
LOAD_BALANCED = Strategy(f"{SOLVER}, equal loads", assign_evenly)
