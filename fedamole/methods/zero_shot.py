"""Zero-shot: the backbone as it is; the floor of every table."""

from collections.abc import Sequence

from fedamole.methods import Method
from fedamole.methods.building_blocks import (
    assign_nothing,
    average,
    evaluate_adapters,
    train_adapters,
)
from fedamole.pools import ModuleShape, Pool
from fedamole.stages import RunStage


def init_pool(settings: RunStage, modules: Sequence[ModuleShape]) -> Pool:
    """Make a pool without any tensor."""
    return Pool(groups={}, num_experts=0, provenance=None)


METHOD = Method(
    init_pool=init_pool,
    assign=assign_nothing,
    aggregate=average,
    train_client=train_adapters,
    evaluate_client=evaluate_adapters,
)
