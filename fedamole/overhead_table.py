"""The table of costs: methods x memory, volumes and seconds, one per scenario.

A number is the mean over the clients and rounds that have it, then the mean and the sample standard
deviation over seeds. Seconds of the server are those of its jobs, start of the process included.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedamole.costs import ClientCost, RoundCosts, RunCosts, StudyCosts
from fedamole.rendering import Cell, Column, over_seeds

MB = 10**6


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes
    ----------
    title
        What it is.
    unit
        Unit that is printed.
    field
        Field of a client's costs, or of a round's.
    scale
        From the unit of the field to that which is printed.
    of_round
        Whether it is one number for a round, not one for each of its clients.
    optional
        Whether the column is left out where no method has a number in it.
    """

    title: str
    unit: str
    field: str
    scale: float = 1.0
    of_round: bool = False
    optional: bool = False

    @property
    def head(self) -> str:
        """Title of the column."""
        return f"{self.title} ({self.unit})"

    def values(self, costs: RunCosts) -> Iterator[float]:
        """Numbers of a run, of all clients and rounds that have one."""
        for round_ in costs.rounds:
            parts: list[RoundCosts] | list[ClientCost]
            parts = [round_] if self.of_round else round_.clients
            for part in parts:
                value = getattr(part, self.field)
                if value is not None:
                    yield self.scale * value


# Name in csv files -> what it is.
MEASURES = {
    "peak_memory_mb": Measure("peak memory", "MB", "peak_memory_mb"),
    "peak_gpu_memory_mb": Measure("GPU memory", "MB", "peak_gpu_memory_mb", optional=True),
    "trainable_millions": Measure("trainable", "millions", "trainable", 1 / MB),
    "upload_mb": Measure("upload", "MB", "upload_bytes", 1 / MB),
    "download_mb": Measure("download", "MB", "download_bytes", 1 / MB),
    "training_s": Measure("training", "s", "training_seconds"),
    "testing_s": Measure("testing", "s", "testing_seconds"),
    "embedding_s": Measure("embeddings", "s", "embedding_seconds"),
    "aggregation_s": Measure("aggregation", "s/round", "aggregate_seconds", of_round=True),
    "assignment_s": Measure("assignment", "s/round", "assign_seconds", of_round=True),
}

# Scenario -> measure -> method -> mean and spread over seeds.
Measured = dict[str, dict[str, dict[str, Cell]]]


def measured_overhead(costs: StudyCosts) -> Measured:
    """Take the means of all measures that any method of a scenario has."""
    return {
        name: {
            what: cells
            for what, measure in MEASURES.items()
            if _is_shown(measure, cells := _cells(methods, measure))
        }
        for name, methods in costs.items()
    }


def _cells(methods: dict[str, list[RunCosts]], measure: Measure) -> dict[str, Cell]:
    """Method -> mean and spread over seeds; not a number where a seed has none."""
    return {
        method: over_seeds([_mean(measure.values(run)) for run in seeds])
        for method, seeds in methods.items()
    }


def _mean(values: Iterator[float]) -> float:
    return fmean(known) if (known := list(values)) else math.nan


def _is_shown(measure: Measure, cells: dict[str, Cell]) -> bool:
    return not (measure.optional and all(math.isnan(cell.mean) for cell in cells.values()))


def overhead_columns(costs: StudyCosts) -> dict[str, list[Column]]:
    """Columns of the table of each scenario, per client and round, or per round of the server."""
    return {
        name: [Column(MEASURES[what].head, cells) for what, cells in by_measure.items()]
        for name, by_measure in measured_overhead(costs).items()
    }


def overhead_rows(costs: StudyCosts) -> list[dict[str, Any]]:
    """Rows of ``overhead.csv``, all with the same fields; empty where there is no number."""
    measured = measured_overhead(costs)
    rows = []
    for name, methods in costs.items():
        for method, seeds in methods.items():
            row: dict[str, Any] = {"scenario": name, "method": method, "seeds": len(seeds)}
            for what in MEASURES:
                cell = measured[name].get(what, {}).get(method, Cell(math.nan))
                row |= _fields(what, cell)
            rows.append(row | {"machines": "; ".join(machine_names(seeds))})
    return rows


def overhead_bars(costs: StudyCosts) -> list[dict[str, Any]]:
    """Rows of the figure: one for each scenario, measure and method that has a number."""
    return [
        {
            "scenario": name,
            "method": method,
            "measure": MEASURES[what].title,
            "unit": MEASURES[what].unit,
            **_fields("value", cell),
        }
        for name, by_measure in measured_overhead(costs).items()
        for what, cells in by_measure.items()
        for method, cell in cells.items()
        if not math.isnan(cell.mean)
    ]


def _fields(name: str, cell: Cell) -> dict[str, float | None]:
    return {
        f"{name}_mean": None if math.isnan(cell.mean) else cell.mean,
        f"{name}_std": cell.std,
    }


def overhead_notes(costs: StudyCosts) -> dict[str, list[str]]:
    """Lines below the table of each scenario: what the numbers are, and what they were taken on."""
    notes = {}
    for name, methods in costs.items():
        names = machine_names([run for seeds in methods.values() for run in seeds])
        text = "Means per client and round; aggregation and assignment per round, as jobs."
        notes[name] = [f"{text} Measured on: {'; '.join(names) or 'unknown'}."]
    return notes


def machine_names(runs: list[RunCosts]) -> list[str]:
    """Name the kinds of machines of some runs, each once."""
    names = {
        f"{machine.gpu or machine.processor}, {_threads(machine.threads)}": None
        for run in runs
        for machine in run.machines
    }
    return list(names)


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"
