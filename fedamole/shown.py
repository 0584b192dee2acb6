"""Which tables and figures a study has numbers for, as far as its settings say (torch-free)."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedamole.errors import FedamoleError
from fedamole.registry import lookup
from fedamole.settings import TablesSettings
from fedamole.settings.output import FigureName, TableName

EXPERTS = "a method with experts"
SWEEP = "a sweep"
REFERENCE = "the reference method and another one among the methods"
PUBLISHED = "numbers of a paper, in tables: published"
# What a table or figure needs; the others can always be drawn.
NEEDS: dict[TableName | FigureName, str] = {
    "significance": REFERENCE,
    "assignments": EXPERTS,
    "sweep": SWEEP,
    "published": PUBLISHED,
    "stability": EXPERTS,
    "routing": EXPERTS,
    "experts": EXPERTS,
    "assignment": EXPERTS,
}
# Only where they are asked for: costs differ from machine to machine, old metrics have no map.
ON_REQUEST: tuple[TableName | FigureName, ...] = ("overhead", "routing")


class Study(Protocol):
    """The settings that say what can be shown: a config, or those of the tables."""

    @property
    def tables(self) -> TablesSettings:
        """What the config chooses."""

    @property
    def methods(self) -> Sequence[str]:
        """Rows."""

    @property
    def sweep(self) -> Mapping[str, Any]:
        """What varies; empty without a sweep."""


def by_default(name: TableName | FigureName, study: Study) -> bool:
    """Whether a study that does not choose gets a table or figure."""
    return name not in ON_REQUEST and _has(study, NEEDS.get(name))


def check_shown(study: Study) -> None:
    """Refuse tables and figures that a study chooses and has no numbers for.

    Raises
    ------
    FedamoleError
        Names the first one, and what it needs.
    """
    for kind, names in (("show", study.tables.show), ("figures", study.tables.figures)):
        for name in names or ():
            if not _has(study, NEEDS.get(name)):
                raise FedamoleError(f"tables: {kind}: {name} needs {NEEDS[name]}")


def _has(study: Study, need: str | None) -> bool:
    """Whether the settings of a study have what a table or figure needs."""
    if need == EXPERTS:
        return any(lookup(method).assigns for method in study.methods)
    if need == SWEEP:
        return bool(study.sweep)
    if need == REFERENCE:
        return study.tables.reference in study.methods and len(study.methods) > 1
    if need == PUBLISHED:
        return study.tables.published is not None
    return True
