"""Scores as bars, scenario by scenario and method by method."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedamole.drawing_parts import (
    COLUMN_INCHES,
    EDGE,
    PAGE_INCHES,
    TICK_POINTS,
    colour,
    hatch,
    inches,
    legend_below,
    legend_columns,
    legend_height,
    parts_of,
    unique,
    wrapped,
)
from fedamole.figure_data import Rows
from fedamole.records import METRIC_LABELS
from fedamole.rendering import PERCENT, Cell, over_seeds

MOST_SCENARIOS_IN_A_COLUMN = 3
# What stands left of a panel: numbers and the name of the metric.
BESIDE_INCHES = 0.45
BAND_INCHES = 1.9
# Narrower bars cannot be told apart; wider ones say no more.
NARROWEST_INCHES, WIDEST_INCHES = 0.06, 0.35
# A number beside the next one, and one that stands on end.
NUMBER_INCHES, NUMBER_ON_END_INCHES = 0.26, 0.085

# Scenarios of one metric, side by side.
Panel = list[str]


def draw_bars(rows: Rows) -> Figure:
    """Score of each method in each scenario: mean over seeds, sample deviation as an error bar."""
    scenarios, methods = unique(rows, "scenario"), unique(rows, "method")
    metrics = {row["scenario"]: row["metric"] for row in rows}
    width = PAGE_INCHES if len(scenarios) > MOST_SCENARIOS_IN_A_COLUMN else COLUMN_INCHES
    bands = bands_of_panels(metrics, len(methods), width)
    ceilings = {
        kind: _ceiling([row for row in rows if row["metric"] == kind])
        for kind in set(metrics.values())
    }
    per_line = legend_columns(methods, width)
    height = 0.35 + BAND_INCHES * len(bands) + legend_height(methods, per_line)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(len(bands), 1)
    for index, band in enumerate(bands):
        shown = sum(map(len, band))
        unit = (width - BESIDE_INCHES * len(band)) / shown
        ratios = [len(panel) for panel in band]
        parts = grid[index, 0].subgridspec(1, len(band), width_ratios=ratios)
        for column, panel in enumerate(band):
            axes = figure.add_subplot(parts[0, column])
            _draw_panel(axes, rows, panel, unit)
            axes.set_ylim(0, ceilings[metrics[panel[0]]])
    legend_below(figure, figure.axes[0], per_line)
    seeds = max(len(unique([r for r in rows if r["scenario"] == s], "seed")) for s in scenarios)
    over = f"{seeds} seeds (error bars: std)" if seeds > 1 else "one seed"
    figure.suptitle(f"Score, mean over clients, {over}")
    return figure


def bands_of_panels(metrics: dict[str, str], methods: int, width: float) -> list[list[Panel]]:
    """Cut the scenarios into panels of one metric, and these into bands that fit the width.

    Parameters
    ----------
    metrics
        Scenario -> metric, in the order of the config.
    methods
        Number of bars per scenario.
    width
        Of the figure, in inches.
    """
    parts = [part for name in metrics for part in parts_of(name)]
    longest = max(inches(part, TICK_POINTS) for part in parts) + 0.06
    group = min(max(longest, NARROWEST_INCHES * (methods + 1)), width - BESIDE_INCHES)
    kinds = dict.fromkeys(metrics.values())
    alike = [[name for name in metrics if metrics[name] == kind] for kind in kinds]
    if sum(len(names) * group + BESIDE_INCHES for names in alike) <= width:
        return [list(alike)]
    most = max(1, int((width - BESIDE_INCHES) / group))
    # A band for each metric, or several of equal length.
    return [
        [part.tolist()] for names in alike for part in np.array_split(names, -(-len(names) // most))
    ]


def _draw_panel(axes: Axes, rows: Rows, scenarios: Panel, unit: float) -> None:
    """Draw the scenarios of a panel, ``unit`` inches each."""
    own = [row for row in rows if row["scenario"] in scenarios]
    methods = unique(own, "method")
    width = min(0.84 / len(methods), WIDEST_INCHES / unit)
    for index, method in enumerate(methods):
        cells = [_cell(own, scenario, method) for scenario in scenarios]
        places = np.arange(len(scenarios)) + (index - (len(methods) - 1) / 2) * width
        _draw_method(axes, method, places, cells, width)
        _write_scores(axes, places, cells, width * unit)
    axes.grid(axis="y")
    axes.set_xticks(range(len(scenarios)), [wrapped(name, unit - 0.04) for name in scenarios])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(scenarios) - 0.5)
    axes.set_ylabel(f"{METRIC_LABELS[own[0]['metric']]} (%)")


def _cell(rows: Rows, scenario: str, method: str) -> Cell:
    """Mean and deviation over seeds in percent; not a number where a seed has none."""
    own = [row for row in rows if row["scenario"] == scenario and row["method"] == method]
    return score_over_seeds(own)


def score_over_seeds(rows: Rows) -> Cell:
    """Mean and sample deviation of the scores of some rows, one per seed, in percent."""
    scores = [np.nan if row["score"] is None else PERCENT * row["score"] for row in rows]
    return over_seeds(scores)


def _draw_method(
    axes: Axes, method: str, places: np.ndarray, cells: Sequence[Cell], width: float
) -> None:
    """Draw the bars of a method."""
    axes.bar(
        places,
        [cell.mean for cell in cells],
        width,
        label=method,
        color=colour(method),
        hatch=hatch(method),
        edgecolor=EDGE,
        linewidth=0.4,
    )
    means, stds = [cell.mean for cell in cells], [cell.std or 0.0 for cell in cells]
    if any(stds):
        axes.errorbar(places, means, stds, fmt="none", ecolor=EDGE, elinewidth=0.7, capsize=1.5)


def _write_scores(axes: Axes, places: np.ndarray, cells: Sequence[Cell], width: float) -> None:
    """Write the score above each bar, on end above a narrow one; nothing above the narrowest."""
    if width < NUMBER_ON_END_INCHES:
        return
    for place, cell in zip(places, cells, strict=True):
        missing = np.isnan(cell.mean)
        axes.annotate(
            "n/a" if missing else f"{cell.mean:.1f}",
            (place, 0 if missing else cell.mean + (cell.std or 0)),
            xytext=(0, 1.5),
            textcoords="offset points",
            rotation=0 if width >= NUMBER_INCHES else 90,
            size=5,
            ha="center",
            va="bottom",
        )


def _ceiling(rows: Rows) -> float:
    """End of the axis: room for the numbers above the highest bar."""
    pairs = {(row["scenario"], row["method"]) for row in rows}
    cells = [_cell(rows, *pair) for pair in pairs]
    highest = max((c.mean + (c.std or 0) for c in cells if not np.isnan(c.mean)), default=0.0)
    return 1.17 * highest if highest > 0 else 1.0
