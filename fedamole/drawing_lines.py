"""Figures of panels with a line per method: a swept setting, and how stable assignments are."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamole.drawing_bars import score_over_seeds
from fedamole.drawing_heat import draw_heat
from fedamole.drawing_parts import (
    COLUMN_INCHES,
    PAGE_INCHES,
    TICK_POINTS,
    TITLE_POINTS,
    colour,
    inches,
    legend_below,
    legend_columns,
    legend_height,
    line_style,
    setting_axis,
    unique,
    wrapped,
)
from fedamole.figure_data import Rows
from fedamole.figure_rows_scores import swept
from fedamole.records import METRIC_LABELS
from fedamole.registry import lookup

MOST_PANELS_BESIDE = 3
PANEL_INCHES = 1.75
TITLE_MARGIN_INCHES = 0.5
# Between the lines of two methods at one value, as a share of the step to the next value.
APART = 0.05


def panels_of_lines(
    titles: Sequence[str], methods: Sequence[str]
) -> tuple[Figure, list[Axes], int]:
    """Make a figure with a panel per title, and say in how many columns its legend fits."""
    count = len(titles)
    columns = min(count, MOST_PANELS_BESIDE)
    bands = -(-count // columns)
    width = COLUMN_INCHES if columns == 1 else PAGE_INCHES
    per_line = legend_columns(methods, width)
    height = 0.5 + PANEL_INCHES * bands + legend_height(methods, per_line)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(bands, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes, title in zip(grid.flat, titles, strict=False):
        axes.grid(axis="y")
        axes.set_title(wrapped(title, width / columns - TITLE_MARGIN_INCHES, TITLE_POINTS))
    return figure, list(grid.flat[:count]), per_line


# A swept setting


def draw_sweep(rows: Rows) -> Figure:
    """Score over the values of one setting as lines, or of two as matrices."""
    return _draw_one_setting(rows) if len(swept(rows)) == 1 else draw_heat(rows)


def _draw_one_setting(rows: Rows) -> Figure:
    """Draw a panel per scenario, a line per method; error bars are deviations over seeds."""
    (key,), bases = swept(rows), unique(rows, "base")
    figure, panels, per_line = panels_of_lines(bases, unique(rows, "method"))
    for axes, base in zip(panels, bases, strict=True):
        own = [row for row in rows if row["base"] == base]
        _draw_sweep_panel(axes, own, key)
        axes.set_ylabel(f"{METRIC_LABELS[own[0]['metric']]} (%)")
    legend_below(figure, panels[0], per_line)
    seeds = len(unique(rows, "seed"))
    over = f"{seeds} seeds (error bars: std)" if seeds > 1 else "one seed"
    label, _ = setting_axis(key, unique(rows, key))
    figure.suptitle(_title(f"Score over {label}, mean over clients", over, len(bases)))
    return figure


def _title(what: str, over: str, panels: int) -> str:
    """A title that fits above so many panels."""
    return (", " if panels > 1 else "\n").join([what, over] if over else [what])


def _draw_sweep_panel(axes: Axes, rows: Rows, key: str) -> None:
    """Draw the lines of one scenario, at equal distances in the order of the config."""
    values, methods = unique(rows, key), unique(rows, "method")
    for index, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        cells = [score_over_seeds([row for row in own if row[key] == value]) for value in values]
        offset = APART * (index - (len(methods) - 1) / 2)
        style = line_style(method)
        if not lookup(method).trains:
            style |= {"linestyle": "--", "marker": ""}
        axes.errorbar(
            np.arange(len(values)) + offset,
            [cell.mean for cell in cells],
            [cell.std or 0.0 for cell in cells] if any(cell.std for cell in cells) else None,
            label=method,
            capsize=1.5,
            elinewidth=0.7,
            **style,
        )
    label, labels = setting_axis(key, values)
    axes.set_xlabel(label)
    axes.set_xticks(range(len(values)), labels)
    side = 1.7 / max(1, len(values))
    if max(inches(text, TICK_POINTS) for text in labels) > side:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlim(-0.5, len(values) - 0.5)


# How stable assignments are


def draw_stability(rows: Rows) -> Figure:
    """Draw the share of experts that clients keep, round by round: mean and range over seeds."""
    scenarios = unique(rows, "scenario")
    figure, panels, per_line = panels_of_lines(scenarios, unique(rows, "method"))
    for axes, scenario in zip(panels, scenarios, strict=True):
        own = [row for row in rows if row["scenario"] == scenario]
        _draw_kept(axes, [row for row in own if row["kept"] is not None])
        axes.set(xlabel="round", ylim=(-0.03, 1.03))
        axes.set_ylabel("share of experts kept")
    if panels[0].get_lines():
        legend_below(figure, panels[0], per_line)
    over = "band: range over seeds" if len(unique(rows, "seed")) > 1 else ""
    what = "Experts that a client keeps from the round before"
    figure.suptitle(_title(what, over, len(scenarios)))
    return figure


def _draw_kept(axes: Axes, rows: Rows) -> None:
    """Draw the lines of one scenario."""
    if not rows:
        note = "no client took part in two rounds"
        axes.text(0.5, 0.5, note, ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        return
    for method in unique(rows, "method"):
        own = [row for row in rows if row["method"] == method]
        rounds = unique(own, "round")
        kept = [[row["kept"] for row in own if row["round"] == round_] for round_ in rounds]
        means, every = [fmean(values) for values in kept], max(1, len(rounds) // 8)
        axes.plot(rounds, means, label=method, markevery=every, **line_style(method))
        lowest, highest = [min(values) for values in kept], [max(values) for values in kept]
        axes.fill_between(rounds, lowest, highest, color=colour(method), alpha=0.15, linewidth=0)
    first, last = min(unique(rows, "round")), max(unique(rows, "round"))
    ticks = MaxNLocator(nbins=6, integer=True).tick_values(first, last)
    axes.set_xticks([int(tick) for tick in ticks if first <= tick <= last])
