"""A private and a shared LoRA that teach each other; the client's model is their ensemble.

FML (Shen et al. 2020, arXiv:2006.16765) weighs both alike. FedAPEN (Qin et al., KDD 2023) also
trains the ensemble, and learns the weight of the private model on the embedding set. The shared
LoRA is averaged as in FedIT; the private one stays. The losses are in :mod:`fedamole.mutual`.

Its authors learn the weight when an averaged model comes in, and test with that model, before the
next local training. Here a client is tested right after its training, so the weight is learned
between the two, and is what the next local training uses. In the first round both models are the
backbone until then: there would be nothing to learn.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedamole.methods.building_blocks import (
    Tensors,
    adapter_method,
    first_lora,
    init_lora,
    two_experts,
    with_two_experts,
)
from fedamole.pools import ClientState, KeptState

if TYPE_CHECKING:
    from fedamole.client import ClientResult, ClientSession, Trained
    from fedamole.mutual import MutualModel

PRIVATE, SHARED = 0, 1


def train_client(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None,
    learns_weight: bool,
) -> "ClientResult":
    """Train both adapters, test the ensemble, send the shared adapter, keep the private one.

    Parameters
    ----------
    session, client, round_, state, kept
        See :class:`fedamole.methods.Method`. The first private LoRA of every client is drawn from a
        stream of its own, since private models start independently; its B is zero.
    learns_weight
        Whether the ensemble is trained and its weight learned, for which the embedding set is held
        back; otherwise the weight is 1/2.
    """
    from fedamole.client import ClientResult, Start, locally_trained, report_of, upload_of
    from fedamole.mutual import Ensemble

    run = session.settings.run
    before = kept or KeptState(
        client=client,
        round=0,
        groups=first_lora(run, state, f"private expert {client}"),
        numbers={"weight": run.fedapen.initial_weight} if learns_weight else {},
    )
    ensemble = Ensemble(before.numbers.get("weight", 0.5))
    both = with_two_experts(state, _side_by_side(before.groups, state))
    form = ensemble.form(joint_loss=learns_weight)
    start = Start(both, with_embedding_set=not learns_weight)
    with locally_trained(session, client, round_, start, form) as trained:
        if learns_weight:
            ensemble.weight = _learned_weight(session, trained, ensemble.weight)
        private, shared = _apart(trained.state, state)
        numbers = {"weight": ensemble.weight} if learns_weight else {}
        return ClientResult(
            upload_of(trained, state=shared),
            report_of(session, trained),
            KeptState(client, round_, private, numbers),
        )


def _learned_weight(session: "ClientSession", trained: "Trained", start: float) -> float:
    """Learn the weight of the private model on the client's embedding set."""
    from fedamole.mutual import fit_weight

    scored: MutualModel = trained.scored  # type: ignore[assignment]
    settings = session.settings
    rows = session.store.clients[trained.client].embedding
    answers = scored.answers(session.store, rows, settings.evaluation.batch_size, session.device)
    return fit_weight(answers, start, settings.run.fedapen, settings.run.training.batch_size)


def _side_by_side(private: Tensors, state: ClientState) -> Tensors:
    """Stack the private LoRA and the shared one that the client was sent, (M, 2, ...)."""
    return {
        name: {key: np.stack([private[name][key], a], axis=1) for key, a in group.shared.items()}
        for name, group in state.groups.items()
    }


def _apart(trained: ClientState, state: ClientState) -> tuple[Tensors, ClientState]:
    """Take the private LoRA and the shared one, in the form it was sent, out of what is trained."""
    private: Tensors = {}
    groups = {}
    for name, tensors in two_experts(trained).items():
        private[name] = {key: a[:, PRIVATE] for key, a in tensors.items()}
        shared = {key: a[:, SHARED] for key, a in tensors.items()}
        groups[name] = replace(state.groups[name], shared=shared)
    return private, ClientState(groups)


RUNS = {
    "fml": replace(
        adapter_method(init_lora),
        train_client=partial(train_client, learns_weight=False),
        start=None,
    ),
    "fedapen": replace(
        adapter_method(init_lora),
        train_client=partial(train_client, learns_weight=True),
        start=None,
    ),
}
