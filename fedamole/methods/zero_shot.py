"""Zero-shot: the backbone as it is; the floor of every table."""

from fedamole.methods.building_blocks import adapter_method
from fedamole.pools import Pool
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts


def init_pool(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make a pool without any tensor."""
    return Pool(groups={}, num_experts=0, provenance=None)


RUNS = {"zero-shot": adapter_method(init_pool)}
