"""A client's state in arrays <-> adapters in the backbone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from fedamole.hmole_peft import HMoLEConfig, hmole_layers
from fedamole.pools import ClientGroup, ClientState
from fedamole.settings import AdapterSettings

# Parameters of an HMoLE layer that hold one row per expert, the shared expert last.
STACKED = ("lora_A", "lora_B")
# What PEFT puts in front of the names of the backbone.
PREFIX = "base_model.model."


def insert_adapters(
    backbone: PreTrainedModel, state: ClientState, settings: AdapterSettings
) -> torch.nn.Module:
    """Wrap the modules of a state with HMoLE layers that hold its experts.

    Returns
    -------
    torch.nn.Module
        The PEFT model, or the backbone itself for a state without modules (zero-shot).
    """
    num_experts = {
        module: int(np.sum(group.module_N == index))
        for group in state.groups.values()
        for index, module in enumerate(group.modules)
    }
    if not num_experts:
        return backbone
    shared = all("lora_A" in group.shared for group in state.groups.values())
    config = HMoLEConfig(
        r=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        top_k=settings.top_k,
        shared_expert=shared,
        target_modules=sorted(num_experts),
        num_experts=num_experts,
    )
    model = get_peft_model(backbone, config)
    layers = hmole_layers(model)
    with torch.no_grad():
        for group in state.groups.values():
            for index, module in enumerate(group.modules):
                for name, array in _rows_of_module(group, index):
                    getattr(layers[module], name).copy_(torch.from_numpy(array))
    return model


def remove_adapters(model: torch.nn.Module) -> None:
    """Give the backbone its own layers back."""
    if isinstance(model, PeftModel):
        backbone = model.unload()
        if getattr(backbone, "_require_grads_hook", None) is not None:
            # PEFT adds one at every start under gradient checkpointing.
            backbone.disable_input_require_grads()


def extract_state(tensors: dict[str, torch.Tensor], state: ClientState) -> ClientState:
    """Bring trained tensors into the form of the state they started from.

    Parameters
    ----------
    tensors
        By ``{module}.{parameter}`` with PEFT's prefix, and any other before it.
    state
        Gives the modules and which experts are held.
    """
    found = {name.rpartition(PREFIX)[2]: tensor.numpy() for name, tensor in tensors.items()}
    groups = {}
    for name, group in state.groups.items():
        experts = {key: np.empty_like(value) for key, value in group.experts.items()}
        shared = {key: np.empty_like(value) for key, value in group.shared.items()}
        for index, module in enumerate(group.modules):
            held = group.module_N == index
            count = int(held.sum())
            for key in {**experts, **shared}:
                array = found[f"{module}.{key}"]
                if key in experts:
                    experts[key][held] = array[:count]
                if key in shared:
                    shared[key][index] = array[count] if key in STACKED else array
        groups[name] = replace(group, experts=experts, shared=shared)
    return ClientState(groups)


def _rows_of_module(group: ClientGroup, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """Give each parameter of one module as the layer stores it."""
    held = group.module_N == index
    for name in STACKED:
        rows = [group.experts[name][held]] if name in group.experts else []
        if name in group.shared:
            rows.append(group.shared[name][index : index + 1])
        yield name, np.concatenate(rows)
    if "token_proj" in group.shared:
        yield "token_proj", group.shared["token_proj"][index]
