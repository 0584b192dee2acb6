"""FDLoRA: a personal LoRA and a global one per client, fused to be tested (arXiv:2406.07925).

Round 1 is local: every client trains its personal LoRA from common values, and the mean of these is
the first global LoRA. In every later round clients train the global LoRA with AdamW, and the server
takes one step of SGD with Nesterov momentum on the mean pseudo-gradient, as DiLoCo does (Douillard
et al. 2023, arXiv:2311.08105). Every few rounds the personal LoRA becomes the locally trained one.

What the paper leaves open:

- Tested is the fusion of the personal LoRA and the global one as the client has just trained it,
  before the latter may become the personal one. In round 1 it is the personal LoRA alone.
- A client that takes part for the first time after round 1 has no personal LoRA. It takes the one
  that it trains then.
- A client that was away when the personal LoRA was due takes the one that it trains next.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedamole.fusion import find_weights, fused
from fedamole.methods.building_blocks import (
    adapter_method,
    average,
    init_lora,
    shared_of,
    with_shared,
)
from fedamole.pools import Assignment, ClientState, KeptState, Pool, PoolGroup, Upload
from fedamole.settings import FdloraSettings
from fedamole.stages import RunStage

if TYPE_CHECKING:
    from fedamole.client import ClientResult, ClientSession, Start, Trained


def aggregate(
    settings: RunStage, previous: Pool, assignment: Assignment, uploads: Iterable[Upload]
) -> Pool:
    """Average the personal LoRAs of round 1; in later rounds step towards the mean of the uploads.

    Whatever weighs the clients in the mean of their LoRAs weighs their pseudo-gradients alike.
    """
    mean = average(settings, previous, assignment, uploads)
    if assignment.round == 1:
        return mean
    groups = {
        name: outer_step(group, mean.groups[name], settings.fdlora)
        for name, group in previous.groups.items()
    }
    return replace(mean, groups=groups)


def outer_step(before: PoolGroup, mean: PoolGroup, settings: FdloraSettings) -> PoolGroup:
    """Take one step of SGD with Nesterov momentum, as torch.optim.SGD defines it.

    Parameters
    ----------
    before
        Tensors that the round started from; its momentum, if there was a step before.
    mean
        Mean of what the clients made of them: the pseudo-gradient is ``before - mean``.
    settings
        Step size and momentum.
    """
    rate = np.float32(settings.outer_learning_rate)
    decay = np.float32(settings.outer_momentum)
    shared, momentum = {}, {}
    for key, start in before.shared.items():
        gradient = start - mean.shared[key]
        momentum[key] = gradient
        if key in before.server:
            momentum[key] = decay * before.server[key] + gradient
        shared[key] = start - rate * (gradient + decay * momentum[key])
    return replace(before, shared=shared, server=momentum)


def start(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "Start":
    """Start from the global LoRA; the embedding set is held back to find weights on it.

    See :class:`fedamole.methods.Method`.
    """
    from torch.optim import AdamW

    from fedamole.client import Start

    return Start(state, with_embedding_set=False, optimizer=AdamW)


def train_client(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "ClientResult":
    """Train the global LoRA, test its fusion with the personal one; see the class ``Method``."""
    from fedamole.client import ClientResult, locally_trained, report_of, upload_of

    sync_every = session.settings.run.fdlora.sync_every
    begin = start(session, client, round_, state, kept)
    with locally_trained(session, client, round_, begin) as trained:
        personal = with_shared(trained.state, kept.groups) if kept else trained.state
        weights = _fuse(session, trained, personal) if round_ > 1 else {}
        report = report_of(session, trained)
        if kept and is_due(round_, kept.round, sync_every):
            personal = trained.state
        return ClientResult(
            upload_of(trained), report, KeptState(client, round_, shared_of(personal), weights)
        )


def is_due(round_: int, last: int, sync_every: int) -> bool:
    """Whether the personal LoRA becomes the one trained in a round.

    Parameters
    ----------
    round_
        The round.
    last
        Round before it in which the client took part.
    sync_every
        Every so many rounds it is due; a client catches up on what it has missed.
    """
    return round_ // sync_every > last // sync_every


def _fuse(session: "ClientSession", trained: "Trained", personal: ClientState) -> dict[str, float]:
    """Put the fused LoRA into the trained model; give the weights of its parts."""
    from fedamole.adapters import load_state
    from fedamole.evaluation import evaluation_loss

    run, batch_size = session.settings.run, session.settings.evaluation.batch_size
    embedding_set = session.store.clients[trained.client].embedding
    rows = embedding_set[: run.fdlora.fusion_batches * run.training.batch_size]

    def put(weights: np.ndarray) -> None:
        load_state(trained.scored, fused((personal, trained.state), weights))

    def loss_at(weights: np.ndarray) -> float:
        put(weights)
        return evaluation_loss(trained.scored, session.store, rows, batch_size, session.device)

    names = ("fusion", trained.client, trained.round)
    weights = find_weights(loss_at, run.fdlora, run.seed, *names)
    put(weights)
    return {"personal_weight": float(weights[0]), "global_weight": float(weights[1])}


RUNS = {
    "fdlora": replace(
        adapter_method(init_lora), aggregate=aggregate, train_client=train_client, start=start
    )
}
