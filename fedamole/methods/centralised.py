"""Centralised: one LoRA, trained where the data of all clients lie together; the ceiling.

Client 0 does the steps of all clients (:attr:`fedamole.registry.Run.pooled`). The mean of its one
upload is that upload, and every client tests it.
"""

from fedamole.methods.building_blocks import adapter_method, init_lora

RUNS = {"centralised": adapter_method(init_lora)}
