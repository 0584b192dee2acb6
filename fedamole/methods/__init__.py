"""What a method is, and how to find one. Torch-free until a client's function is called."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fedamole.errors import FedamoleError
from fedamole.pools import Assignment, ClientState, KeptState, Pool, Upload
from fedamole.registry import RUNS
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientResult, ClientSession, Start


@dataclass(frozen=True)
class Method:
    """A federated method: five pure functions.

    A module of this package gives its methods by run name, in ``RUNS``. A variant of a method is
    :func:`dataclasses.replace` with another function.

    Attributes
    ----------
    init_pool
        (settings, facts of the backbone) -> the pool before training.
    assign
        (settings, pool, round) -> who holds what in that round.
    aggregate
        (settings, previous pool, assignment, uploads) -> the pool after a round. ``uploads`` may be
        read once only, in client order; those of clients that dropped out are missing. A large pool
        comes some modules at a time, so that no module may depend on another.
    train_client
        (session, client, round, state, kept) -> what the client uploads, its metrics, and what it
        keeps for itself. ``kept`` is what it kept the last time it took part; None the first time,
        and for methods whose clients keep nothing.
    evaluate_client
        (session, client, round, state) -> metrics of a model that is not trained here.
    start
        (session, client, round, state, kept) -> what ``train_client`` trains from; None for a
        method whose clients cannot be trained in a pack. It goes with ``Run.packs`` of the
        registry, and needs LoRA experts as the form of what is trained.
    """

    init_pool: Callable[[RunStage, BackboneFacts], Pool]
    assign: Callable[[RunStage, Pool, int], Assignment]
    aggregate: Callable[[RunStage, Pool, Assignment, Iterable[Upload]], Pool]
    train_client: "Callable[[ClientSession, int, int, ClientState, KeptState | None], ClientResult]"
    evaluate_client: "Callable[[ClientSession, int, int, ClientState], ClientReport]"
    start: "Callable[[ClientSession, int, int, ClientState, KeptState | None], Start] | None" = None


def load(run: str) -> Method:
    """Find the method of a run.

    Raises
    ------
    FedamoleError
        If there is no such run.
    """
    if run not in RUNS:
        raise FedamoleError(f"run {run!r} is unknown; allowed: {', '.join(RUNS)}")
    methods: dict[str, Method] = import_module(f"fedamole.methods.{RUNS[run].module}").RUNS
    return methods[run]
