"""What figures have in common: sizes, colours, legends, and matrices with numbers."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath

from fedamole.figure_data import Rows
from fedamole.registry import METHODS

COLUMN_INCHES = 3.4
PAGE_INCHES = 7.0
LEGEND_POINTS = TICK_POINTS = 6.5
TITLE_POINTS = 7.5
MOST_COLUMNS_WITH_NUMBERS = 12

# Okabe and Ito (2008): distinct under the common colour blindnesses. Yellow, faint, is last.
COLOURS = ("#D55E00", "#56B4E9", "#0072B2", "#000000", "#009E73", "#E69F00", "#CC79A7", "#F0E442")
FAINT = COLOURS[-1]
# Seven, coprime with eight colours: each of the first 56 methods has a pair of its own.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# One per round of the colours: each of the first 24 methods has a bar of its own.
HATCHES = ("", "/////", "....")
# The same for lines.
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1, 1)))
# Methods that often stand side by side get colours of their own; a variant of FedAMoLE shares that
# of FedAMoLE or of a method that it seldom meets, with another marker and hatch.
FIRST: tuple[str, ...] = (
    "fedamole",
    "fedit-ft",
    "fdlora",
    "fedit",
    "fedprompt-ft",
    "fml",
    "fedapen",
)
FIRST += ("fedptuning-ft", "fedamole-static", "zero-shot", "fedamole-noshared")
FIRST += ("fedamole-linear-router", "fedamole-random", "local")
INK = COLOURS[2]
EDGE = "#444444"


# Setting -> what papers call it; others go by their own name.
SETTINGS = {
    "training.learning_rate": "learning rate",
    "scenarios.clients": "clients K",
    "scenarios.partition": "partition",
    "scenarios.partition.alpha": "Dirichlet alpha",
    "adapter.rank": "rank r",
    "adapter.alpha": "LoRA alpha",
    "adapter.top_k": "experts per token k",
    "assignment.num_experts": "experts E",
    "assignment.choices": "choices c",
    "assignment.min_experts": "fewest experts of a client",
    "assignment.max_experts": "most experts of a client",
    "participation.fraction": "share of clients in a round",
    "privacy.embeddings": "eta",
    "privacy.embeddings.eta": "eta",
}


def _place(method: str) -> int:
    """Place of a method among all, the same in every study."""
    return [*FIRST, *(name for name in METHODS if name not in FIRST)].index(method)


def colour(method: str) -> str:
    """Colour of a method, the same in every figure of every study."""
    return COLOURS[_place(method) % len(COLOURS)]


def marker(method: str) -> str:
    """Marker of a method, the same in every figure of every study."""
    return MARKERS[_place(method) % len(MARKERS)]


def hatch(method: str) -> str:
    """Hatching of the bars of a method, the same in every figure of every study."""
    return HATCHES[_place(method) // len(COLOURS) % len(HATCHES)]


def line_style(method: str) -> dict[str, Any]:
    """Colour and marker of the line of a method; what is faint on white has a dark border."""
    border = [withStroke(linewidth=2.0, foreground=EDGE)] if colour(method) == FAINT else []
    dashes = DASHES[_place(method) // len(COLOURS) % len(DASHES)]
    style = {"color": colour(method), "marker": marker(method), "path_effects": border}
    return {**style, "linestyle": dashes}


def inches(text: str, size: float) -> float:
    """Width of a line of text in a font size, in inches."""
    return float(TextPath((0, 0), text, size=size).get_extents().width) / 72


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Columns in which a legend is no wider than its figure (in inches), in the fewest lines."""
    size = LEGEND_POINTS
    beside = 5.0 * size / 72  # Line, gaps and the space to the next column, as matplotlib has them.
    widths = [inches(label, size) for label in labels]
    most = 4 if width <= COLUMN_INCHES else 8
    for columns in range(min(most, len(labels)), 1, -1):
        taken = sum(max(part) + beside for part in np.array_split(widths, columns))
        if taken <= width:
            lines = -(-len(labels) // columns)
            return -(-len(labels) // lines)
    return 1


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Name the methods that a panel shows, in some columns below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def legend_height(labels: Sequence[str], columns: int) -> float:
    """Height of a legend below the panels, in inches."""
    return 0.1 + 0.13 * -(-len(labels) // columns)


def wrapped(label: str, width: float, size: float = TICK_POINTS) -> str:
    """Break a name between its parts into lines no wider than so many inches, where possible."""
    lines = [""]
    for part in parts_of(label):
        fits = not lines[-1] or inches(lines[-1] + part, size) <= width
        lines = [*lines[:-1], lines[-1] + part] if fits else [*lines, part]
    return "\n".join(lines)


def parts_of(label: str) -> list[str]:
    """Cut a name behind its hyphens and underscores."""
    return re.findall(r"[^-_]*[-_]|[^-_]+$", label)


def setting_axis(key: str, values: Sequence[str]) -> tuple[str, list[str]]:
    """Name of a setting, and its values as they stand at its axis."""
    if key == "scenarios.partition" and all(value.startswith("dir") for value in values):
        return SETTINGS["scenarios.partition.alpha"], [value[3:] for value in values]
    return SETTINGS.get(key, key.rpartition(".")[2].replace("_", " ")), list(values)


def shorten(label: str, most: int) -> str:
    """Cut a label to so many characters."""
    return label if len(label) <= most else f"{label[: most - 2]}..."


def draw_matrix(axes: Axes, values: np.ndarray, top: float, bottom: float = 0) -> QuadMesh:
    """Draw a matrix in blues from ``bottom`` to ``top``, row 0 above, ticks at whole numbers."""
    rows, columns = values.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, values, cmap="Blues", vmin=bottom, vmax=top or 1)
    mesh.set(edgecolor="white", linewidth=0.4)
    axes.invert_yaxis()
    axes.set_xticks(some_ticks(columns))
    axes.set_yticks(some_ticks(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def write_numbers(axes: Axes, values: np.ndarray, pattern: str) -> None:
    """Write each number into its cell, except zeros and gaps."""
    dark = 0.55 * float(np.nanmax(values, initial=0.0))
    for (row, column), value in np.ndenumerate(values):
        if value and not np.isnan(value):
            write_number(axes, (row, column), pattern.format(value), dark=value > dark)


def write_number(axes: Axes, cell: tuple[int, ...], text: str, dark: bool) -> None:
    """Write a number into its cell (row, column), in white on a dark one."""
    row, column = cell
    ink = "white" if dark else "black"
    axes.text(column, row, text, color=ink, size=5.5, ha="center", va="center_baseline")


def unique(rows: Rows, key: str) -> list[Any]:
    """Values of a column, each once, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def origin(rows: Rows) -> str:
    """Which run and round a figure is of."""
    return f"{rows[0]['method']} on {rows[0]['scenario']}, round {rows[0]['round']}"


def some_ticks(count: int) -> range:
    """All indices, or every fifth of many."""
    return range(0, count, 1 if count <= MOST_COLUMNS_WITH_NUMBERS else 5)
