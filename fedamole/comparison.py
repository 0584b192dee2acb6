"""On which clients the rows of a table are compared: those that have a number in every row.

Where clients are drawn for the rounds, or drop out, a row that tests each client's own model has no
number for some of them, while an averaged model is tested on all. Means over other clients would
compare clients, not methods.
"""

from collections.abc import Sequence

from fedamole.records import ClientRecord
from fedamole.results import Metrics
from fedamole.stages import ResultsStage


def counted(metrics: Metrics, settings: ResultsStage, slug: str, method: str) -> list[ClientRecord]:
    """Client records of a row that count, one for each client that has a number."""
    return metrics.run(slug, method).counted(settings.tables.round)


def compared(metrics: Metrics, settings: ResultsStage, slug: str) -> frozenset[int]:
    """Clients of a scenario slug that have a number in every row."""
    rows = (counted(metrics, settings, slug, method) for method in settings.methods)
    return frozenset.intersection(*(frozenset(record.client for record in row) for row in rows))


def population(metrics: Metrics, settings: ResultsStage, slug: str) -> int:
    """Clients K of a scenario slug."""
    return metrics.run(slug, settings.methods[0]).info.clients


def sizes(metrics: Metrics, settings: ResultsStage, name: str) -> tuple[int, int]:
    """Clients that are compared, the fewest over the seeds of a scenario, and all clients K."""
    slugs = settings.scenarios[name]
    fewest = min(len(compared(metrics, settings, slug)) for slug in slugs)
    return fewest, population(metrics, settings, slugs[0])


def note(metrics: Metrics, settings: ResultsStage, slugs: Sequence[str], title: str) -> list[str]:
    """Say how many clients are compared, in one line; nothing where these are all of them.

    Parameters
    ----------
    metrics, settings
        The study.
    slugs
        The seeds of a scenario that a table shows.
    title
        Name of the scenario.
    """
    everyone = population(metrics, settings, slugs[0])
    numbers = [len(compared(metrics, settings, slug)) for slug in slugs]
    if min(numbers) == everyone:
        return []
    counts = str(numbers[0]) if len(set(numbers)) == 1 else ", ".join(map(str, numbers))
    each = "" if len(set(numbers)) == 1 else " (seed by seed)"
    return [f"{title}: over the clients with a number in every row, {counts} of {everyone}{each}"]
