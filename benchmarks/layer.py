"""Cost of one adapted linear layer against the frozen layer it adapts.

Forward plus backward CPU time on one thread, HMoLE and PEFT LoRA and the frozen base taking turns
in one process, and the bytes kept for the backward pass:

    python benchmarks/layer.py [--quick]
"""

# Axes: T = tokens, D = width of the square layer

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measuring import Claim, claim, interleaved
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedamole.hmole import HMoLELinear

RANK, ALPHA, TOP_K = 8, 16.0, 2
DROPOUTS = (0.0, 0.05)


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

    target: float | None = None
    """Greatest time over the frozen layer, without dropout."""

    def __str__(self) -> str:
        return f"{self.dtype} d={self.width} {self.tokens} tokens n={self.num_experts}"


# Bounded over the frozen layer, and by a PEFT LoRA where the width is that of a large model.
WIDE = 2048
LORA_BOUND, SAVED_BOUND = 1.05, 1.3
SHAPES = [
    Shape(width=576, tokens=1024, num_experts=8, dtype="float32", target=1.6),
    Shape(width=2048, tokens=1024, num_experts=4, dtype="float32", target=1.12),
    Shape(width=576, tokens=1024, num_experts=8, dtype="bfloat16"),
    Shape(width=576, tokens=128, num_experts=8, dtype="bfloat16"),
    Shape(width=2048, tokens=1024, num_experts=4, dtype="bfloat16", target=1.15),
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


def measure_shape(shape: Shape, dropout: float, repeats: int) -> list[Claim]:
    """Compare the layers of one case."""
    layers = make_layers(shape, dropout)
    steps = {name: make_step(layer, shape) for name, layer in layers.items()}
    seconds = interleaved(steps, repeats)
    base, lora, hmole = (seconds[name] for name in ("base", "lora", "hmole"))
    case = f"{shape}, dropout {dropout:g}"
    target = None if dropout else shape.target
    bound = LORA_BOUND if shape.width >= WIDE else None
    kept = saved_bytes(layers["hmole"], shape)
    kept /= shape.tokens * shape.width * getattr(torch, shape.dtype).itemsize
    saved = None if dropout else SAVED_BOUND
    return [
        claim(f"layer: HMoLE / frozen, {case}", hmole / base, target=target, guarded=True),
        claim(f"layer: LoRA / frozen, {case}", lora / base),
        claim(
            f"layer: HMoLE / LoRA, {case}", hmole / lora, target=bound, guarded=bound is not None
        ),
        Claim(f"layer: kept for backward / x, {case}", kept, kept, kept, "x", saved, guarded=True),
    ]


def measure(quick: bool) -> list[Claim]:
    """Measure all claims; quick: fewer repeats, and no dropout."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # PEFT 0.21 asks whatever it wraps for a property that transformers deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return [
            one
            for dropout in DROPOUTS
            for shape in SHAPES
            if not (quick and dropout)
            for one in measure_shape(shape, dropout, repeats=5 if quick else 30)
        ]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, fewer cases")
    for found in measure(parser.parse_args().quick):
        target = "" if found.target is None else f"   target {found.target:g}"
        print(f"{found.name:76} {found.value:6.3f} [{found.low:.3f}, {found.high:.3f}]{target}")


if __name__ == "__main__":
    main()
