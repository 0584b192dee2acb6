"""What the work of clients runs on, and how much of a GPU's memory it takes."""

import torch
from torch import nn

from fedamole.hmole_peft import hmole_layers
from fedamole.machine import processor
from fedamole.meter import MB, Machine, Meter


class DeviceMeter(Meter):
    """A meter of work on a device.

    Parameters
    ----------
    device
        Of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.machine = Machine(processor(), self._gpu(), torch.get_num_threads())

    def _gpu(self) -> str | None:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def forget_gpu_peak(self) -> None:
        """See :class:`fedamole.meter.Meter`."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def gpu_peak_mb(self) -> float | None:
        """See :class:`fedamole.meter.Meter`."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / MB


def trainable_numbers(model: nn.Module) -> int:
    """Count the numbers of a whole model that are trained; frozen experts are rows that are not."""
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for layer in hmole_layers(model).values():
        frozen = layer.mixture.frozen
        numbers -= sum(parameter[frozen].numel() for parameter in (layer.lora_A, layer.lora_B))
    return numbers
