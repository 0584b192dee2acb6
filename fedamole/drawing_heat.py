"""Scores over two swept settings: a matrix per scenario and method."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedamole.drawing_bars import score_over_seeds
from fedamole.drawing_parts import (
    COLOURS,
    COLUMN_INCHES,
    PAGE_INCHES,
    draw_matrix,
    setting_axis,
    unique,
    write_number,
)
from fedamole.figure_data import Rows
from fedamole.figure_rows_scores import swept
from fedamole.records import METRIC_LABELS

CELL_INCHES = 0.3
# Names and values left of a matrix; above and below it.
BESIDE_INCHES, AROUND_INCHES = 0.55, 0.65


def draw_heat(rows: Rows) -> Figure:
    """Draw the mean over seeds of every combination in percent, the best one framed.

    The matrices of a scenario share their colours.
    """
    first, second = swept(rows)
    bases, methods = unique(rows, "base"), unique(rows, "method")
    down, across = len(unique(rows, first)), len(unique(rows, second))
    panel = BESIDE_INCHES + CELL_INCHES * across
    columns = min(len(methods), max(1, int(PAGE_INCHES / panel)))
    bands = -(-len(methods) // columns)
    width = COLUMN_INCHES if columns * panel <= COLUMN_INCHES else PAGE_INCHES
    height = len(bases) * (bands * (AROUND_INCHES + 0.2 * down) + 0.2) + 0.3
    figure = Figure(figsize=(width, height), layout="constrained")
    parts = figure.subfigures(len(bases), 1, squeeze=False)[:, 0]
    for part, base in zip(parts, bases, strict=True):
        own = [row for row in rows if row["base"] == base]
        part.suptitle(f"{base}: {METRIC_LABELS[own[0]['metric']]} (%), best framed", size=7.5)
        grid = part.subplots(bands, columns, squeeze=False)
        _draw_base(list(grid.flat), own, first, second)
    return figure


def _draw_base(panels: list[Axes], rows: Rows, first: str, second: str) -> None:
    """Draw the matrices of one scenario, a panel per method; the panels left over are empty."""
    methods = unique(rows, "method")
    matrices = [_matrix([r for r in rows if r["method"] == m], first, second) for m in methods]
    known = np.concatenate([matrix[~np.isnan(matrix)] for matrix in matrices])
    bottom, top = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    # Darkest blue would hide the frame; equal numbers have one colour.
    span = max(top - bottom, 0.1)
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    for axes, method, matrix in zip(panels, methods, matrices, strict=False):
        draw_matrix(axes, matrix, top + 0.15 * span, bottom - 0.05 * span)
        for cell, value in np.ndenumerate(matrix):
            if not np.isnan(value):
                write_number(axes, cell, f"{value:.1f}", dark=value > bottom + 0.55 * span)
        _frame_best(axes, matrix)
        xlabel, columns = setting_axis(second, unique(rows, second))
        ylabel, lines = setting_axis(first, unique(rows, first))
        axes.set(title=method, xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(lines)), lines)


def _matrix(rows: Rows, first: str, second: str) -> np.ndarray:
    """Mean over seeds in percent, values of the first setting x values of the second."""

    def mean(one: Any, other: Any) -> float:
        own = [row for row in rows if row[first] == one and row[second] == other]
        return score_over_seeds(own).mean

    values = unique(rows, second)
    return np.array([[mean(one, other) for other in values] for one in unique(rows, first)])


def _frame_best(axes: Axes, matrix: np.ndarray) -> None:
    """Frame the cell of the highest number, the first of several."""
    if np.isnan(matrix).all():
        return
    row, column = np.unravel_index(np.nanargmax(matrix), matrix.shape)
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, clip_on=False)
    frame.set(edgecolor=COLOURS[0], linewidth=1.3, zorder=3)
    axes.add_patch(frame)
