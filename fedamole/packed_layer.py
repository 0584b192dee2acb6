"""HMoLE layers of several clients around one frozen linear layer: the model of a pack.

A *unit* is a micro-batch of one client. A forward pass takes several units of one size, padded to
one length; the frozen layers see one large batch, and each unit meets the experts of its client.
Experts are stacked over the clients and padded to the most that one of them holds; an expert that a
client does not hold has a probability of exactly 0, and so has its gradient.
"""

# Axes: K = clients of the pack, U = units of a pass, B = sequences of all units, T = tokens,
#       D = d_in, O = d_out, R = rank, N = most routed experts of a client,
#       M = experts held (N, and the shared one last)

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedamole.adapters import PREFIX, STACKED, extract_state, router_of, rows_of_module
from fedamole.hmole import inside_backward
from fedamole.hmole_function import Dropout, combine, project
from fedamole.pools import ClientState
from fedamole.routing import Mixture, Router
from fedamole.settings import AdapterSettings


@dataclass
class PackContext:
    """What all layers of a pack must know about the units that run through them.

    Attributes
    ----------
    client_U
        Place in the pack of the client of each unit, int64.
    one_of_each
        Whether there is one unit of every client, in order.
    token_mask_BT
        True where a token is real; None where all are.
    sequences
        Sequences of each unit.
    lengths
        Tokens of the longest sequence of each unit.
    longest
        Tokens of every sequence with padding.
    dropout_seeds
        One per layer, in the order of execution, for each unit.
    order
        Layer -> its place in that order. It is the same in every pass, also where gradient
        checkpointing repeats a part of one.
    """

    client_U: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    one_of_each: bool = False
    token_mask_BT: Tensor | None = None
    sequences: int = 1
    lengths: tuple[int, ...] = ()
    longest: int = 0
    dropout_seeds: list[list[int]] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)

    def dropout_of(self, layer: str, probability: float) -> Dropout:
        """Give the masks of a layer for every unit."""
        place = self.order.setdefault(layer, len(self.order))
        seeds = tuple(seeds[place] for seeds in self.dropout_seeds)
        return Dropout(probability, seeds, self.lengths, self.sequences)


class PackedLinear(nn.Module):
    """A frozen linear layer plus the experts of several clients.

    Parameters
    ----------
    name
        Of the layer, in the backbone.
    base_layer
        The linear layer.
    held
        Routed experts of each client of the pack.
    shared_expert
        Whether every client also has an expert that all its tokens use.
    settings
        Rank, scale, dropout and top-k.
    router
        "embedding" or "linear"; see `HMoLELinear`.
    context
        Shared by all layers of the pack.

    Attributes
    ----------
    lora_A, lora_B, token_proj, gate
        As in `HMoLELinear`, with K in front.
    balance_loss_B
        Of each sequence of the last pass.
    routed_tokens_KN
        Tokens sent to each expert since the layer was made, int64.
    """

    def __init__(
        self,
        name: str,
        base_layer: nn.Linear,
        held: Sequence[int],
        shared_expert: bool,
        settings: AdapterSettings,
        router: Router,
        context: PackContext,
    ) -> None:
        super().__init__()
        self.name, self.base_layer, self.context = name, base_layer, context
        self.held, self.shared_expert, self.dropout = list(held), shared_expert, settings.dropout
        device = base_layer.weight.device
        clients, most, rank = len(held), max(held), settings.rank
        width, height = base_layer.in_features, base_layer.out_features
        scale = settings.alpha / rank
        self.mixture = Mixture(most, rank, settings.top_k, scale, router)
        self.held_K = torch.tensor(self.held, device=device)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(clients, *shape, device=device))

        self.lora_A = zeros(most + shared_expert, rank, width)
        self.lora_B = zeros(most + shared_expert, height, rank)
        self.token_proj = zeros(rank, width) if most and router == "embedding" else None
        self.gate = zeros(most, width) if most and router == "linear" else None
        self.balance_loss_B: Tensor | None = None
        self.routed_tokens_KN = torch.zeros(clients, most, dtype=torch.int64, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to units, shape (B, T, d_in), the sequences of a unit together.

        Raises
        ------
        ValueError
            If the input has other tokens than the units: a module that chooses among them, such as
            an expert of a mixture in the backbone, cannot be adapted in a pack.
        """
        context, width = self.context, x.shape[-1]
        client_B = context.client_U.repeat_interleave(context.sequences)
        if x.shape[:-1].numel() != len(client_B) * context.longest:
            raise ValueError(
                f"{self.name}: an input of shape {tuple(x.shape)} has not the tokens of "
                f"{len(client_B)} packed sequences of {context.longest}"
            )
        client_U = None if context.one_of_each else context.client_U
        dropout = None
        if self.dropout and self.training:
            dropout = context.dropout_of(self.name, self.dropout)
        router_weight = self.token_proj if self.gate is None else self.gate
        through_TD, projected_XT, dropped_LT = project(
            x.reshape(-1, width),
            self.lora_A,
            router_weight,
            self.mixture,
            dropout,
            client_U,
        )
        base = self.base_layer(through_TD.view_as(x))
        mask_BT = context.token_mask_BT
        y_TO, balance_loss_B, routed_tokens_NB = combine(
            base.reshape(-1, base.shape[-1]),
            projected_XT,
            dropped_LT,
            self.lora_B,
            None if mask_BT is None else mask_BT.flatten(),
            len(client_B),
            self.mixture,
            held_B=self.held_K[client_B] if self.mixture.num_experts else None,
            client_U=client_U,
        )
        if not inside_backward():
            self.balance_loss_B = balance_loss_B
            self.routed_tokens_KN.index_add_(0, client_B, routed_tokens_NB.T)
        return y_TO.view_as(base)

    @torch.no_grad()
    def load(self, place: int, arrays: dict[str, Tensor]) -> None:
        """Fill in the parameters of one client, as `HMoLELinear` holds them.

        What the router does not read is left alone.
        """
        for key, whole in self.named_parameters(recurse=False):
            parameter, values = whole[place], arrays[key]
            if key == "token_proj":
                parameter.copy_(values)
                continue
            parameter[: self.held[place]] = values[: self.held[place]]
            if key in STACKED and self.shared_expert:
                parameter[-1] = values[-1]

    @torch.no_grad()
    def give(self, place: int) -> dict[str, Tensor]:
        """Undo :meth:`load`: copies on the CPU."""
        held, found = self.held[place], {}
        for key, parameter in self.named_parameters(recurse=False):
            values = parameter[place]
            if key != "token_proj":
                last = values[-1:] if key in STACKED and self.shared_expert else values[:0]
                values = torch.cat((values[:held], last))
            found[key] = values.detach().to("cpu", copy=True)
        return found


class PackedAdapters:
    """The experts of several clients, put into a backbone; see :func:`packed_adapters`."""

    def __init__(
        self, backbone: PreTrainedModel, states: Sequence[ClientState], settings: AdapterSettings
    ) -> None:
        self.backbone, self.context, self.clients = backbone, PackContext(), len(states)
        self.layers: dict[str, PackedLinear] = {}
        router = router_of(states[0])
        for name, group in states[0].groups.items():
            for index, module in enumerate(group.modules):
                held = [int((state.groups[name].module_N == index).sum()) for state in states]
                base_layer = backbone.get_submodule(module)
                assert isinstance(base_layer, nn.Linear), f"{module} is no linear layer"
                self.layers[module] = PackedLinear(
                    module,
                    base_layer,
                    held,
                    "lora_A" in group.shared,
                    settings,
                    router,
                    self.context,
                )
                for place, state in enumerate(states):
                    rows = rows_of_module(state.groups[name], index)
                    arrays = {key: torch.from_numpy(array) for key, array in rows}
                    self.layers[module].load(place, arrays)

    def insert(self) -> None:
        """Put the layers into the backbone."""
        for module, layer in self.layers.items():
            self.backbone.set_submodule(module, layer)

    def remove(self) -> None:
        """Give the backbone its own layers back."""
        for module, layer in self.layers.items():
            self.backbone.set_submodule(module, layer.base_layer)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained; the first axis is that of the clients."""
        return [p for layer in self.layers.values() for p in layer.parameters(recurse=False)]

    def balance_losses(self) -> Tensor:
        """Balance loss of each sequence of the last pass, summed over the layers, shape (B)."""
        losses = [layer.balance_loss_B for layer in self.layers.values()]
        return torch.stack([loss_B for loss_B in losses if loss_B is not None]).sum(0)

    def state_of(self, place: int, state: ClientState) -> ClientState:
        """Bring the experts of a client into the form of the state they started from."""
        tensors = {
            f"{PREFIX}{module}.{key}": values
            for module, layer in self.layers.items()
            for key, values in layer.give(place).items()
        }
        return extract_state(tensors, state)


@contextlib.contextmanager
def packed_adapters(
    backbone: PreTrainedModel, states: Sequence[ClientState], settings: AdapterSettings
) -> Iterator[PackedAdapters]:
    """Put the experts of several clients into a backbone; take them out again at the end.

    Parameters
    ----------
    backbone
        Is changed in place.
    states
        What each client holds; all of the same modules and kinds of tensors.
    settings
        Rank, scale, dropout and top-k.
    """
    adapters = PackedAdapters(backbone, states, settings)
    adapters.insert()
    try:
        yield adapters
    finally:
        adapters.remove()
