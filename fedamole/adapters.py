"""A client's state in arrays <-> adapters in the backbone."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from fedamole.hmole import HMoLELinear
from fedamole.hmole_peft import HMoLEConfig, hmole_layers
from fedamole.pools import ClientGroup, ClientState
from fedamole.routing import Router
from fedamole.settings import AdapterSettings

# Parameters of an HMoLE layer that hold one row per expert, the shared expert last.
STACKED = ("lora_A", "lora_B")
# What PEFT puts in front of the names of the backbone.
PREFIX = "base_model.model."


def insert_adapters(
    backbone: PreTrainedModel,
    state: ClientState,
    settings: AdapterSettings,
    router: Router | None = None,
    frozen_experts: int = 0,
    top_k: int | None = None,
) -> torch.nn.Module:
    """Wrap the modules of a state with HMoLE layers that hold its experts.

    Parameters
    ----------
    backbone
        Is changed in place.
    state
        What the client holds; what the router does not read is left alone.
    settings
        Rank, scale, dropout and top-k.
    router
        Where the weights of the domain experts come from, see `HMoLELinear`; default: "linear" for
        a state with a gate, otherwise "embedding".
    frozen_experts
        How many domain experts of every module, the last rows, are not trained.
    top_k
        Instead of that of the settings.

    Returns
    -------
    torch.nn.Module
        The PEFT model, or the backbone itself for a state without modules (zero-shot).

    Raises
    ------
    ValueError
        If the state lacks what the router reads, or an argument is outside its limits.
    """
    num_experts = {
        module: int(np.sum(group.module_N == index))
        for group in state.groups.values()
        for index, module in enumerate(group.modules)
    }
    if not num_experts:
        return backbone
    config = HMoLEConfig(
        r=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        top_k=settings.top_k if top_k is None else top_k,
        shared_expert=all("lora_A" in group.shared for group in state.groups.values()),
        target_modules=sorted(num_experts),
        num_experts=num_experts,
        router=router or router_of(state),
        frozen_experts=frozen_experts,
    )
    model = get_peft_model(backbone, config)
    load_state(model, state)
    return model


def router_of(state: ClientState) -> Router:
    """Tell which router reads the tensors of a state."""
    gated = any("gate" in group.experts for group in state.groups.values())
    return "linear" if gated else "embedding"


@torch.no_grad()
def load_state(model: torch.nn.Module, state: ClientState) -> None:
    """Copy a state into the adapters of a model in place.

    Also where ZeRO-3 has cut the parameters: then all ranks must call it, and rank 0 gives the
    values. It is for testing other weights than the trained ones: an optimizer of DeepSpeed keeps
    its own copy, and its next step brings back what it has trained.

    Parameters
    ----------
    model
        From :func:`insert_adapters`, or what wraps it (a DeepSpeed engine).
    state
        Of the same modules and number of experts; what the router does not read is left alone.

    Raises
    ------
    ValueError
        If the state has no array, or one of another shape, for a parameter of its modules.
    """
    layers = hmole_layers(model)
    with _whole(list(layers.values())):
        for group in state.groups.values():
            for index, module in enumerate(group.modules):
                arrays = dict(rows_of_module(group, index))
                for name, parameter in layers[module].named_parameters(recurse=False):
                    _copy(arrays.get(name), parameter, f"{module}.{name}")


def _whole(layers: list[HMoLELinear]) -> contextlib.AbstractContextManager[Any]:
    """Gather the parameters that ZeRO-3 has cut, to be changed by rank 0."""
    parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _copy(array: np.ndarray | None, parameter: torch.nn.Parameter, name: str) -> None:
    """Fill a parameter; broadcasting would hide that a state is of another model."""
    if array is None or array.shape != tuple(parameter.shape):
        found = "missing" if array is None else array.shape
        raise ValueError(f"{name} is {found} in the state; the model has {tuple(parameter.shape)}")
    parameter.copy_(torch.from_numpy(array))


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
        Gives the modules, which experts are held, and the tensors that the model does not have.
    """
    found = {name.rpartition(PREFIX)[2]: tensor.numpy() for name, tensor in tensors.items()}
    groups = {}
    for name, group in state.groups.items():
        experts = {key: value.copy() for key, value in group.experts.items()}
        shared = {key: value.copy() for key, value in group.shared.items()}
        for index, module in enumerate(group.modules):
            held = group.module_N == index
            count = int(held.sum())
            for key in {**experts, **shared}:
                if key not in STACKED and f"{module}.{key}" not in found:
                    continue
                array = found[f"{module}.{key}"]
                if key in experts:
                    experts[key][held] = array[:count]
                if key in shared:
                    shared[key][index] = array[count] if key in STACKED else array
        groups[name] = replace(group, experts=experts, shared=shared)
    return ClientState(groups)


def rows_of_module(group: ClientGroup, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """Give each parameter of one module as the layer stores it."""
    held = group.module_N == index
    for name in STACKED:
        rows = [group.experts[name][held]] if name in group.experts else []
        if name in group.shared:
            rows.append(group.shared[name][index : index + 1])
        yield name, np.concatenate(rows)
    if "gate" in group.experts:
        yield "gate", group.experts["gate"][held]
    if "token_proj" in group.shared:
        yield "token_proj", group.shared["token_proj"][index]
