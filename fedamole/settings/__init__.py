"""Every setting of a run: its meaning, unit, default and limits (torch-free).

A config file is made of these sections (:mod:`fedamole.config`); a command gets those that its
stage depends on (:mod:`fedamole.stages`).
"""

from fedamole.settings.backbone import (
    GENERATED_POSITIONS,
    BackboneLoading,
    BackboneSettings,
    BackboneSize,
    BackboneSource,
    GeneratedBackbone,
)
from fedamole.settings.data import (
    DEFAULT_MAX_TEST,
    DatasetSettings,
    PartitionSettings,
    ScenarioSettings,
    SourceSettings,
)
from fedamole.settings.federation import AdapterSettings, AggregationSettings, AssignmentSettings
from fedamole.settings.methods import FdloraSettings, FedapenSettings, PromptSettings
from fedamole.settings.output import (
    FIGURE_NAMES,
    TABLE_NAMES,
    ExecutionSettings,
    PublishedNumber,
    PublishedSettings,
    TablesSettings,
)
from fedamole.settings.participation import ParticipationSettings
from fedamole.settings.privacy import DpSgdSettings, EmbeddingPrivacy, PrivacySettings
from fedamole.settings.section import Section
from fedamole.settings.training import (
    CHOICES_AT_ONCE,
    DEEPSPEED_KEYS,
    DEFAULT_STEPS,
    ZERO_KEYS,
    EvaluationSettings,
    TrainingSettings,
)

__all__ = [
    "CHOICES_AT_ONCE",
    "DEEPSPEED_KEYS",
    "DEFAULT_MAX_TEST",
    "DEFAULT_STEPS",
    "FIGURE_NAMES",
    "GENERATED_POSITIONS",
    "TABLE_NAMES",
    "ZERO_KEYS",
    "AdapterSettings",
    "AggregationSettings",
    "AssignmentSettings",
    "BackboneLoading",
    "BackboneSettings",
    "BackboneSize",
    "BackboneSource",
    "DatasetSettings",
    "DpSgdSettings",
    "EmbeddingPrivacy",
    "EvaluationSettings",
    "ExecutionSettings",
    "FdloraSettings",
    "FedapenSettings",
    "GeneratedBackbone",
    "ParticipationSettings",
    "PartitionSettings",
    "PrivacySettings",
    "PromptSettings",
    "PublishedNumber",
    "PublishedSettings",
    "ScenarioSettings",
    "Section",
    "SourceSettings",
    "TablesSettings",
    "TrainingSettings",
]
