"""What people see, and how the work is cut into jobs."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from fedamole.settings.section import Section

TableName = Literal[
    "main", "clients", "spread", "significance", "assignments", "sweep", "overhead", "published"
]
FigureName = Literal[
    "rounds",
    "bars",
    "sweep",
    "stability",
    "routing",
    "overhead",
    "classes",
    "experts",
    "assignment",
]
TABLE_NAMES: tuple[TableName, ...] = get_args(TableName)
FIGURE_NAMES: tuple[FigureName, ...] = get_args(FigureName)


class PublishedNumber(Section):
    """A number that a paper reports, to stand beside that of the study."""

    what: Literal["average gain", "score", "gain"]
    """Quantity: the gain of a method over the best other, averaged over scenarios; its gain in one
    scenario; or its score there."""
    method: str
    """Row of the tables."""
    scenario: str | None = None
    """Column of the tables; None for an average."""
    value: float
    """The number, in percent."""
    std: float | None = None
    """Its standard deviation, in percentage points."""
    table: str
    """Where in the source it stands."""

    @model_validator(mode="after")
    def _of_one_or_all(self) -> "PublishedNumber":
        if (self.scenario is None) != (self.what == "average gain"):
            verb = "takes no" if self.scenario else "needs a"
            raise ValueError(f"published: {self.what} {verb} scenario")
        return self


class PublishedSettings(Section):
    """What a paper reports. Numbers that are not known are not here."""

    source: str
    """The paper, with its version."""
    setting: str = ""
    """What the numbers were measured on: model, rounds, clients."""
    numbers: list[PublishedNumber] = Field(min_length=1)
    """The numbers."""


def _once(names: Any) -> Any:
    """Refuse a list that names something twice."""
    for name in names if isinstance(names, list) else []:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands twice")
    return names


class TablesSettings(Section):
    """What the tables and figures show. Nothing here trains."""

    show: Annotated[list[TableName] | None, BeforeValidator(_once)] = None
    """Tables to draw; default: all that the study has numbers for, but for the overhead."""
    figures: Annotated[list[FigureName] | None, BeforeValidator(_once)] = None
    """Figures to draw; default: all that the study has numbers for, but for the overhead and the
    routing map."""
    published: PublishedSettings | None = None
    """Numbers of a paper to stand beside those of the study: the path of a YAML file, or the
    section itself."""
    round: Literal["last", "best"] = "last"
    """Round that counts: the last one, or the best by mean evaluation loss."""
    reference: str = "fedamole"
    """Method whose gain over the best of the others is given."""
    rivals: Annotated[list[str] | None, BeforeValidator(_once)] = None
    """Methods that the gain is over; default: all others. Without the variants of the reference the
    gain is one over other approaches, as papers give it."""
    decimals: int = Field(default=2, ge=0, le=6)
    """Decimals of the printed numbers (metrics in percent)."""


class ExecutionSettings(Section):
    """How the work is cut into jobs. Nothing here changes a number."""

    clients_per_job: int | Literal["all"] = "all"
    """Clients of one round that one job trains: 1, n, or all."""
    clients_at_once: int = Field(default=1, ge=1)
    """Clients that a job trains side by side, each with ranks of its own; the others wait."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of a job on a cluster. Its processes, clients_at_once * ranks, are spread evenly over
    them."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a job on all its nodes together: 0 (CPU), or at least one for each process."""
    mem_mb: int | None = Field(default=None, ge=100)
    """Memory per node that a job asks for, in MB; default: from the size of the model. Half as much
    again with every retry."""
    runtime: int | None = Field(default=None, ge=1)
    """Time that a job asks for, in minutes; default: a generous estimate from the size of the model
    and the work. Twice as much with every retry."""

    @model_validator(mode="after")
    def _positive(self) -> "ExecutionSettings":
        if self.clients_per_job != "all" and self.clients_per_job < 1:
            raise ValueError(f"clients_per_job {self.clients_per_job} must be at least 1, or all")
        if self.clients_per_job != "all" and self.clients_at_once > self.clients_per_job:
            raise ValueError(
                f"clients_at_once {self.clients_at_once} must not exceed clients_per_job "
                f"{self.clients_per_job}"
            )
        if self.gpus % self.nodes:
            raise ValueError(f"gpus {self.gpus} must be a multiple of nodes {self.nodes}")
        return self

    def processes(self, ranks: int) -> int:
        """Processes of a job whose clients take so many ranks each."""
        return self.clients_at_once * ranks
