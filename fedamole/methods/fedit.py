"""FedIT: one LoRA for all, averaged every round (Zhang et al. 2024, arXiv:2305.05644)."""

from collections.abc import Sequence

from fedamole.methods.building_blocks import adapter_method, init_adapters
from fedamole.pools import ModuleShape, Pool
from fedamole.stages import RunStage


def init_pool(settings: RunStage, modules: Sequence[ModuleShape]) -> Pool:
    """Make one LoRA per module: the shared expert without domain experts."""
    return init_adapters(settings, modules, num_experts=0)


RUNS = {"fedit": adapter_method(init_pool)}
