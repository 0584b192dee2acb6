"""Zero-shot: the backbone as it is; the floor of every table."""

from collections.abc import Sequence

from fedamole.methods.building_blocks import adapter_method
from fedamole.pools import ModuleShape, Pool
from fedamole.stages import RunStage


def init_pool(settings: RunStage, modules: Sequence[ModuleShape]) -> Pool:
    """Make a pool without any tensor."""
    return Pool(groups={}, num_experts=0, provenance=None)


RUNS = {"zero-shot": adapter_method(init_pool)}
