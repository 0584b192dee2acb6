"""What the methods share. Methods compose these; they never import each other."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedamole.aggregation import aggregate
from fedamole.methods import Method
from fedamole.pools import (
    Assignment,
    ClientState,
    ModuleShape,
    Pool,
    PoolGroup,
    Upload,
    group_modules,
)
from fedamole.randomness import stream
from fedamole.stages import RunStage

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientSession


def adapter_method(
    init_pool: Callable[[RunStage, Sequence[ModuleShape]], Pool],
    assign: Callable[[RunStage, Pool, int], Assignment] | None = None,
) -> Method:
    """Make a method that trains LoRA adapters and averages them; without experts by default."""
    return Method(
        init_pool=init_pool,
        assign=assign or assign_nothing,
        aggregate=average,
        train_client=train_adapters,
        evaluate_client=evaluate_adapters,
    )


def init_adapters(settings: RunStage, modules: Sequence[ModuleShape], num_experts: int) -> Pool:
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
        clients=settings.scenario.clients,
    )


def train_adapters(
    session: "ClientSession", client: int, round_: int, state: ClientState
) -> "tuple[Upload, ClientReport]":
    """Train, test and embed; see :func:`fedamole.client.train_client`."""
    from fedamole.client import train_client

    return train_client(session, client, round_, state)


def evaluate_adapters(
    session: "ClientSession", client: int, round_: int, state: ClientState
) -> "ClientReport":
    """Test only; see :func:`fedamole.client.evaluate_client`."""
    from fedamole.client import evaluate_client

    return evaluate_client(session, client, round_, state)


def _kaiming(settings: RunStage, shape: ModuleShape, role: str) -> np.ndarray:
    """Draw (rank, in_features) like torch.nn.Linear: uniform within 1 / sqrt(in_features)."""
    bound = 1.0 / np.sqrt(shape.in_features)
    rng = stream(settings.seed, "pool", shape.name, role)
    size = (settings.adapter.rank, shape.in_features)
    return rng.uniform(-bound, bound, size=size).astype(np.float32)
