"""FedIT: one LoRA for all, averaged every round (Zhang et al. 2024, arXiv:2305.05644)."""

from fedamole.methods.building_blocks import adapter_method, init_lora

RUNS = {"fedit": adapter_method(init_lora)}
