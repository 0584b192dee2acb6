"""Cost of one adapted linear layer against the frozen layer it adapts.

Forward plus backward CPU time on one thread, HMoLE and PEFT LoRA and the frozen base interleaved in
one process, and the bytes kept for the backward pass:

    python benchmarks/layer.py [--json FILE] [--repeats 30] [--dropout 0.05]

A ratio is taken within a round, so that a slow moment of the machine hits all three alike.
"""

# Axes: T = tokens, D = width of the square layer

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedamole.hmole import HMoLELinear

RANK, ALPHA, TOP_K = 8, 16.0, 2


@dataclass(frozen=True)
class Shape:
    """One measured case."""

    width: int
    """d_in and d_out."""
    tokens: int
    """Tokens of the one sequence in the batch."""
    num_experts: int
    """Routed experts of the HMoLE layer."""
    dtype: str
    """Data type of the base layer and the activations."""


SHAPES = [
    Shape(width=576, tokens=1024, num_experts=8, dtype="float32"),
    Shape(width=2048, tokens=1024, num_experts=4, dtype="float32"),
    Shape(width=576, tokens=1024, num_experts=8, dtype="bfloat16"),
    Shape(width=576, tokens=128, num_experts=8, dtype="bfloat16"),
    Shape(width=2048, tokens=1024, num_experts=4, dtype="bfloat16"),
]


def make_layers(shape: Shape, dropout: float) -> dict[str, nn.Module]:
    """Return the frozen base layer and its adapted copies by name."""
    torch.manual_seed(0)
    base = nn.Linear(shape.width, shape.width, bias=False, dtype=getattr(torch, shape.dtype))
    base.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["0"])
    lora = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    hmole = HMoLELinear(base, RANK, ALPHA, shape.num_experts, TOP_K, dropout)
    return {"base": base, "lora": lora, "hmole": hmole}


def make_step(layer: nn.Module, shape: Shape) -> Callable[[], None]:
    """Return one forward and backward pass, the balance loss of a routed layer included."""
    x_TD = torch.randn(1, shape.tokens, shape.width, dtype=getattr(torch, shape.dtype))
    grad_TD = torch.randn_like(x_TD)
    x_TD.requires_grad_()

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = None
        outputs, grads = [layer(x_TD)], [grad_TD]
        if isinstance(layer, HMoLELinear) and layer.balance_loss_B is not None:
            outputs.append(layer.balance_loss_B)
            grads.append(torch.ones(1))
        torch.autograd.backward(outputs, grads)

    return step


def measure_seconds(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, np.ndarray]:
    """Return the CPU seconds of every repeat by name, the steps taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repeat >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def saved_bytes(layer: nn.Module, shape: Shape) -> int:
    """Return the bytes of distinct storages kept for backward, parameters not counted.

    The input counts: a trained base layer would keep it, and so do its neighbours in a model.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            # A freed address could be given out again and be counted once for two tensors.
            kept.append(tensor)
        return tensor

    x_TD = torch.randn(1, shape.tokens, shape.width, dtype=getattr(torch, shape.dtype))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x_TD.requires_grad_())
    return sum(storages.values())


def measure(shape: Shape, dropout: float, repeats: int) -> dict[str, object]:
    """Return quartiles of the time ratios to the base layer, and the ratios of saved bytes to x."""
    layers = make_layers(shape, dropout)
    steps = {name: make_step(layer, shape) for name, layer in layers.items()}
    seconds = measure_seconds(steps, repeats)
    input_bytes = shape.tokens * shape.width * getattr(torch, shape.dtype).itemsize
    record: dict[str, object] = {**asdict(shape), "dropout": dropout}
    record["base_ms"] = 1000.0 * float(np.median(seconds["base"]))
    for name in ("lora", "hmole"):
        ratios = seconds[name] / seconds["base"]
        record[f"{name}_time"] = [float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75])]
        record[f"{name}_saved"] = saved_bytes(layers[name], shape) / input_bytes
    return record


def main() -> None:
    """Measure every shape, print a table and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds per shape")
    parser.add_argument("--dropout", type=float, nargs="*", default=[0.0, 0.05])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # PEFT 0.21 asks whatever it wraps for a property that transformers deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning)
    print("shape                          dropout  base ms  LoRA time [quartiles]  saved ", end="")
    print(" HMoLE time [quartiles]  saved")
    records = []
    for dropout in arguments.dropout:
        for shape in SHAPES:
            records.append(measure(shape, dropout, arguments.repeats))
            print(format_record(records[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


def format_record(record: dict) -> str:
    """Return one line of the table."""
    shape = "{dtype:8} d={width:4} {tokens:4} tok n={num_experts}".format(**record)
    cells = [f"{shape:32} {record['dropout']:5.2f} {record['base_ms']:8.2f}"]
    for name in ("lora", "hmole"):
        low, median, high = record[f"{name}_time"]
        cells.append(f"{median:7.2f} [{low:.2f}, {high:.2f}] {record[f'{name}_saved']:9.2f}x")
    return " ".join(cells)


if __name__ == "__main__":
    main()
