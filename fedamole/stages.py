"""What each stage of the pipeline depends on, as one section whose JSON is its ``params``.

The digest of that JSON stands in the header of all files the stage writes. Files of a run that was
made with other settings are thereby recognised, also where Snakemake's own records are lost.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fedamole.config import Config, SectionT
from fedamole.participation import Participation
from fedamole.randomness import stream
from fedamole.registry import RUNS, Run, Use, lookup
from fedamole.settings import (
    AdapterSettings,
    AggregationSettings,
    AssignmentSettings,
    BackboneLoading,
    BackboneSettings,
    BackboneSource,
    DatasetSettings,
    EvaluationSettings,
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

# Raised when a change of the code, or of a default, changes what the stage writes. What changes one
# method only raises the version of its run in the registry.
VERSIONS = {
    "backbone": 1,
    "scenario": 1,
    "tokens": 1,
    "run": 2,
    "client": 2,
    "results": 3,
    "study": 1,
}


class Versions(Section):
    """Versions of the stages that a metrics file comes from."""

    backbone: int
    """Of ``prepare-backbone``."""
    scenario: int
    """Of ``partition``."""
    tokens: int
    """Of ``tokenize``."""
    run: int
    """Of the server's commands, with that of the run itself added."""
    client: int
    """Of the clients' commands."""


class BackboneStage(Section):
    """Settings of ``prepare-backbone``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    backbone: BackboneSource
    """Where the model comes from."""
    corpus: list[DatasetSettings] = []
    """Data sets that train the tokenizer of a generated backbone; empty for all others."""


class ScenarioStage(Section):
    """Settings of ``partition``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    scenario: ScenarioSettings
    """The population."""
    seed: int
    """Root seed."""

    @property
    def label(self) -> str:
        """Slug of the scenario with its seed."""
        return self.scenario.seeded_slug(self.seed)


class TokensStage(Section):
    """Settings of ``tokenize``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    scenario: ScenarioStage
    """The population and its split."""
    backbone: BackboneStage
    """The model that brings the tokenizer."""


class RunStage(Section):
    """Settings of a federated run: ``init-server``, ``aggregate`` and ``assign``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    run: str
    """Name of the run; see :mod:`fedamole.registry`."""
    tokens: TokensStage
    """The data and the backbone."""
    loading: BackboneLoading = BackboneLoading()
    """How the backbone is loaded."""
    adapter: AdapterSettings
    """The trainable part."""
    assignment: AssignmentSettings
    """Who holds which experts."""
    aggregation: AggregationSettings
    """How the server averages."""
    training: TrainingSettings
    """Local training."""
    participation: ParticipationSettings = ParticipationSettings()
    """Which clients take part in a round."""
    privacy: PrivacySettings = PrivacySettings()
    """What hides a client's data in its uploads."""
    prompt: PromptSettings = PromptSettings()
    """Soft prompts."""
    fdlora: FdloraSettings = FdloraSettings()
    """FDLoRA."""
    fedapen: FedapenSettings = FedapenSettings()
    """FedAPEN."""

    @property
    def label(self) -> str:
        """What log lines are about: scenario, seed and run."""
        return f"{self.tokens.scenario.label} {self.run}"

    @property
    def seed(self) -> int:
        """Root seed of the scenario."""
        return self.tokens.scenario.seed

    @property
    def scenario(self) -> ScenarioSettings:
        """The population."""
        return self.tokens.scenario.scenario

    @property
    def backbone(self) -> BackboneSettings:
        """The model."""
        source, loading = self.tokens.backbone.backbone, self.loading
        return BackboneSettings(**source.model_dump(), **loading.model_dump())

    def steps_of(self, client: int, num_examples: float) -> int:
        """Optimizer steps of a client in a round; where data are pooled those of all clients.

        Parameters
        ----------
        client
            Index of the client.
        num_examples
            Examples that it trains on.
        """
        if self.population.pooled and not self.training.local_epochs:
            return sum(self._own_steps(k, num_examples) for k in range(self.scenario.clients))
        return self._own_steps(client, num_examples)

    def _own_steps(self, client: int, num_examples: float) -> int:
        """Steps of a client's own device."""
        fewest, most = self.training.min_steps, self.training.most_steps(num_examples)
        if fewest is None:
            return most
        return int(stream(self.seed, "steps", client).integers(fewest, most + 1))

    @property
    def population(self) -> Participation:
        """Who takes part in which round."""
        pooled, clients = RUNS[self.run].pooled, self.scenario.clients
        return Participation(self.participation, clients, self.seed, pooled)


class ClientStage(Section):
    """Settings of ``train-clients`` and ``evaluate-clients``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    run: RunStage
    """The federated run."""
    evaluation: EvaluationSettings
    """Testing."""


class SweepPoint(Section):
    """A column of a sweep."""

    base: str
    """Name of the scenario that the sweep varies."""
    values: dict[str, Any]
    """Path of a setting -> its value here."""


class ResultsStage(Section):
    """Settings of ``tables`` and ``figures``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    tables: TablesSettings
    """What is shown."""
    methods: list[str]
    """Rows, in order."""
    scenarios: dict[str, list[str]]
    """Columns, in order: scenario name -> slugs of its seeds."""
    metrics: dict[str, str]
    """Scenario name -> metric: accuracy or rouge_l."""
    sweep: dict[str, SweepPoint] = {}
    """Scenario name -> what a sweep sets there; empty without a sweep."""
    digests: dict[str, dict[str, str]] = {}
    """Slug -> method -> digest of the :class:`ClientStage` that its metrics must come from."""


class StudyStage(Section):
    """Settings of ``describe-study``: all of them."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    config: Config
    """The study, without the folder of its results."""


def versions_of(run: str) -> Versions:
    """Versions of this code for a run."""
    versions = {stage: VERSIONS[stage] for stage in Versions.model_fields}
    return Versions(**{**versions, "run": VERSIONS["run"] + RUNS[run].version})


def _version(stage: str, versions: Versions | None) -> int:
    """Version of a stage that does not know its run; None: of this code."""
    return VERSIONS[stage] if versions is None else int(getattr(versions, stage))


def backbone_stage(config: Config, versions: Versions | None = None) -> BackboneStage:
    """Settings of ``prepare-backbone``.

    Parameters
    ----------
    config
        The study.
    versions
        Those of the code that a file was made by, here and for the stages below; None: of this
        code.
    """
    corpus: dict[str, DatasetSettings] = {}
    if config.backbone.generate:
        corpus = {scenario.dataset.name: scenario.dataset for scenario in config.scenarios}
    source = _part(config.backbone, BackboneSource)
    version = _version("backbone", versions)
    return BackboneStage(version=version, backbone=source, corpus=list(corpus.values()))


def scenario_stage(
    config: Config, scenario: str, versions: Versions | None = None
) -> ScenarioStage:
    """Settings of ``partition`` for a scenario slug."""
    settings, seed = config.data_seeds()[config.data_slug(scenario)]
    return ScenarioStage(version=_version("scenario", versions), scenario=settings, seed=seed)


def tokens_stage(config: Config, scenario: str, versions: Versions | None = None) -> TokensStage:
    """Settings of ``tokenize`` for a scenario slug."""
    return TokensStage(
        version=_version("tokens", versions),
        scenario=scenario_stage(config, scenario, versions),
        backbone=backbone_stage(config, versions),
    )


def run_stage(
    config: Config, scenario: str, run: str, versions: Versions | None = None
) -> RunStage:
    """Settings of the server's commands for a scenario slug and a run.

    What a run does not use keeps its default: a change of the assignment reruns no baseline.
    """
    facts, here = RUNS[run], config.at(scenario)
    adapter = here.adapter if facts.adapts else AdapterSettings()
    if not facts.assigns:
        adapter = AdapterSettings(**adapter.model_dump(exclude={"top_k", "balance_weight"}))
    training = _training_of(here.training, facts)
    privacy = PrivacySettings(
        embeddings=here.privacy.embeddings if facts.assigns else None,
        dp_sgd=here.privacy.dp_sgd if facts.trains else None,
    )
    return RunStage(
        version=(versions or versions_of(run)).run,
        run=run,
        tokens=tokens_stage(config, scenario, versions),
        loading=_part(config.backbone, BackboneLoading),
        adapter=adapter,
        assignment=here.assignment if facts.assigns else AssignmentSettings(),
        aggregation=_weighting(here.aggregation, facts),
        training=training,
        participation=_settled_beforehand(here, run),
        privacy=privacy,
        **_used(here, facts.uses),
    )


def _training_of(training: TrainingSettings, facts: Run) -> TrainingSettings:
    """What of the training matters to a run."""
    if not facts.trains:
        return _untrained(training)
    if training.pack_clients == 1:
        return training
    if not facts.packs:
        return training.one_by_one
    # Every rank takes packs of its own, without DeepSpeed: neither changes a number.
    default = TrainingSettings.model_fields["deepspeed"].get_default()
    return training.model_copy(update={"ranks": 1, "deepspeed": default})


def _weighting(aggregation: AggregationSettings, facts: Run) -> AggregationSettings:
    """How the server averages, as far as it matters: without experts, tokens mean examples."""
    if not (facts.trains and facts.averages):
        return AggregationSettings()
    if aggregation.weighting == "tokens" and not facts.assigns:
        return AggregationSettings(weighting="examples")
    return aggregation


def _used(config: Config, uses: Iterable[Use]) -> dict[str, Section]:
    """What only some runs depend on: whole sections, or defaults with single settings replaced."""
    found: dict[str, Section] = {}
    for use in uses:
        name, _, setting = use.partition(".")
        given: Section = getattr(config, name)
        if setting:
            start = found.get(name, type(given)())
            given = start.model_copy(update={setting: getattr(given, setting)})
        found[name] = given
    return found


def _participation(config: Config, run: str) -> ParticipationSettings:
    """Who takes part in a run: the default where there are no clients to choose from."""
    facts = RUNS[run]
    federated = facts.trains and not facts.pooled
    return config.participation if federated else ParticipationSettings()


def _settled_beforehand(config: Config, run: str) -> ParticipationSettings:
    """Who takes part, without the quorum where it only decides whether a study goes on.

    It changes no number then, and may be lowered late: nothing reruns. Simulated dropouts stop at
    the quorum, so with them it is part of the settings.
    """
    participation = _participation(config, run)
    if participation.dropout_rate:
        return participation
    return ParticipationSettings(**participation.model_dump(exclude={"quorum"}))


def quorum_of(config: Config, run: str) -> float:
    """Share of the drawn clients that must report in every round of a run."""
    return _participation(config, run).quorum


def with_quorum(stage: RunStage, quorum: float | None) -> RunStage:
    """A run under the quorum that holds now: to decide with, never to take the digest of.

    Parameters
    ----------
    stage
        The settings that the files of the run were made with.
    quorum
        See :func:`quorum_of`; None: that of the settings.
    """
    if quorum is None:
        return stage
    participation = stage.participation.model_copy(update={"quorum": quorum})
    return stage.model_copy(update={"participation": participation})


def _untrained(training: TrainingSettings) -> TrainingSettings:
    """What of the training matters to a model that is only tested."""
    kept = {"cpu_threads"}
    if training.zero_stage == 3:
        # A model that is cut over ranks to be trained may not fit one of them to be tested.
        kept |= {"ranks", "deepspeed"}
        return TrainingSettings(batch_size=training.ranks, **training.model_dump(include=kept))
    return TrainingSettings(**training.model_dump(include=kept))


def client_stage(
    config: Config, scenario: str, run: str, versions: Versions | None = None
) -> ClientStage:
    """Settings of the clients' commands for a scenario slug and a run."""
    return ClientStage(
        version=_version("client", versions),
        run=run_stage(config, scenario, run, versions),
        evaluation=config.at(scenario).evaluation,
    )


def results_stage(
    config: Config, accepted: Mapping[tuple[str, str], Versions] | None = None
) -> ResultsStage:
    """Settings of ``tables`` and ``figures``.

    Parameters
    ----------
    config
        The study.
    accepted
        (scenario slug, method) -> versions of the code that its metrics file may come from, where
        they are not those of this code.
    """
    made_by, points = accepted or {}, config.points
    return ResultsStage(
        version=VERSIONS["results"],
        tables=config.tables,
        methods=config.methods,
        scenarios={
            name: [point.scenario.seeded_slug(seed) for seed in config.seeds]
            for name, point in points.items()
        },
        metrics={name: point.scenario.dataset.metric for name, point in points.items()},
        sweep={
            name: SweepPoint(base=point.base, values=point.values)
            for name, point in points.items()
            if point.values
        },
        digests={
            slug: {
                method: digest(
                    client_stage(config, slug, lookup(method).run, made_by.get((slug, method)))
                )
                for method in config.methods
            }
            for slug in config.scenario_seeds()
        },
    )


def manifest_stage(config: Config) -> ResultsStage:
    """Settings of ``cache manifest``: which metrics there are, whatever the tables show of them."""
    return results_stage(config).model_copy(update={"tables": TablesSettings()})


def study_stage(config: Config) -> StudyStage:
    """Settings of ``describe-study``.

    Without the folders of results and cache: they say where a study lies, not what it is.
    """
    places = ("results", "cache", "mode", "stale", "base")
    defaults = {name: Config.model_fields[name].get_default() for name in places}
    return StudyStage(version=VERSIONS["study"], config=config.model_copy(update=defaults))


def _part(section: Section, base: type[SectionT]) -> SectionT:
    """The fields of a section that belong to one of its base classes."""
    return base.model_validate(section.model_dump(include=set(base.model_fields)))


def canonical_json(section: Section) -> str:
    """JSON of a section without spaces: equal settings in equal order, equal bytes.

    The order of columns and of answers carries meaning, so mappings keep theirs. Defaults are left
    out, so that a new setting does not rerun old studies. A default that changes must therefore
    raise the version of its stage.
    """
    content = section.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(content, separators=(",", ":"))


def digest(section: Section) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(section).encode()).hexdigest()
