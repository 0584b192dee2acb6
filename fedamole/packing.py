"""Packed clients: several clients train at once through one frozen backbone.

A client's loss depends on its own experts only, so the gradients of a sum of losses are those of
separate training, and so are Adam's moments, which are taken number by number. Only the last bits
differ, because the frozen layers see more tokens at once. A process trains its packs alone: nothing
is shared between processes, hence no DeepSpeed.
"""

# Axes: K = clients of the pack, U = units of a pass (micro-batches, each of one client),
#       B = sequences of all units, T = tokens, P = predicted tokens, V = vocabulary

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fedamole.batches import LocalTraining, rows_of_round
from fedamole.datasets.tokens import TokenStore
from fedamole.errors import ClientError
from fedamole.packed_layer import PackedAdapters, packed_adapters
from fedamole.pools import ClientState
from fedamole.randomness import derive_seed
from fedamole.stages import RunStage
from fedamole.training import (
    FUSED_ADAM,
    TrainingRecord,
    check_finite,
    learning_rate,
    with_bar,
)

logger = logging.getLogger(__name__)
# What one more forward and backward pass costs beyond its tokens, in tokens: on a GPU a short pass
# leaves most of it idle.
PASS_COST = {"cpu": 32, "cuda": 2048}


@dataclass(frozen=True, eq=False)
class PackedClient:
    """A client of a pack.

    Attributes
    ----------
    client
        Its number.
    state
        What its training starts from.
    rows
        Rows of the token store that it trains on.
    num_steps
        Optimizer steps.
    """

    client: int
    state: ClientState
    rows: np.ndarray
    num_steps: int


@dataclass(frozen=True, eq=False)
class PackedResult:
    """What the training of one client of a pack gives: the trained tensors, and how it went."""

    state: ClientState
    record: TrainingRecord


@dataclass(frozen=True, eq=False)
class Unit:
    """A micro-batch of one client.

    Attributes
    ----------
    place
        Of the client in the pack.
    number
        Of the micro-batch in its step.
    rows
        Rows of the token store.
    length
        Tokens of the longest of them.
    num_targets
        Response tokens of all.
    """

    place: int
    number: int
    rows: np.ndarray
    length: int
    num_targets: int


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Units of one forward pass, padded on the right to one length.

    Attributes
    ----------
    units
        What is in it.
    input_ids
        (B, T), the sequences of a unit one after another.
    token_mask
        (B, T) True where a token is real; None where all are.
    client_U
        Place of the client of each unit, int64.
    positions_P
        Places in the flat (B * T) that predict a response token, in order.
    targets_P
        The token that follows each.
    unit_P
        The unit each belongs to.
    """

    units: tuple[Unit, ...]
    input_ids: torch.Tensor
    token_mask: torch.Tensor | None
    client_U: torch.Tensor
    positions_P: torch.Tensor
    targets_P: torch.Tensor
    unit_P: torch.Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy of the batch on a device."""
        moved: dict[str, Any] = {
            key: value.to(device, non_blocking=True)
            for key, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def plan_passes(
    lengths: Sequence[int], sequences: int, pass_cost: int, most_tokens: int | None = None
) -> list[list[int]]:
    """Cut the units of a step into forward passes: little padding, few passes.

    Units of similar length go together. Among all cuts of the units in order of length, the one
    with the least cost is taken: tokens with padding, and a fixed cost for every pass.

    Parameters
    ----------
    lengths
        Tokens of the longest sequence of each unit.
    sequences
        Sequences of a unit.
    pass_cost
        What one more pass costs, in tokens.
    most_tokens
        Most tokens of a pass, padding included; a unit that is larger has one of its own.

    Returns
    -------
    list of list of int
        Indices of the units of each pass.
    """
    order = sorted(range(len(lengths)), key=lambda unit: (lengths[unit], unit))
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(order) + 1):
        longest = sequences * lengths[order[stop - 1]]
        most = max(1, most_tokens // longest) if most_tokens else stop
        starts = range(max(0, stop - most), stop)
        best.append(
            min((best[start][0] + (stop - start) * longest + pass_cost, start) for start in starts)
        )
    passes, stop = [], len(order)
    while stop:
        start = best[stop][1]
        passes.append(sorted(order[start:stop]))
        stop = start
    return passes[::-1]


def make_unit(place: int, number: int, rows: np.ndarray, store: TokenStore) -> Unit:
    """Make a micro-batch; see :class:`Unit`."""
    lengths = [len(store.ids(row)) for row in rows]
    prompts = [store.prompt_length(row) for row in rows]
    return Unit(place, number, rows, max(lengths), sum(lengths) - sum(prompts))


def pack_batch(units: Sequence[Unit], store: TokenStore) -> PackedBatch:
    """Put units into one batch."""
    longest = max(unit.length for unit in units)
    rows = np.concatenate([unit.rows for unit in units])
    input_ids = np.full((len(rows), longest), store.pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=bool)
    positions, targets, owners = [], [], []
    owner_B = np.repeat(np.arange(len(units)), [len(unit.rows) for unit in units])
    for line, row in enumerate(rows):
        ids, prompt = store.ids(row), store.prompt_length(row)
        input_ids[line, : len(ids)] = ids
        mask[line, : len(ids)] = True
        # The logits at position t predict token t + 1.
        positions.append(line * longest + np.arange(prompt - 1, len(ids) - 1))
        targets.append(np.asarray(ids[prompt:], dtype=np.int64))
        owners.append(np.full(len(ids) - prompt, owner_B[line]))
    return PackedBatch(
        units=tuple(units),
        input_ids=torch.from_numpy(input_ids),
        token_mask=None if mask.all() else torch.from_numpy(mask),
        client_U=torch.tensor([unit.place for unit in units]),
        positions_P=torch.from_numpy(np.concatenate(positions)),
        targets_P=torch.from_numpy(np.concatenate(targets)),
        unit_P=torch.from_numpy(np.concatenate(owners)),
    )


def layer_seeds(seed: int, layers: int) -> list[int]:
    """Draw the seeds of the dropout masks that the layers of one client alone would draw in turn.

    Separate training seeds torch's generator for each micro-batch, and every layer takes a number
    from it (:class:`fedamole.hmole.HMoLELinear`).
    """
    generator = torch.Generator().manual_seed(seed)
    seeds: list[int] = torch.randint(2**62, (layers,), generator=generator).tolist()
    return seeds


class PackedModel(nn.Module):
    """A backbone with the experts of a pack, whose forward pass gives the loss sums of units.

    Parameters
    ----------
    backbone
        Holds the layers of `adapters`.
    adapters
        The experts of the pack.
    """

    def __init__(self, backbone: PreTrainedModel, adapters: PackedAdapters) -> None:
        super().__init__()
        self.backbone, self.adapters = backbone, adapters

    def forward(
        self, batch: PackedBatch, seeds: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the token losses and the balance losses of each unit.

        Parameters
        ----------
        batch
            The units, on the device of the model.
        seeds
            Of the dropout of each unit.

        Returns
        -------
        tuple of torch.Tensor
            (U,) cross entropies of the response tokens in nats, and (U,) load balancing losses;
            both float32.
        """
        units, layers = batch.units, self.adapters.layers
        context = self.adapters.context
        context.client_U = batch.client_U
        context.one_of_each = [unit.place for unit in units] == list(range(self.adapters.clients))
        context.token_mask_BT = batch.token_mask
        context.sequences = len(units[0].rows)
        context.lengths = tuple(unit.length for unit in units)
        context.longest = batch.input_ids.shape[1]
        context.dropout_seeds = [layer_seeds(seed, len(layers)) for seed in seeds]

        def at_targets(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            # Sequences of other clients end elsewhere: a position that one needs, others do not.
            return (args[0].flatten(0, -2)[batch.positions_P].unsqueeze(0), *args[1:])

        hook = self.backbone.get_output_embeddings().register_forward_pre_hook(at_targets)
        try:
            # Padding is behind the tokens, where a causal model does not look: no mask is needed,
            # and without one attention takes its faster paths.
            logits_1PV = self.backbone(input_ids=batch.input_ids, use_cache=False).logits
        finally:
            hook.remove()
        losses_P = nn.functional.cross_entropy(
            logits_1PV[0].float(), batch.targets_P, reduction="none"
        )
        token_U = losses_P.new_zeros(len(units)).index_add(0, batch.unit_P, losses_P)
        return token_U, self.adapters.balance_losses().view(len(units), -1).sum(1)


def train_pack(
    backbone: PreTrainedModel,
    clients: Sequence[PackedClient],
    round_: int,
    run: RunStage,
    store: TokenStore,
    device: torch.device,
    optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAM,
    most_tokens: int | None = None,
) -> dict[int, PackedResult | ClientError]:
    """Train several clients for one round.

    Parameters
    ----------
    backbone
        The frozen model, on the device; it is left as it was.
    clients
        Who trains on what; at least one.
    round_
        Round, from 1.
    run
        Settings of the run.
    store
        Tokens of the scenario.
    device
        Of this process.
    optimizer
        A fresh one for all; it must treat every number by itself, as Adam does.
    most_tokens
        Of one forward pass, padding included; default: all of a step.

    Returns
    -------
    dict
        Client -> its result, or the error of a client whose training diverged; the others do not
        feel it.
    """
    states = [client.state for client in clients]
    with packed_adapters(backbone, states, run.adapter) as adapters:
        training = _Training(clients, round_, run, store, device, adapters, most_tokens)
        try:
            training.run_steps(PackedModel(backbone, adapters).train(), optimizer)
        finally:
            backbone.eval()
    return training.results


@dataclass
class _Training:
    """The training of one pack, step by step; see :func:`train_pack` for its fields.

    Attributes
    ----------
    results
        Client -> what it has trained, once it has.
    losses
        For each step (K,) mean token losses.
    batches
        For each client the micro-batches of its steps.
    """

    clients: Sequence[PackedClient]
    round: int
    run: RunStage
    store: TokenStore
    device: torch.device
    adapters: PackedAdapters
    most_tokens: int | None

    def __post_init__(self) -> None:
        self.results: dict[int, PackedResult | ClientError] = {}
        self.losses: list[torch.Tensor] = []
        self.batches = [self._steps_of(place) for place in range(len(self.clients))]

    def run_steps(
        self, model: PackedModel, optimizer: Callable[..., torch.optim.Optimizer]
    ) -> None:
        """Train until the last client has done its steps."""
        settings = self.run.training
        parameters = self.adapters.parameters()
        rule = optimizer(parameters, lr=learning_rate(settings, self.round))
        most = max(client.num_steps for client in self.clients)
        started = time.monotonic()
        for step in with_bar(range(most), most):
            units = [unit for steps in self.batches for unit in next(steps, ())]
            self.losses.append(self._add_gradients(model, units, step))
            if settings.gradient_clipping:
                clip_by_client(parameters, settings.gradient_clipping)
            rule.step()
            rule.zero_grad(set_to_none=True)
            for place, client in enumerate(self.clients):
                if client.num_steps == step + 1:
                    self._finish(place, time.monotonic() - started)

    def place_of(self, place: int) -> LocalTraining:
        """Where in the study the training of a client stands."""
        return LocalTraining(self.run.seed, self.round, self.clients[place].client)

    def _steps_of(self, place: int) -> Iterator[list[Unit]]:
        """Give the micro-batches of each step of a client."""
        client, place_of = self.clients[place], self.place_of(place)
        for step in rows_of_round(client.rows, client.num_steps, place_of, self.run.training):
            yield [make_unit(place, number, rows, self.store) for number, rows in enumerate(step)]

    def _add_gradients(self, model: PackedModel, units: list[Unit], step: int) -> torch.Tensor:
        """Run the passes of a step; give the mean token loss of each client, (K,)."""
        settings, per_pass = self.run.training, self.run.training.sequences_per_pass
        targets_K = np.zeros(len(self.clients))
        for unit in units:
            targets_K[unit.place] += unit.num_targets
        balance_share = self.run.adapter.balance_weight / settings.batch_size
        loss_K = torch.zeros(len(self.clients), device=self.device)
        lengths, cost = [unit.length for unit in units], PASS_COST[self.device.type]
        for indices in plan_passes(lengths, per_pass, cost, self.most_tokens):
            chosen = [units[index] for index in indices]
            shares = torch.tensor([1.0 / targets_K[unit.place] for unit in chosen])
            share_U = shares.to(self.device, torch.float32, non_blocking=True)
            batch = pack_batch(chosen, self.store).to(self.device)
            token_U, balance_U = model(batch, [self._dropout_seed(unit, step) for unit in chosen])
            token_U = token_U * share_U
            (token_U + balance_U * balance_share).sum().backward()
            loss_K.index_add_(0, batch.client_U, token_U.detach())
        return loss_K

    def _dropout_seed(self, unit: Unit, step: int) -> int:
        """The seed that the micro-batch would have in separate training."""
        names = ("dropout", self.clients[unit.place].client, self.round, step, unit.number)
        return derive_seed(self.run.seed, *names)

    def _finish(self, place: int, seconds: float) -> None:
        """Take out what a client has trained; later steps of others move it no more."""
        client = self.clients[place]
        losses = torch.stack(self.losses[: client.num_steps])[:, place].tolist()
        try:
            check_finite(enumerate(losses), self.place_of(place))
        except ClientError as error:
            self.results[client.client] = error
            return
        record = TrainingRecord(
            steps=client.num_steps,
            loss_first=losses[0],
            loss_last=losses[-1],
            seconds=seconds,
            routed_tokens=self._routed_tokens(place),
        )
        state = self.adapters.state_of(place, client.state)
        self.results[client.client] = PackedResult(state, record)

    def _routed_tokens(self, place: int) -> dict[str, np.ndarray]:
        """Tokens that were routed to each expert of a client, by module."""
        return {
            name: layer.routed_tokens_KN[place, : layer.held[place]].cpu().numpy()
            for name, layer in self.adapters.layers.items()
        }


@torch.no_grad()
def clip_by_client(parameters: Sequence[nn.Parameter], longest: float) -> None:
    """Scale the gradient of each client down to a length, as clipping of each alone would.

    Parameters
    ----------
    parameters
        Their first axis is that of the clients; clients without a gradient have zeros.
    longest
        Largest norm over all parameters of a client.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares_K = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    # DeepSpeed's rule, to the last digit of its small constant.
    excess_K = ((squares_K.sqrt() + 1e-6) / longest).clamp(min=1.0)
    for gradient in gradients:
        gradient /= excess_K.view(-1, *[1] * (gradient.dim() - 1))
