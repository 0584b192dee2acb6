"""A config file: a whole study, validated before anything runs (torch-free)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from fedamole import sweeps
from fedamole.backbone_limits import check_length
from fedamole.config_files import named, plain, with_base
from fedamole.errors import FedamoleError
from fedamole.mistakes import explain
from fedamole.participation import Participation
from fedamole.registry import RUNS, lookup
from fedamole.settings import (
    GENERATED_POSITIONS,
    AdapterSettings,
    AggregationSettings,
    AssignmentSettings,
    BackboneSettings,
    EvaluationSettings,
    ExecutionSettings,
    FdloraSettings,
    FedapenSettings,
    ParticipationSettings,
    PrivacySettings,
    PromptSettings,
    ScenarioSettings,
    Section,
    TablesSettings,
    TrainingSettings,
)
from fedamole.settings.section import Slug
from fedamole.shown import check_shown

SectionT = TypeVar("SectionT", bound=Section)
# Folders that the workflow makes in that of the results.
FOLDERS = (
    "backbones",
    "benchmarks",
    "figures",
    "logs",
    "metrics",
    "progress",
    "runs",
    "scenarios",
    "study",
    "tables",
)


@dataclass(frozen=True)
class Point:
    """A column of the tables: a scenario of the config, under one combination of a sweep.

    Attributes
    ----------
    scenario
        The population, under the name of the column.
    data
        The population whose split and tokens it uses, under the name that these have.
    base
        Name of the scenario of the config.
    values
        What the sweep sets; empty without one.
    config
        The settings that hold here.
    """

    scenario: ScenarioSettings
    data: ScenarioSettings
    base: str
    values: sweeps.Values
    config: "Config"


class Config(Section):
    """A whole study: scenarios x seeds x methods over one backbone."""

    results: str = Field(default="results", pattern=r"^[^{}*?\[\]]+$")
    """Folder for everything that is produced."""
    study: Slug | None = None
    """Name of the study: its tables and figures stand in a folder of that name. Studies with names
    may share a results folder, and train once what they have in common, where scenarios of equal
    name have equal settings in all of them; runs have no name of a study in their paths."""
    seeds: list[int] = Field(default=[42], min_length=1)
    """Root seeds; each gives its own split, pool and training order."""
    rounds: int = Field(default=30, ge=1)
    """Federated rounds R."""
    backbone: BackboneSettings
    """The language model: a name (configs/models), the path of a file, or the section itself."""
    scenarios: list[ScenarioSettings] = Field(min_length=1)
    """The federated populations."""
    methods: list[str] = Field(min_length=1)
    """Rows of the tables."""
    sweep: dict[str, list[Any]] = {}
    """Settings that vary, one or two, by their paths, such as training.learning_rate or
    scenarios.clients, each with its values. Every combination makes a column of every scenario."""
    adapter: AdapterSettings = AdapterSettings()
    """The trainable part."""
    assignment: AssignmentSettings = AssignmentSettings()
    """Who holds which experts."""
    aggregation: AggregationSettings = AggregationSettings()
    """How the server averages."""
    training: TrainingSettings = TrainingSettings()
    """Local training."""
    participation: ParticipationSettings = ParticipationSettings()
    """Which clients take part in a round."""
    privacy: PrivacySettings = PrivacySettings()
    """What hides a client's data in its uploads."""
    prompt: PromptSettings = PromptSettings()
    """Soft prompts (fedprompt, fedptuning)."""
    fdlora: FdloraSettings = FdloraSettings()
    """FDLoRA."""
    fedapen: FedapenSettings = FedapenSettings()
    """FedAPEN."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Testing."""
    tables: TablesSettings = TablesSettings()
    """Tables and figures."""
    execution: ExecutionSettings = ExecutionSettings()
    """Jobs."""
    mode: Literal["train", "cached"] = "train"
    """`cached` draws tables and figures from metrics that are there already: no rule that trains,
    or reads a model or data, exists then."""
    cache: str | None = None
    """Folder with the metrics that `cached` reads; default: metrics in the results folder."""
    stale: Literal["refuse", "accept"] = "refuse"
    """What `cached` does with metrics of an older version of the code."""
    base: str | None = None
    """Config file that this one adds to, as a path beside it: sections are merged setting by
    setting, lists and everything else replaced."""

    @field_validator("results")
    @classmethod
    def _results_is_a_plain_folder(cls, results: str) -> str:
        if results.startswith("~"):
            raise ValueError(f"results {results!r} must not start with ~; write the whole path")
        return results.rstrip("/") or "/"

    @field_validator("study")
    @classmethod
    def _study_is_no_folder_of_the_results(cls, study: str | None) -> str | None:
        if study in FOLDERS:
            raise ValueError(
                f"study {study!r} is the name of a folder that the results have; take another one "
                f"than {', '.join(FOLDERS)}"
            )
        return study

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Config":
        lists: dict[str, list[Any]] = {
            "scenario": [scenario.slug for scenario in self.scenarios],
            "method": self.methods,
            "seed": self.seeds,
        }
        for what, names in lists.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{what} {twice[0]!r} stands twice; each needs a name of its own")
        return self

    @model_validator(mode="after")
    def _methods_can_run(self) -> "Config":
        try:
            rows = [lookup(method) for method in self.methods]
        except FedamoleError as error:
            raise ValueError(str(error)) from error
        if any(row.assigns for row in rows):
            for scenario in self.scenarios:
                drawn = Participation(self.participation, scenario.clients, self.seeds[0]).size
                failing = self.assignment.infeasibility(drawn, self.adapter.top_k)
                if failing:
                    few = drawn < scenario.clients
                    raise ValueError(
                        f"no assignment exists for scenario {scenario.slug}: "
                        f"{failing} does not hold"
                        + f"; of {scenario.clients} clients {drawn} are drawn for a round"
                        * few
                    )
        return self

    @model_validator(mode="after")
    def _sequences_fit_the_backbone(self) -> "Config":
        size = self.backbone.size
        positions = size.max_position_embeddings if size else None
        if self.backbone.generate:
            positions = GENERATED_POSITIONS
        # A prompt of fedprompt has as many tokens as its text, which the tokenizer will tell.
        virtual_tokens = self.prompt.virtual_tokens if "fedptuning" in self.runs() else 0
        for scenario in self.scenarios:
            generated = scenario.dataset.task == "generation"
            new_tokens = self.evaluation.max_new_tokens if generated else 0
            try:
                check_length(
                    self.backbone.name,
                    positions,
                    scenario.max_length,
                    new_tokens,
                    virtual_tokens,
                )
            except FedamoleError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Config":
        if (
            "reference" in self.tables.model_fields_set
            and self.tables.reference not in self.methods
        ):
            raise ValueError(
                f"tables: reference {self.tables.reference!r} is not among the methods "
                f"{', '.join(self.methods)}"
            )
        others = [method for method in self.methods if method != self.tables.reference]
        if strange := [rival for rival in self.tables.rivals or [] if rival not in others]:
            raise ValueError(
                f"tables: rivals: {strange[0]!r} is not among the other methods {', '.join(others)}"
            )
        if self.tables.round == "best" and self.participation != ParticipationSettings():
            raise ValueError(
                "tables: round best compares rounds in which all clients take part; with "
                "participation: fraction, dropout_rate or quorum below 1 only last is possible"
            )
        if conflict := self.privacy.conflict(self.training, self.aggregation):
            raise ValueError(conflict)
        self._check_packs()
        if unused := self._privacy_of_nothing():
            raise ValueError(unused)
        execution, ranks = self.execution, self.training.ranks
        processes = execution.processes(ranks)
        if processes % execution.nodes:
            raise ValueError(
                f"execution: nodes {execution.nodes} must divide the processes of a job, "
                f"clients_at_once * ranks = {execution.clients_at_once} * {ranks} = {processes}"
            )
        if ranks > 1 and max(processes // execution.nodes, ranks) % min(
            processes // execution.nodes, ranks
        ):
            raise ValueError(
                f"execution: nodes {execution.nodes} cut the {ranks} ranks of a client unevenly; "
                "give every client whole nodes, or several clients one node"
            )
        if 0 < execution.gpus < processes:
            raise ValueError(
                f"execution: gpus {execution.gpus} must be 0 (CPU) or at least "
                f"clients_at_once * training: ranks = {processes}"
            )
        datasets = {scenario.dataset.name: scenario.dataset for scenario in self.scenarios}
        for scenario in self.scenarios:
            if datasets[scenario.dataset.name] != scenario.dataset:
                raise ValueError(
                    f"data set name {scenario.dataset.name!r} stands for two different data sets"
                )
        return self

    def _check_packs(self) -> None:
        """Refuse packs that would depend on how clients are cut into jobs, or that cannot be."""
        training, per_job = self.training, self.execution.clients_per_job
        if training.pack_clients == 1:
            return
        if self.privacy.dp_sgd:
            raise ValueError(
                f"training: pack_clients {training.pack_clients} must be 1 with privacy: dp_sgd, "
                "which clips every example by itself"
            )
        if per_job != "all" and per_job % training.pack_clients:
            raise ValueError(
                f"execution: clients_per_job {per_job} must be a multiple of training: "
                f"pack_clients {training.pack_clients}, or all: a pack trains in one job"
            )
        for run in self.runs():
            if RUNS[run].trains and not RUNS[run].packs:
                try:
                    _ = training.one_by_one
                except ValidationError as error:
                    reason = str(error.errors()[0].get("ctx", {}).get("error", error))
                    raise ValueError(
                        f"training: clients of {run} cannot be packed, and one by one {reason}"
                    ) from error

    def _privacy_of_nothing(self) -> str | None:
        """Name a kind of privacy that no method has a use for: it would protect nobody."""
        rows = [lookup(method) for method in self.methods]
        if self.privacy.embeddings and not any(row.assigns for row in rows):
            what = "embeddings: no method uploads embeddings; those with domain experts do"
        elif self.privacy.dp_sgd and not any(row.trains for row in rows):
            what = "dp_sgd: no method trains"
        else:
            return None
        return f"privacy: {what}; leave it out (methods: {', '.join(self.methods)})"

    @model_validator(mode="after")
    def _points_are_possible(self) -> "Config":
        if not self.sweep:
            return self
        try:
            sweeps.check(self.sweep)
            _ = self.points
        except FedamoleError as error:
            raise ValueError(str(error)) from error
        return self

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> "Config":
        """A copy, with other settings; it works out its points anew."""
        copied = super().model_copy(update=update, deep=deep)
        for name in ("points", "_slugs", "_populations"):
            copied.__dict__.pop(name, None)
        return copied

    @functools.cached_property
    def points(self) -> dict[str, Point]:
        """Map the name of every column to its point, scenario by scenario.

        Raises
        ------
        FedamoleError
            If two points have one name, or the settings of one are impossible.
        """
        found: dict[str, Point] = {}
        for scenario in self.scenarios:
            for values in sweeps.points(self.sweep):
                point = self._point(scenario, values) if values else self._only_point(scenario)
                name = point.scenario.slug
                if name in found:
                    raise FedamoleError(
                        f"sweep: two columns would be called {name!r}; give the scenarios names"
                    )
                found[name] = point
        return found

    def _only_point(self, scenario: ScenarioSettings) -> Point:
        """The point of a scenario without a sweep."""
        return Point(scenario, scenario, scenario.slug, {}, self)

    def _point(self, scenario: ScenarioSettings, values: sweeps.Values) -> Point:
        """The point of a scenario under some values."""
        own, others = sweeps.split(values)
        where = "sweep: " + ", ".join(
            f"{key} {sweeps.shown(value)}" for key, value in values.items()
        )
        data = parse(ScenarioSettings, sweeps.changed(_given(scenario), _below(own)), where)
        data = _renamed(data, own)
        settings = sweeps.changed(_given(self), others) | {"sweep": {}, "scenarios": [_given(data)]}
        config = parse(Config, settings, where)
        return Point(_renamed(data, others), data, scenario.slug, values, config)

    def at(self, slug: str) -> "Config":
        """The settings that hold in a scenario slug (with the seed)."""
        return self._slugs[slug][0].config

    @property
    def output(self) -> str:
        """Folder for tables and figures."""
        return f"{self.results}/{self.study}" if self.study else self.results

    def variants(self) -> "list[Config]":
        """The settings that hold somewhere: these without a sweep, else those of every point."""
        return [point.config for point in self.points.values()] if self.sweep else [self]

    def data_slug(self, slug: str) -> str:
        """Slug of the population whose split and tokens a scenario slug uses."""
        if slug not in self._slugs:
            return slug  # It is one itself.
        point, seed = self._slugs[slug]
        return point.data.seeded_slug(seed)

    @functools.cached_property
    def _slugs(self) -> dict[str, tuple[Point, int]]:
        """Map every scenario slug to its point and seed."""
        return {
            point.scenario.seeded_slug(seed): (point, seed)
            for point in self.points.values()
            for seed in self.seeds
        }

    def scenario_seeds(self) -> dict[str, tuple[ScenarioSettings, int]]:
        """Map the slug of every (column, seed) to the population and the seed, in config order."""
        return {slug: (point.scenario, seed) for slug, (point, seed) in self._slugs.items()}

    def data_seeds(self) -> dict[str, tuple[ScenarioSettings, int]]:
        """Map the slug of every (population, seed) to both: what is split and tokenised, once."""
        return self._populations

    @functools.cached_property
    def _populations(self) -> dict[str, tuple[ScenarioSettings, int]]:
        """See :meth:`data_seeds`; every stage of every run looks its population up."""
        return {
            point.data.seeded_slug(seed): (point.data, seed) for point, seed in self._slugs.values()
        }

    def runs(self) -> list[str]:
        """Federated runs that the methods need, each once, in config order."""
        return list(dict.fromkeys(lookup(method).run for method in self.methods))


def load_config(
    raw: Mapping[str, Any], library: Path, origin: str = "config", beside: Sequence[Path] = ()
) -> Config:
    """Validate a config and put the files it names in their places.

    Parameters
    ----------
    raw
        The parsed YAML.
    library
        Folder with ``datasets/``, ``models/`` and ``deepspeed/``, where names are looked up.
    origin
        What to call the config in an error.
    beside
        Folders in which its base file is looked for, besides the current one.

    Raises
    ------
    FedamoleError
        In one line per mistake: the setting, its value, and what is allowed.
    """
    if not isinstance(raw, Mapping):
        raise FedamoleError(f"{origin}: holds no settings; a mapping of names to values is needed")
    data = with_base(plain(raw), beside, origin)
    if "backbone" in data:
        data["backbone"] = named(data["backbone"], library / "models", "backbone", origin)
    scenarios = data.get("scenarios")
    for scenario in scenarios if isinstance(scenarios, list) else []:
        if isinstance(scenario, dict) and "dataset" in scenario:
            where = f"scenarios: dataset of {scenario.get('name') or scenario.get('partition')}"
            scenario["dataset"] = named(
                scenario.get("dataset"), library / "datasets", where, origin
            )
    for section, key, folder in (
        ("training", "deepspeed", "deepspeed"),
        ("tables", "published", "paper"),
    ):
        part = data.get(section)
        if isinstance(part, dict) and key in part:
            part[key] = named(part[key], library / folder, f"{section}: {key}", origin)
    config = parse(Config, data, origin)
    # Not a matter of Config itself: points of a sweep are configs, and have no sweep to show.
    try:
        check_shown(config)
    except FedamoleError as error:
        raise FedamoleError(f"{origin}: {error}") from error
    return config


def load_named(section: type[SectionT], value: Any, folder: Path, what: str) -> SectionT:
    """Validate a section that a config may name: by the name or path of its file, or itself.

    Raises
    ------
    FedamoleError
        See :func:`load_config`.
    """
    origin = value if isinstance(value, str) else what
    return parse(section, named(plain(value), folder, what, origin), origin)


def parse(section: type[SectionT], data: Any, origin: str) -> SectionT:
    """Validate data (a mapping, or its JSON text) as a section.

    Raises
    ------
    FedamoleError
        See :func:`load_config`.
    """
    try:
        if isinstance(data, str):
            return section.model_validate_json(data)
        return section.model_validate(data)
    except ValidationError as error:
        lines = explain(section, error.errors())
        raise FedamoleError("\n".join(f"{origin}: {line}" for line in lines)) from error


def _renamed(scenario: ScenarioSettings, values: sweeps.Values) -> ScenarioSettings:
    """The same population under a name that says some values; under its own if it says them."""
    says = () if scenario.name else ("scenarios.partition",)
    tags = [sweeps.tag(key, value) for key, value in values.items() if key not in says]
    name = "-".join([scenario.slug, *tags])
    return scenario.model_copy(update={"name": name}) if tags else scenario


def _given(section: Section) -> dict[str, Any]:
    """What was set in a section, as plain data."""
    return section.model_dump(mode="json", exclude_unset=True)


def _below(values: sweeps.Values) -> sweeps.Values:
    """Paths without their first part."""
    return {key.partition(".")[2]: value for key, value in values.items()}
