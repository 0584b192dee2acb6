"""What the work of clients runs on, and how much of a GPU's memory it takes."""

import platform
from pathlib import Path

import torch
from torch import nn

from fedamole.hmole_peft import hmole_layers
from fedamole.meter import MB, Machine, Meter

CPUINFO = Path("/proc/cpuinfo")


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


def processor(cpuinfo: Path = CPUINFO) -> str:
    """Name the kind of processor, as the kernel or the platform knows it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    return facts.get("model name") or platform.machine()


def trainable_numbers(model: nn.Module) -> int:
    """Count the numbers of a whole model that are trained; frozen experts are rows that are not."""
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for layer in hmole_layers(model).values():
        frozen = layer.mixture.frozen
        numbers -= sum(parameter[frozen].numel() for parameter in (layer.lora_A, layer.lora_B))
    return numbers
