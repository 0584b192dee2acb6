"""FedALT: an own LoRA, a frozen one of all others, and a mixer per token (arXiv:2503.11880).

Each client trains its own LoRA and a gate, and never replaces them by a mean. What the server sends
is the rest of the world: the mean of the LoRAs of the other clients, which stays as it is while the
client trains. Per token x of a module:

    y = W0 x + s (a_own B_own A_own + a_rest B_rest A_rest) x,    (a_own, a_rest) = softmax(G x)

In the pool, expert k of every module is the rest of the world of client k, who alone holds it. All
own LoRAs start from the same values, so that means of A and of B belong together; the rest of the
world is zero in round 1.
"""

# M = modules, K = clients, and as many experts
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedamole.aggregation import aggregate as collect
from fedamole.methods import Method
from fedamole.methods.building_blocks import (
    Tensors,
    evaluate_adapters,
    first_lora,
    first_rows,
    init_lora,
    two_experts,
    with_two_experts,
)
from fedamole.pools import (
    Assignment,
    ClientGroup,
    ClientState,
    KeptState,
    Pool,
    Upload,
    cast,
    to_float32,
)
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientResult, ClientSession, Trained
    from fedamole.forms import Form

OWN, REST = 0, 1
LORA = ("lora_A", "lora_B")


def init_pool(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make a rest of the world for each client: zeros, since nobody has trained."""
    clients = settings.scenario.clients
    pool = init_lora(settings, backbone)
    groups = {
        name: replace(group, shared={}, experts=_zeros(group.shared, clients))
        for name, group in pool.groups.items()
    }
    return replace(pool, groups=groups, num_experts=clients)


def _zeros(shared: dict[str, np.ndarray], clients: int) -> dict[str, np.ndarray]:
    """One (M, K, ...) array of zeros for each (M, ...) array."""
    return {
        key: np.zeros((len(value), clients, *value.shape[1:]), dtype=value.dtype)
        for key, value in shared.items()
    }


def assign(settings: RunStage, pool: Pool, round_: int) -> Assignment:
    """Give every client its own rest of the world."""
    size = (len(pool.modules), pool.num_experts, settings.scenario.clients)
    return Assignment(
        modules=pool.modules,
        holders_MEK=np.broadcast_to(np.eye(*size[1:], dtype=bool), size).copy(),
        scores_MEK=np.zeros(size, dtype=np.float32),
        objective_M=np.zeros(size[0]),
        solver="own",
        round=round_,
    )


def aggregate(
    settings: RunStage, previous: Pool, assignment: Assignment, uploads: Iterable[Upload]
) -> Pool:
    """Average for each client the LoRAs of the others that reported in this round.

    Parameters
    ----------
    settings, previous, assignment, uploads
        See :class:`fedamole.methods.Method`. Weights are equal, or the training examples.

    Raises
    ------
    FedamoleError
        As :func:`fedamole.aggregation.aggregate`.
    """
    uniform = settings.aggregation.weighting == "uniform"
    weight_K = np.zeros(settings.scenario.clients)

    def weighed() -> Iterator[Upload]:
        for upload in uploads:
            weight_K[upload.client] = 1.0 if uniform else float(upload.num_examples)
            yield upload
            # Without this, two uploads are in memory while the next one is read.
            del upload

    # A client alone holds its expert, so that this mean is what it has sent.
    sent = collect(previous, assignment, weighed(), "uniform", settings.population)
    groups = {}
    for name, group in sent.groups.items():
        before = previous.groups[name].experts
        experts = {key: _of_others(group.experts[key], before[key], weight_K) for key in before}
        groups[name] = replace(group, experts=experts)
    return replace(sent, groups=groups)


def _of_others(own: np.ndarray, before: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """Mean of all others for each client: (sum_j w_j own_j - w_k own_k) / (sum_j w_j - w_k).

    Parameters
    ----------
    own
        (M, K, ...) what each client sent; anything where its weight is zero.
    before
        (M, K, ...) the previous means; they stay where no other client has reported.
    weight_K
        Weights; zero for a client that has not reported.
    """
    # In float64: a difference of sums in float32 would lose digits with every client more.
    total = np.zeros((len(own), *own.shape[2:]))
    for k, weight in enumerate(weight_K):
        if weight:
            total += weight * to_float32(own[:, k])
    means = before.copy()
    for k, weight in enumerate(weight_K):
        others = weight_K.sum() - weight
        if others > 0:
            rest = total - weight * to_float32(own[:, k]) if weight else total
            means[:, k] = cast((rest / others).astype(np.float32), before.dtype)
    return means


def train_client(
    session: "ClientSession", client: int, round_: int, state: ClientState, kept: KeptState | None
) -> "ClientResult":
    """Train the own LoRA and the gate beside the rest of the world, test, send the LoRA, keep both.

    Parameters
    ----------
    session, client, round_, state, kept
        See :class:`fedamole.methods.Method`.
    """
    from fedamole.client import ClientResult, Start, locally_trained, report_of

    before = kept.groups if kept else _first(session.settings.run, state)
    both = with_two_experts(state, _with_rest(before, state))
    start = Start(both, with_embedding_set=True)
    with locally_trained(session, client, round_, start, form()) as trained:
        own = _own(trained.state)
        upload = _upload(trained, state, own)
        return ClientResult(upload, report_of(session, trained), KeptState(client, round_, own, {}))


def form() -> "Form":
    """How the own LoRA, the rest of the world and the gate become a model.

    Its load is not balanced: the mixer may take either side.
    """
    from fedamole.adapters import insert_adapters
    from fedamole.forms import Form
    from fedamole.training import ScoredModel

    return Form(
        insert=partial(insert_adapters, router="linear", frozen_experts=1, top_k=2),
        scored=lambda model, _: ScoredModel(model, balance_weight=0.0),
    )


def _first(settings: RunStage, state: ClientState) -> Tensors:
    """Draw the own LoRA and the gate, the same for all clients."""
    found = first_lora(settings, state, "own expert")
    for name, tensors in found.items():
        width = tensors["lora_A"].shape[2]
        gates = [first_rows(settings, m, "mixer", 2, width) for m in state.groups[name].modules]
        tensors["gate"] = np.stack(gates)
    return found


def _with_rest(own: Tensors, state: ClientState) -> Tensors:
    """Put the own LoRA beside the rest of the world, (M, 2, ...); the gate has both its rows."""
    return {
        name: {key: np.stack([own[name][key], group.experts[key]], axis=1) for key in LORA}
        | {"gate": own[name]["gate"]}
        for name, group in state.groups.items()
    }


def _own(trained: ClientState) -> Tensors:
    """Take the own LoRA (M, ...) and the gate (M, 2, d_in) out of what is trained."""
    return {
        name: {key: tensors[key][:, OWN] for key in LORA} | {"gate": tensors["gate"]}
        for name, tensors in two_experts(trained).items()
    }


def _upload(trained: "Trained", state: ClientState, own: Tensors) -> Upload:
    """Send the own LoRA in the place of the expert that the client was sent."""
    from fedamole.client import upload_of

    groups, tokens = {}, {}
    for name, group in state.groups.items():
        groups[name] = replace(group, experts={key: own[name][key] for key in LORA})
        counts = [trained.record.routed_tokens[module][OWN] for module in group.modules]
        tokens[name] = np.array(counts, dtype=np.int64)
    nothing = {name: np.zeros((len(tokens[name]), 0), dtype=np.float32) for name in groups}
    upload = upload_of(trained, state=ClientState(groups))
    return replace(upload, expert_embeddings=nothing, tokens=tokens)


def evaluate_client(
    session: "ClientSession", client: int, round_: int, state: ClientState
) -> "ClientReport":
    """Test the rest of the world alone: all that a client has that never trained."""
    groups = {
        name: ClientGroup(group.modules, {}, group.module_N[:0], group.expert_N[:0], group.experts)
        for name, group in state.groups.items()
    }
    return evaluate_adapters(session, client, round_, ClientState(groups))


RUNS = {"fedalt": Method(init_pool, assign, aggregate, train_client, evaluate_client)}
