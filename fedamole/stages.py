"""What each stage of the pipeline depends on, as one section whose JSON is its ``params``.

The digest of that JSON stands in the header of all files the stage writes. Files of a run that was
made with other settings are thereby recognised, also where Snakemake's own records are lost.
"""

import hashlib
import json

from fedamole.config import Config, SectionT
from fedamole.registry import METHODS, lookup
from fedamole.settings import (
    AdapterSettings,
    AggregationSettings,
    AssignmentSettings,
    BackboneLoading,
    BackboneSettings,
    BackboneSource,
    DatasetSettings,
    EvaluationSettings,
    ScenarioSettings,
    Section,
    TablesSettings,
    TrainingSettings,
)

# Raised when a change of the code, or of a default, changes what the stage writes.
VERSIONS = {"backbone": 1, "scenario": 1, "tokens": 1, "run": 1, "client": 1, "results": 1}


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


class ClientStage(Section):
    """Settings of ``train-clients`` and ``evaluate-clients``."""

    version: int = 0
    """Version of the code of the stage; see VERSIONS."""
    run: RunStage
    """The federated run."""
    evaluation: EvaluationSettings
    """Testing."""


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
    digests: dict[str, dict[str, str]] = {}
    """Slug -> method -> digest of the :class:`ClientStage` that its metrics must come from."""


def backbone_stage(config: Config) -> BackboneStage:
    """Settings of ``prepare-backbone``."""
    corpus: dict[str, DatasetSettings] = {}
    if config.backbone.generate:
        corpus = {scenario.dataset.name: scenario.dataset for scenario in config.scenarios}
    source = _part(config.backbone, BackboneSource)
    return BackboneStage(
        version=VERSIONS["backbone"], backbone=source, corpus=list(corpus.values())
    )


def scenario_stage(config: Config, scenario: str) -> ScenarioStage:
    """Settings of ``partition`` for a scenario slug."""
    settings, seed = config.scenario_seeds()[scenario]
    return ScenarioStage(version=VERSIONS["scenario"], scenario=settings, seed=seed)


def tokens_stage(config: Config, scenario: str) -> TokensStage:
    """Settings of ``tokenize`` for a scenario slug."""
    return TokensStage(
        version=VERSIONS["tokens"],
        scenario=scenario_stage(config, scenario),
        backbone=backbone_stage(config),
    )


def run_stage(config: Config, scenario: str, run: str) -> RunStage:
    """Settings of the server's commands for a scenario slug and a run.

    What a run does not use keeps its default: a change of the assignment reruns no baseline.
    """
    rows = [row for row in METHODS.values() if row.run == run]
    trains, assigns = any(row.trains for row in rows), any(row.assigns for row in rows)
    adapter = config.adapter
    if not assigns:
        adapter = AdapterSettings(**adapter.model_dump(exclude={"top_k", "balance_weight"}))
    untrained = TrainingSettings(cpu_threads=config.training.cpu_threads)
    if config.training.zero_stage == 3:
        # A model that is cut over ranks to be trained may not fit one of them to be tested.
        kept = config.training.model_dump(include={"cpu_threads", "ranks", "deepspeed"})
        untrained = TrainingSettings(batch_size=config.training.ranks, **kept)
    return RunStage(
        version=VERSIONS["run"],
        run=run,
        tokens=tokens_stage(config, scenario),
        loading=_part(config.backbone, BackboneLoading),
        adapter=adapter if trains else AdapterSettings(),
        assignment=config.assignment if assigns else AssignmentSettings(),
        aggregation=config.aggregation if trains else AggregationSettings(),
        training=config.training if trains else untrained,
    )


def client_stage(config: Config, scenario: str, run: str) -> ClientStage:
    """Settings of the clients' commands for a scenario slug and a run."""
    return ClientStage(
        version=VERSIONS["client"],
        run=run_stage(config, scenario, run),
        evaluation=config.evaluation,
    )


def results_stage(config: Config) -> ResultsStage:
    """Settings of ``tables`` and ``figures``."""
    return ResultsStage(
        version=VERSIONS["results"],
        tables=config.tables,
        methods=config.methods,
        scenarios={
            scenario.slug: [scenario.seeded_slug(seed) for seed in config.seeds]
            for scenario in config.scenarios
        },
        metrics={scenario.slug: scenario.dataset.metric for scenario in config.scenarios},
        digests={
            slug: {
                method: digest(client_stage(config, slug, lookup(method).run))
                for method in config.methods
            }
            for slug in config.scenario_seeds()
        },
    )


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
