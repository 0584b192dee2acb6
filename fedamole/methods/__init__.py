"""What a method is, and how to find one. Torch-free until a client's function is called."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fedamole.errors import FedamoleError
from fedamole.pools import Assignment, ClientState, ModuleShape, Pool, Upload
from fedamole.registry import METHODS
from fedamole.stages import RunStage

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientSession


@dataclass(frozen=True)
class Method:
    """A federated method: five pure functions.

    A module of this package gives its methods by run name, in ``RUNS``. A variant of a method is
    :func:`dataclasses.replace` with another function.

    Attributes
    ----------
    init_pool
        (settings, modules) -> the pool before training.
    assign
        (settings, pool, round) -> who holds what in that round.
    aggregate
        (settings, previous pool, assignment, uploads) -> the pool after a round. ``uploads`` may be
        read once only, in client order.
    train_client
        (session, client, round, state) -> what the client uploads, and its metrics.
    evaluate_client
        (session, client, round, state) -> metrics of a model that is not trained here.
    """

    init_pool: Callable[[RunStage, Sequence[ModuleShape]], Pool]
    assign: Callable[[RunStage, Pool, int], Assignment]
    aggregate: Callable[[RunStage, Pool, Assignment, Iterable[Upload]], Pool]
    train_client: "Callable[[ClientSession, int, int, ClientState], tuple[Upload, ClientReport]]"
    evaluate_client: "Callable[[ClientSession, int, int, ClientState], ClientReport]"


def load(run: str) -> Method:
    """Find the method of a run.

    Raises
    ------
    FedamoleError
        If there is no such run.
    """
    modules = {row.run: row.module for row in METHODS.values()}
    if run not in modules:
        raise FedamoleError(f"run {run!r} is unknown; allowed: {', '.join(modules)}")
    runs: dict[str, Method] = import_module(f"fedamole.methods.{modules[run]}").RUNS
    return runs[run]
