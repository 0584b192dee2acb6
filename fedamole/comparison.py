"""On which clients the rows of a table are compared: those that have a number in every row.

Where clients are drawn for the rounds, or drop out, a row that tests each client's own model has no
number for some of them, while an averaged model is tested on all. Means over other clients would
compare clients, not methods.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from fedamole.records import METRIC_LABELS, ClientRecord
from fedamole.rendering import Cell, over_seeds
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


def scenario_cells(
    metrics: Metrics,
    settings: ResultsStage,
    name: str,
    measure: Callable[[list[ClientRecord]], float],
    scale: float = 1,
) -> dict[str, Cell]:
    """Mean and spread over the seeds of a scenario, for each method; see :func:`seed_values`."""
    found = seed_values(metrics, settings, name, measure, scale)
    return {method: over_seeds(values) for method, values in found.items()}


def seed_values(
    metrics: Metrics,
    settings: ResultsStage,
    name: str,
    measure: Callable[[list[ClientRecord]], float],
    scale: float = 1,
) -> dict[str, list[float]]:
    """Numbers of a scenario, one per seed, for each method; not a number without clients.

    Parameters
    ----------
    metrics
        All runs.
    settings
        The study; says which round counts.
    name
        Scenario, without the seed.
    measure
        Number of a run, from the records of the clients that are compared.
    scale
        Factor on the numbers.
    """
    slugs = settings.scenarios[name]
    clients = {slug: compared(metrics, settings, slug) for slug in slugs}

    def value(slug: str, method: str) -> float:
        records = counted(metrics, settings, slug, method)
        chosen = [record for record in records if record.client in clients[slug]]
        return scale * measure(chosen) if chosen else math.nan

    return {method: [value(slug, method) for slug in slugs] for method in settings.methods}


def average_cells(
    metrics: Metrics,
    settings: ResultsStage,
    measure: Callable[[list[ClientRecord]], float],
    scale: float = 1,
) -> dict[str, Cell]:
    """Unweighted mean over the scenarios, seed by seed; then its mean and spread over the seeds."""
    found = [seed_values(metrics, settings, name, measure, scale) for name in settings.scenarios]
    return {method: _average([values[method] for values in found]) for method in settings.methods}


def _average(scenarios: Sequence[Sequence[float]]) -> Cell:
    """Mean over scenarios; without a spread where these do not have the same number of seeds."""
    if len({len(seeds) for seeds in scenarios}) > 1:
        return Cell(fmean(fmean(seeds) for seeds in scenarios))
    return over_seeds([fmean(seed) for seed in zip(*scenarios, strict=True)])


def score_title(settings: ResultsStage, name: str) -> str:
    """Name of the metric of a scenario, with the unit in which the tables print it."""
    return f"{METRIC_LABELS[settings.metrics[name]]} (%)"


def known(value: float | None) -> float | None:
    """Leave a field of a tidy row empty where there is no number."""
    return None if value is None or math.isnan(value) else value
