"""FedAMoLE: clients hold different experts, and experts choose clients (arXiv:2411.19128)."""

from collections.abc import Sequence

from fedamole.assignment import assign_all, random_scores, score_experts
from fedamole.methods.building_blocks import adapter_method, init_adapters
from fedamole.pools import Assignment, ModuleShape, Pool
from fedamole.randomness import stream
from fedamole.stages import RunStage


def init_pool(settings: RunStage, modules: Sequence[ModuleShape]) -> Pool:
    """Make E domain experts, one shared expert and one token projection per module."""
    return init_adapters(settings, modules, settings.assignment.num_experts)


def assign(settings: RunStage, pool: Pool, round_: int) -> Assignment:
    """Let the experts choose clients by embedding similarity (RSEA); at random before training."""
    if pool.provenance is None:
        size = (len(pool.modules), pool.num_experts, settings.scenario.clients)
        scores_MEK = random_scores(stream(settings.seed, "assignment", round_), *size)
    else:
        scores_MEK = score_experts(
            pool.provenance.expert_embeddings_MER, pool.provenance.client_embeddings_MKR
        )
    return assign_all(scores_MEK, settings.assignment, settings.adapter.top_k, pool.modules, round_)


RUNS = {"fedamole": adapter_method(init_pool, assign)}
