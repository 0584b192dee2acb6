"""Records of a metrics file, the only interface between training and the tables (torch-free).

A metrics file, one per scenario, seed and method, is JSON lines: the header of kind
:data:`KIND`, then the records below in any order: one run, one partition, a client record (or a
dropout) per client and round, and an assignment record per round for a method with experts.
"""

from typing import Literal

from pydantic import Field

from fedamole.settings import Section

KIND = "metrics-table"
METRIC_LABELS = {"accuracy": "accuracy", "rouge_l": "ROUGE-L"}


class RunRecord(Section):
    """Which run the file is about."""

    record: Literal["run"] = "run"
    """Kind of the record."""
    scenario: str
    """Slug of the scenario, with the seed."""
    seed: int
    """Root seed."""
    method: str
    """Row of the tables."""
    metric: Literal["accuracy", "rouge_l"]
    """What the scores are."""
    clients: int = Field(ge=1)
    """Number of clients K."""
    rounds: int = Field(ge=0)
    """Federated rounds R."""
    evaluated: Literal["local", "aggregated"]
    """Model that was tested; see :class:`fedamole.registry.Row`."""
    took_part: dict[int, list[int]] | None = None
    """Round -> clients that worked in it and are tested after it; None if all did in all rounds."""


class PartitionRecord(Section):
    """How many examples of each class each client has."""

    record: Literal["partition"] = "partition"
    """Kind of the record."""
    classes: list[str]
    """Names of the classes."""
    counts: list[list[int]]
    """Examples, clients x classes."""


class DropoutRecord(Section):
    """A client that failed in a round; the round went on without it."""

    record: Literal["dropout"] = "dropout"
    """Kind of the record."""
    round: int = Field(ge=1)
    """Round."""
    client: int = Field(ge=0)
    """Client."""
    reason: str
    """Why, in one line."""


class ClientRecord(Section):
    """One client's numbers in one round."""

    record: Literal["client"] = "client"
    """Kind of the record."""
    round: int = Field(ge=0)
    """Round; 0 is before training."""
    client: int = Field(ge=0)
    """Client."""
    eval_loss: float
    """Mean loss of a response token on the evaluation set, in nats."""
    score: float = Field(ge=0, le=1)
    """The metric on the test set, in [0, 1]."""
    num_train: int | None
    """Training examples."""
    num_eval: int
    """Evaluation examples."""
    num_test: int
    """Test examples."""
    train_loss_first: float | None
    """Training loss of the first step of the round, in nats; None where nothing was trained."""
    train_loss_last: float | None
    """Training loss of the last step of the round, in nats."""
    steps: int | None
    """Optimizer steps of the round."""
    epsilon: float | None = Field(default=None, ge=0)
    """Differential privacy that the client has spent in all rounds so far; None if it trains
    without."""
    delta: float | None = None
    """Probability with which the bound epsilon may fail."""


class AssignmentRecord(Section):
    """Who held which domain experts in one round."""

    record: Literal["assignment"] = "assignment"
    """Kind of the record."""
    round: int = Field(ge=0)
    """Round that was trained under the assignment."""
    modules: list[str] = Field(min_length=1)
    """Names of the M target modules."""
    num_experts: int = Field(ge=1)
    """Domain experts E per module."""
    holders: list[list[list[int]]]
    """Clients that hold each expert, modules x experts x holders."""
    objective: list[float | None]
    """Sum of the scores of the held experts, one per module; None if no score was maximised."""
    optimum: list[float] | None = None
    """Largest sum of scores under the capacities of the config, one per module; None if unknown."""
    chance: list[float] | None = None
    """Sum of scores that a random assignment has in expectation, one per module."""
    min_experts: int | None = None
    """Fewest domain experts a client may hold per module, if known."""
    max_experts: int | None = None
    """Most domain experts a client may hold per module, if known."""
    map: list[list[float] | None] | None = None
    """Place [x, y] of each client by its routing logits, None for one without scores; see
    :mod:`fedamole.routing_map`. The scores of round 1 are random. None if unknown."""
    map_shares: list[float] | None = None
    """Share of the variance of the routing logits along x and along y, in [0, 1]."""

    def held(self, module: int, client: int) -> frozenset[int]:
        """Domain experts of a module that a client holds."""
        experts = enumerate(self.holders[module])
        return frozenset(expert for expert, clients in experts if client in clients)


RECORDS: dict[str, type[Section]] = {
    "run": RunRecord,
    "partition": PartitionRecord,
    "dropout": DropoutRecord,
    "client": ClientRecord,
    "assignment": AssignmentRecord,
}
