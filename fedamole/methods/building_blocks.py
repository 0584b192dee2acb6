"""What the methods share. Methods compose these; they never import each other."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedamole.aggregation import aggregate
from fedamole.methods import Method
from fedamole.pools import (
    Assignment,
    ClientGroup,
    ClientState,
    KeptState,
    ModuleShape,
    Pool,
    PoolGroup,
    Upload,
    group_modules,
)
from fedamole.randomness import stream
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientResult, ClientSession, Start
    from fedamole.forms import Form

# Group -> tensor name -> array; M = modules of the group.
Tensors = dict[str, dict[str, np.ndarray]]


def adapter_method(
    init_pool: Callable[[RunStage, BackboneFacts], Pool],
    assign: Callable[[RunStage, Pool, int], Assignment] | None = None,
) -> Method:
    """Make a method that trains LoRA adapters and averages them; without experts by default."""
    return Method(
        init_pool=init_pool,
        assign=assign or assign_nothing,
        aggregate=average,
        train_client=train_experts if assign else train_adapters,
        evaluate_client=evaluate_adapters,
        start=start_as_sent,
    )


def init_lora(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make one LoRA per module: the shared expert without domain experts."""
    return init_adapters(settings, backbone.modules, num_experts=0)


def init_adapters(
    settings: RunStage, modules: Sequence[ModuleShape], num_experts: int, shared_expert: bool = True
) -> Pool:
    """Make a pool of LoRA experts: A and P Kaiming-uniform, B zero; the model is the backbone.

    Every expert of every module draws from a stream of its own. Without domain experts there is
    nothing to route, hence no token projection.

    Parameters
    ----------
    settings
        Gives rank and seed.
    modules
        Linear layers to adapt.
    num_experts
        Domain experts E per module; 0 leaves the shared expert alone: plain LoRA.
    shared_expert
        Whether there is an expert that every client holds and every token uses.
    """
    groups = {}
    for name, shapes in group_modules(modules).items():
        rank, height, count = settings.adapter.rank, shapes[0].out_features, len(shapes)
        experts, shared = {}, {}
        if num_experts:
            experts = {
                "lora_A": np.stack(
                    [
                        [_kaiming(settings, shape, f"expert {e}") for e in range(num_experts)]
                        for shape in shapes
                    ]
                ),
                "lora_B": np.zeros((count, num_experts, height, rank), dtype=np.float32),
            }
            shared["token_proj"] = np.stack([_kaiming(settings, s, "token_proj") for s in shapes])
        if shared_expert:
            shared["lora_A"] = np.stack([_kaiming(settings, s, "shared expert") for s in shapes])
            shared["lora_B"] = np.zeros((count, height, rank), dtype=np.float32)
        groups[name] = PoolGroup(tuple(shape.name for shape in shapes), experts, shared)
    return Pool(groups=groups, num_experts=num_experts, provenance=None)


def assign_nothing(settings: RunStage, pool: Pool, round_: int) -> Assignment:
    """Give the trivial assignment of a method without domain experts."""
    modules = pool.modules
    clients = settings.scenario.clients
    return Assignment(
        modules=modules,
        holders_MEK=np.zeros((len(modules), 0, clients), dtype=bool),
        scores_MEK=np.zeros((len(modules), 0, clients), dtype=np.float32),
        objective_M=np.zeros(len(modules)),
        solver="none",
        round=round_,
    )


def average(
    settings: RunStage, previous: Pool, assignment: Assignment, uploads: Iterable[Upload]
) -> Pool:
    """Average every tensor over the clients that hold it."""
    return aggregate(
        previous,
        assignment,
        uploads,
        weighting=settings.aggregation.weighting,
        population=settings.population,
    )


def start_as_sent(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "Start":
    """Start from what the server sent; only domain experts need the embedding set for embeddings.

    See :class:`fedamole.methods.Method`.
    """
    from fedamole.client import Start

    return Start(state, with_embedding_set=not state.has_experts)


def train_adapters(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
    form: "Form | None" = None,
) -> "ClientResult":
    """Train what the server sent, test it, and send all of it back.

    Parameters
    ----------
    session, client, round_, state, kept
        See :class:`fedamole.methods.Method`.
    form
        What the state is in the model; default: LoRA adapters.
    """
    from fedamole.client import ClientResult, locally_trained, report_of, upload_of
    from fedamole.forms import MIXTURE

    start = start_as_sent(session, client, round_, state)
    with locally_trained(session, client, round_, start, form or MIXTURE) as trained:
        return ClientResult(upload_of(trained), report_of(session, trained))


def train_experts(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "ClientResult":
    """Train experts, test, embed the embedding set with them; see :func:`train_adapters`."""
    from fedamole.client import (
        ClientResult,
        embeddings_of,
        locally_trained,
        report_of,
        upload_of,
    )

    start = start_as_sent(session, client, round_, state)
    with locally_trained(session, client, round_, start) as trained:
        report = report_of(session, trained)
        return ClientResult(upload_of(trained, embeddings_of(session, trained)), report)


def evaluate_adapters(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    form: "Form | None" = None,
) -> "ClientReport":
    """Test only; see :func:`fedamole.client.evaluate_client`."""
    from fedamole.client import evaluate_client
    from fedamole.forms import MIXTURE

    return evaluate_client(session, client, round_, state, form or MIXTURE)


def _kaiming(settings: RunStage, shape: ModuleShape, role: str) -> np.ndarray:
    """Draw (rank, in_features); see :func:`first_rows`."""
    return first_rows(settings, shape.name, role, settings.adapter.rank, shape.in_features)


def first_rows(
    settings: RunStage, module: str, role: str, rows: int, in_features: int
) -> np.ndarray:
    """Draw (rows, in_features) like torch.nn.Linear: uniform within 1 / sqrt(in_features).

    Every module and role has a stream of its own.
    """
    bound = 1.0 / np.sqrt(in_features)
    rng = stream(settings.seed, "pool", module, role)
    return rng.uniform(-bound, bound, size=(rows, in_features)).astype(np.float32)


def shared_of(state: ClientState) -> Tensors:
    """Give the shared tensors of a state, as a client keeps them."""
    return {name: group.shared for name, group in state.groups.items()}


def with_shared(state: ClientState, tensors: Tensors) -> ClientState:
    """Put shared tensors into a state, beside those of other names that it has."""
    groups = {
        name: replace(group, shared={**group.shared, **tensors[name]})
        for name, group in state.groups.items()
    }
    return ClientState(groups)


def only_shared(state: ClientState, names: Collection[str]) -> ClientState:
    """Leave these shared tensors in a state and no others; experts stay."""
    groups = {
        name: replace(group, shared={key: group.shared[key] for key in names})
        for name, group in state.groups.items()
    }
    return ClientState(groups)


def first_lora(settings: RunStage, state: ClientState, role: str) -> Tensors:
    """Draw one LoRA per module, of the shapes that a client was sent: A at random, B zero.

    Returns
    -------
    dict
        Group -> lora_A (M, rank, in_features), lora_B (M, out_features, rank).
    """
    found = {}
    for name, group in state.groups.items():
        sent = group.experts or group.shared
        rank, width = sent["lora_A"].shape[1:]
        lora_A = [first_rows(settings, module, role, rank, width) for module in group.modules]
        found[name] = {"lora_A": np.stack(lora_A), "lora_B": np.zeros_like(sent["lora_B"])}
    return found


def with_two_experts(state: ClientState, tensors: Tensors) -> ClientState:
    """Give a client two experts of every module and nothing else.

    Parameters
    ----------
    state
        Gives the modules.
    tensors
        Group -> tensor name -> (M, 2, ...).
    """
    groups = {}
    for name, group in state.groups.items():
        count = len(group.modules)
        experts = {key: a.reshape(2 * count, *a.shape[2:]) for key, a in tensors[name].items()}
        module_N, expert_N = np.repeat(np.arange(count), 2), np.tile([0, 1], count)
        groups[name] = ClientGroup(group.modules, experts, module_N, expert_N, shared={})
    return ClientState(groups)


def two_experts(state: ClientState) -> Tensors:
    """Undo :func:`with_two_experts`."""
    return {
        name: {key: a.reshape(-1, 2, *a.shape[1:]) for key, a in group.experts.items()}
        for name, group in state.groups.items()
    }
