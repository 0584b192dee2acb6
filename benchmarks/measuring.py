"""What the benchmarks share: interleaved timing, ratios, the machine, claims and their targets.

A benchmark is a file here whose `measure(quick)` gives :class:`Claim` objects. `run.py` prints them
beside their targets, writes them to `results/`, and compares them with what is committed there.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedamole.machine import processor

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], object]


@dataclass(frozen=True)
class Claim:
    """One figure with its target: a line of `make bench`.

    Attributes
    ----------
    name
        What is compared with what, and at which size; unique over all benchmarks.
    value
        Median.
    low, high
        Quartiles of the repeats; both the value itself where there is nothing to repeat.
    unit
        "x" for a ratio of two times or sizes taken in turns; otherwise "s", "ms", "GB" ...
    target
        What issue or paper ask for; None for a figure without a target.
    larger_is_better
        Whether the target is a least value instead of a greatest.
    guarded
        Whether `make bench-check` compares it: only ratios that a loaded machine leaves alone.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str = "x"
    target: float | None = None
    larger_is_better: bool = False
    guarded: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.larger_is_better else self.value <= self.target


def interleaved(
    steps: Mapping[str, Step],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, np.ndarray]:
    """Time steps that take turns, so that a slow moment of the machine hits all alike.

    Returns
    -------
    dict
        Name -> (repeats,) seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + warm_up):
        for name, step in steps.items():
            start = clock()
            step()
            if repeat >= warm_up:
                seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Give the lower quartile, the median and the upper quartile."""
    low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return low, median, high


def claim(name: str, values: np.ndarray, **more: object) -> Claim:
    """Make a claim of repeated measurements; ratios are to be taken within a repeat."""
    low, median, high = quartiles(values)
    return Claim(name, median, low, high, **more)  # type: ignore[arg-type]


def machine() -> dict[str, object]:
    """Say what the figures were taken on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **_torch_facts(),
    }


def _torch_facts() -> dict[str, object]:
    try:
        import torch
    except ImportError:
        return {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "gpu": gpu, "threads": torch.get_num_threads()}
