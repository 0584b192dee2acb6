"""HMoLE as a PEFT tuner, registered out of tree.

Importing this module makes `get_peft_model(model, HMoLEConfig(...))`, `save_pretrained`,
`PeftModel.from_pretrained` and `disable_adapter` work. `peft.register_peft_method` refuses names
that PEFT does not know, so the three dictionaries behind it are filled here. PEFT finds adapter
weights by the class of the layer (everything on a `BaseTunerLayer` but its `base_layer`), so the
parameters keep their names: `base_model.model.<module>.lora_A`, `.lora_B`, `.token_proj`, `.gate`.
"""

# Axes: B = sequences, N = routed experts of a layer

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from fedamole.errors import FedamoleError
from fedamole.hmole import HMoLELinear, check_arguments
from fedamole.routing import Router, RoutingContext


class _PeftTypeName(str):
    """A name that PEFT can use like a member of its closed enumeration `PeftType`."""

    @property
    def value(self) -> str:
        return str(self)


HMOLE = _PeftTypeName("HMOLE")


@dataclass
class HMoLEConfig(PeftConfig):
    """Which layers get which mixture; the limits are those of `HMoLELinear`."""

    r: int = 8
    """LoRA rank."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r."""
    dropout: float = 0.05
    """Probability of dropping an input element on the LoRA path while training."""
    num_experts: int | dict[str, int] = 2
    """Routed experts of every target; or by full module name in the base model, one per target."""
    top_k: int = 2
    """Experts a token is routed to."""
    shared_expert: bool = True
    """Whether every module also holds an expert that all tokens use."""
    router: Router = "embedding"
    """What the weights of the routed experts follow from; "given": see `set_expert_weights`."""
    frozen_experts: int = 0
    """How many of the routed experts of every target, the last ones, are not trained."""
    target_modules: list[str] | str | None = None
    """Name suffixes, one regular expression, or None for PEFT's choice for the model family."""
    exclude_modules: list[str] | str | None = None
    """Name suffixes or a regular expression of modules to leave out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HMOLE


class HMoLELayer(HMoLELinear, BaseTunerLayer):
    """`HMoLELinear` with the switches PEFT expects; it holds one adapter."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, **arguments: Any) -> None:
        super().__init__(base_layer, **arguments)
        self._active_adapter = [adapter_name]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, or only its base while the adapter is disabled."""
        if not self._disable_adapters:
            return super().forward(x)
        self.clear_statistics()
        output: Tensor = self.base_layer(x)
        return output

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the experts on or off; which parameters are trainable stays as it is."""
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the parameters trainable, unless in inference mode."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.set_requires_grad(self._active_adapter, not inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Make the parameters of the adapter trainable or not."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refuse: without its adapter the layer is its base, which `unload()` gives back."""
        raise FedamoleError("an HMoLE adapter cannot be deleted; unload() gives the backbone back")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the weight of an expert depends on the token."""
        raise FedamoleError(_CANNOT_MERGE)


_CANNOT_MERGE = (
    "an HMoLE adapter cannot be merged: its experts are weighted per token; "
    "unload() gives the backbone back without it"
)


class HMoLEModel(BaseTuner):
    """Backbone whose target modules are `HMoLELayer`; made by `get_peft_model`."""

    prefix = "hmole_"
    tuner_layer_cls = HMoLELayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.routing_context = RoutingContext()

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # Asked for in every step; a search through all modules takes a millisecond per ten layers.
        self.hmole_layers = _layers_within(model)
        self._mask_hook = model.register_forward_pre_hook(
            _AttentionMaskReader(self.routing_context), with_kwargs=True
        )

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if len(self.peft_config) > 1:
            raise FedamoleError(
                f"an HMoLE model holds one adapter, got {sorted(self.peft_config)}; "
                "unload() the first, or copy weights into it"
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            family = model_config.get("model_type")
            if family not in self.target_module_mapping:
                raise FedamoleError(
                    f"no default target_modules for model family {family!r}; "
                    f"the model has {_linear_leaf_names(self.model)}"
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # All checks come before the first module is replaced: an error leaves the model whole.
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        if isinstance(peft_config.target_modules, set):
            # A set comes out in another order in every process; a saved config should not.
            peft_config.target_modules = sorted(peft_config.target_modules)
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and self._check_target_module_exists(peft_config, name)
        }
        _check_targets(peft_config, model, targets)
        _check_num_experts(peft_config.num_experts, targets)
        for name, module in targets.items():
            check_arguments(base_layer=module, **_layer_arguments(peft_config, name))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = HMoLELayer(target, adapter_name, **_layer_arguments(peft_config, current_key))
        layer.routing_context = self.routing_context
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise FedamoleError(_CANNOT_MERGE)

    def unload(self) -> nn.Module:
        """Return the backbone as it was before the adapter."""
        self._mask_hook.remove()
        self.hmole_layers = {}
        return super().unload()


class _AttentionMaskReader:
    """Forward pre-hook that hands the attention mask of the backbone to its HMoLE layers.

    An object and not a closure, so that a deep copy of the model reads into the copied context.
    """

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = inspect.signature(backbone.forward).bind_partial(*args, **kwargs).arguments
        self.context.token_mask_BT = None
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            # With a cache the mask also covers the past; the layers only see the new tokens.
            self.context.token_mask_BT = mask[:, -tokens.shape[1] :] != 0


def _layer_arguments(config: HMoLEConfig, name: str) -> dict[str, Any]:
    num_experts = config.num_experts
    return {
        "rank": config.r,
        "alpha": config.alpha,
        "num_experts": num_experts if isinstance(num_experts, int) else num_experts[name],
        "top_k": config.top_k,
        "dropout": config.dropout,
        "shared_expert": config.shared_expert,
        "router": config.router,
        "frozen_experts": config.frozen_experts,
    }


def _check_targets(config: HMoLEConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    wanted = config.target_modules or []
    missing = [wanted] if isinstance(wanted, str) and not targets else []
    if not isinstance(wanted, str):
        missing = sorted(
            suffix
            for suffix in wanted
            if not any(name == suffix or name.endswith(f".{suffix}") for name in targets)
        )
    if missing or not targets:
        raise FedamoleError(
            f"target_modules {missing} match no linear layer; the model has "
            f"{_linear_leaf_names(model)}"
        )
    for name, module in targets.items():
        if not isinstance(module, nn.Linear):
            raise FedamoleError(
                f"target module {name} is {type(module).__name__}; HMoLE adapts torch.nn.Linear "
                f"only: {_linear_leaf_names(model)}"
            )


def _check_num_experts(num_experts: int | dict[str, int], targets: dict[str, nn.Module]) -> None:
    if isinstance(num_experts, int):
        return
    without = sorted(targets.keys() - num_experts.keys())
    unknown = sorted(num_experts.keys() - targets.keys())
    if without or unknown:
        raise FedamoleError(
            f"num_experts must name every target module and nothing else; without a number: "
            f"{without}, not a target: {unknown}"
        )


def _linear_leaf_names(model: nn.Module) -> list[str]:
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
    )


def hmole_layers(model: nn.Module) -> dict[str, HMoLELinear]:
    """Return the HMoLE layers in the order of the model, by module name in the base model.

    Parameters
    ----------
    model
        A `PeftModel`, what wraps one (a DeepSpeed engine), or any module with such layers.
    """
    tuners = (module for module in model.modules() if isinstance(module, HMoLEModel))
    tuner = next(tuners, None)
    return _layers_within(model) if tuner is None else dict(tuner.hmole_layers)


def _layers_within(model: nn.Module) -> dict[str, HMoLELinear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, HMoLELinear)
    }


def set_expert_weights(model: nn.Module, expert_weights_BN: Tensor | None) -> None:
    """Say how much each routed expert weighs in the forward passes that follow.

    For layers with the router "given". Under gradient checkpointing the weights are read again in
    the backward pass: set those of the next batch after it.

    Parameters
    ----------
    model
        As for `hmole_layers`.
    expert_weights_BN
        One row per sequence of the batch, or one row for all; no gradient flows into it. None
        forgets the weights.
    """
    for layer in hmole_layers(model).values():
        layer.routing_context.expert_weights_BN = expert_weights_BN


def balance_loss(model: nn.Module) -> Tensor:
    """Return the load-balancing loss of the last forward pass, summed over the layers, shape (B).

    One value per sequence, so that the caller's weighting does not depend on how a batch is cut
    into micro-batches or over ranks.

    Raises
    ------
    RuntimeError
        If a layer has not been run since it was made, copied or enabled.
    """
    losses = {name: layer.balance_loss_B for name, layer in hmole_layers(model).items()}
    recorded = [loss_B for loss_B in losses.values() if loss_B is not None]
    if not recorded or len(recorded) < len(losses):
        idle = [name for name, loss_B in losses.items() if loss_B is None]
        raise RuntimeError(f"no forward pass has been recorded by the HMoLE layers {idle}")
    return torch.stack([loss_B.to(recorded[0].device) for loss_B in recorded]).sum(0)


def routed_tokens(model: nn.Module) -> dict[str, Tensor]:
    """Return the real tokens the last pass sent to each expert, shape (N) int64, by module name."""
    counts = {name: layer.routed_tokens_N for name, layer in hmole_layers(model).items()}
    return {name: counts_N for name, counts_N in counts.items() if counts_N is not None}


@contextmanager
def collecting_embeddings(model: nn.Module) -> Iterator[dict[str, HMoLELinear]]:
    """Collect mean inputs in every layer while the model runs in eval mode.

    Read `token_means()` or `input_mean()` of the layers afterwards. On leaving, the model returns
    to the mode it was in.

    Yields
    ------
    dict
        The layers by module name, as `hmole_layers` gives them.
    """
    layers = hmole_layers(model)
    was_training = model.training
    model.eval()
    for layer in layers.values():
        layer.start_collecting()
    try:
        yield layers
    finally:
        for layer in layers.values():
            layer.stop_collecting()
        model.train(was_training)


def _register() -> None:
    # PEFT annotates these dictionaries with its closed enumeration.
    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    configs[HMOLE], tuners[HMOLE], prefixes[HMOLE] = HMoLEConfig, HMoLEModel, HMoLEModel.prefix


_register()
