"""FedAMoLE: clients hold different experts, and experts choose clients (arXiv:2411.19128).

Its variants take one thing out each: the shared expert, the embedding router, or what makes the
assignment (RSEA). All strategies hand out as many experts, within the bounds per client of the
config, and start from the same random scores in round 1.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from fedamole.assignment import (
    RSEA,
    Strategy,
    assign_all,
    random_scores,
    score_experts,
    similarities,
)
from fedamole.assignment_strategies import CLIENTS_CHOOSE, GREEDY, LOAD_BALANCED
from fedamole.methods.building_blocks import (
    adapter_method,
    average,
    first_rows,
    init_adapters,
)
from fedamole.pools import Assignment, Pool, PoolGroup, Provenance, Upload
from fedamole.randomness import stream
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts

# M = modules, E = domain experts of one module, K = clients, D = in_features
Basis = Callable[[RunStage, Pool, int], np.ndarray]


def init_pool(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make E domain experts, one shared expert and one token projection per module."""
    return init_adapters(settings, backbone.modules, settings.assignment.num_experts)


def init_without_shared_expert(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make E domain experts and one token projection per module."""
    return init_adapters(
        settings, backbone.modules, settings.assignment.num_experts, shared_expert=False
    )


def init_with_gates(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make the pool of FedAMoLE with one more tensor: every expert brings its row of a gate.

    Tokens are then routed by p = softmax(G x) over the experts that a client holds, and G is
    averaged with them. Experts choose clients as ever, by P x and A_i x.
    """
    pool = init_pool(settings, backbone)
    groups = {
        name: replace(group, experts={**group.experts, "gate": _first_gates(settings, group)})
        for name, group in pool.groups.items()
    }
    return replace(pool, groups=groups)


def _first_gates(settings: RunStage, group: PoolGroup) -> np.ndarray:
    """Draw (M, E, D) like torch.nn.Linear, every row from a stream of its own."""
    _, experts, _, width = group.experts["lora_A"].shape
    return np.stack(
        [
            np.concatenate([first_rows(settings, m, f"gate {e}", 1, width) for e in range(experts)])
            for m in group.modules
        ]
    )


def average_but_projections(
    settings: RunStage, previous: Pool, assignment: Assignment, uploads: Iterable[Upload]
) -> Pool:
    """Average all but P: beside a gate it has no gradient, and stays what it was drawn as.

    The mean of equal numbers may differ from them in the last bit.
    """
    pool = average(settings, previous, assignment, uploads)
    groups = {
        name: replace(
            group,
            shared={**group.shared, "token_proj": previous.groups[name].shared["token_proj"]},
        )
        for name, group in pool.groups.items()
    }
    return replace(pool, groups=groups)


def assigning(
    strategy: Strategy = RSEA, basis: Basis | None = None
) -> Callable[[RunStage, Pool, int], Assignment]:
    """Make the function of a method that hands out experts among those who take part.

    Parameters
    ----------
    strategy
        How to hand out.
    basis
        (settings, pool, round) -> (M, E, K): what the strategy goes by; default: the scores of
        RSEA. Those are recorded in any case, so that the strategies can be compared.
    """

    def assign(settings: RunStage, pool: Pool, round_: int) -> Assignment:
        return assign_all(
            fit(settings, pool, round_),
            settings.assignment,
            settings.adapter.top_k,
            pool.modules,
            round_,
            clients=settings.population.drawn(round_),
            strategy=strategy,
            by_MEK=basis(settings, pool, round_) if basis else None,
        )

    return assign


def fit(settings: RunStage, pool: Pool, round_: int) -> np.ndarray:
    """Score by embeddings how well experts fit the clients that take part; at first at random."""
    made = pool.provenance
    if made is None:
        return drawn_anew(settings, pool, round_)
    return score_experts(
        made.expert_embeddings_MER,
        made.client_embeddings_MKR,
        clients=settings.population.drawn(round_),
        known_K=_known(made),
    )


def fit_for_clients(settings: RunStage, pool: Pool, round_: int) -> np.ndarray:
    """Score how well experts fit a client among all experts; at first at random.

    These are logits: a client's softmax over the experts puts them in the same order.
    """
    made = pool.provenance
    if made is None:
        return drawn_anew(settings, pool, round_)
    return similarities(made.expert_embeddings_MER, made.client_embeddings_MKR, _known(made))


def drawn_anew(settings: RunStage, pool: Pool, round_: int) -> np.ndarray:
    """Draw random scores for this round."""
    size = (len(pool.modules), pool.num_experts, settings.scenario.clients)
    return random_scores(stream(settings.seed, "assignment", round_), *size)


def drawn_once(settings: RunStage, pool: Pool, round_: int) -> np.ndarray:
    """Draw the random scores of round 1 again: equal scores, equal assignment.

    Where clients are sampled, the clients of a round share out the experts by these scores, so that
    no expert is left over. A client's experts then depend on who else takes part.
    """
    return drawn_anew(settings, pool, 1)


def _known(made: Provenance) -> np.ndarray:
    """Tell which clients have ever reported, (K,) bool: nobody trains on no examples."""
    known_K: np.ndarray = made.num_examples_K > 0
    return known_K


RUNS = {
    "fedamole": adapter_method(init_pool, assigning(RSEA)),
    # The paper's -R: "random".
    "fedamole-static": adapter_method(init_pool, assigning(RSEA, drawn_once)),
    "fedamole-random": adapter_method(init_pool, assigning(RSEA, drawn_anew)),
    "fedamole-greedy": adapter_method(init_pool, assigning(GREEDY)),
    "fedamole-client-chooses": adapter_method(
        init_pool, assigning(CLIENTS_CHOOSE, fit_for_clients)
    ),
    "fedamole-homo": adapter_method(init_pool, assigning(LOAD_BALANCED)),
    # The paper's -S: "shared".
    "fedamole-noshared": adapter_method(init_without_shared_expert, assigning(RSEA)),
    # The paper's -H.
    "fedamole-linear-router": replace(
        adapter_method(init_with_gates, assigning(RSEA)), aggregate=average_but_projections
    ),
}
