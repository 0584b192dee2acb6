"""A map of the clients by their routing logits, and how many experts each of them holds."""

# ruff: noqa: TID253 -- the command imports fedamole.figures only when it draws

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamole.drawing_parts import (
    COLOURS,
    EDGE,
    MOST_COLUMNS_WITH_NUMBERS,
    PAGE_INCHES,
    inches,
    origin,
    shorten,
    some_ticks,
    unique,
)
from fedamole.figure_data import Rows

GREY = "#9A9A9A"
HEIGHT_INCHES = 2.75
# More, where the classes of the clients are listed below.
LIST_INCHES = 0.4
NUMBER_POINTS = 5.5
# Of the largest marker, in square points; smaller among many clients.
LARGEST_AREA, LARGEST_AREA_AMONG_MANY = 110.0, 45.0
# Places of a number around its marker, the preferred ones first.
AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def draw_routing(rows: Rows) -> Figure:
    """Draw the clients by the first two principal components of their routing logits.

    Colour: the class of which a client has most examples. Area: mean number of domain experts held
    per module. Beside it: that number, with its range over the modules.
    """
    classes = colours_of_classes(rows)
    height = HEIGHT_INCHES + LIST_INCHES * (GREY in classes.values())
    figure = Figure(figsize=(PAGE_INCHES, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    scored = [row for row in rows if row["x"] is not None]
    areas = _areas(rows)
    _draw_map(left, scored, classes, areas)
    _draw_experts(right, rows, classes)
    _name_classes(figure, rows, classes)
    random = " (random scores)" if rows[0]["round"] == 1 else ""
    figure.suptitle(f"Clients by their routing logits: {origin(rows)}{random}")
    figure.draw_without_rendering()  # The layout settles where the markers are.
    figure.set_layout_engine("none")
    _number_clients(left, scored, areas)
    return figure


def colours_of_classes(rows: Rows) -> dict[str, str]:
    """Colour of each class that is the most frequent one of a client; grey if these are many."""
    classes = sorted(unique(rows, "class"))
    if len(classes) > len(COLOURS):
        return dict.fromkeys(classes, GREY)
    return dict(zip(classes, COLOURS, strict=False))


def _areas(rows: Rows) -> dict[int, float]:
    """Area of the marker of each client, in square points."""
    many = len(rows) > MOST_COLUMNS_WITH_NUMBERS
    largest = LARGEST_AREA_AMONG_MANY if many else LARGEST_AREA
    most = max(row["experts_mean"] for row in rows) or 1.0
    return {row["client"]: largest * row["experts_mean"] / most for row in rows}


def _draw_map(axes: Axes, rows: Rows, classes: dict[str, str], areas: dict[int, float]) -> None:
    """Draw a marker per client."""
    axes.axhline(0, color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.axvline(0, color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.scatter(
        [row["x"] for row in rows],
        [row["y"] for row in rows],
        s=[areas[row["client"]] for row in rows],
        color=[classes[row["class"]] for row in rows],
        edgecolor=EDGE,
        linewidths=0.4,
        alpha=0.85,
    )
    axes.margins(0.14)
    for axis, side, label in ((axes.xaxis, "x", "first"), (axes.yaxis, "y", "second")):
        share = 100 * rows[0][f"share_{side}"]
        axis.set_label_text(f"{label} component ({share:.0f}% of variance)")
        if share == 0:
            axis.set_ticks([0])
    axes.set_title("marker area: domain experts held", size=6.5, color="#555555")


def _number_clients(axes: Axes, rows: Rows, areas: dict[int, float]) -> None:
    """Write each client's number beside its marker, where it hides least."""
    dots = axes.figure.dpi / 72
    centres = {r["client"]: axes.transData.transform((r["x"], r["y"])) / dots for r in rows}
    reach = {client: np.sqrt(areas[client] / np.pi) for client in centres}
    boxes = [_box(centre, *[2 * reach[client]] * 2) for client, centre in centres.items()]
    for row in rows:
        client = row["client"]
        centre = centres[client]
        width, height = 72 * inches(str(client), NUMBER_POINTS), 0.75 * NUMBER_POINTS
        places = [
            centre + _beside(side, reach[client], width, height, gap)
            for gap in (1.0, 4.0)
            for side in AROUND
        ]
        hidden = [
            sum(_overlap(_box(place, width, height), box) for box in boxes) for place in places
        ]
        best = places[int(np.argmin(np.round(hidden, 3)))]
        boxes.append(_box(best, width, height))
        x, y = best - centre
        axes.annotate(
            str(client),
            (row["x"], row["y"]),
            xytext=(x, y),
            textcoords="offset points",
            size=NUMBER_POINTS,
            ha="center",
            va="center",
        )


def _beside(
    side: tuple[int, int], reach: float, width: float, height: float, gap: float
) -> np.ndarray:
    """Way from the middle of a marker to the middle of a number beside it, in points."""
    corner = 0.75 if all(side) else 1.0
    x = side[0] * (corner * reach + gap + width / 2)
    y = side[1] * (corner * reach + gap + height / 2)
    return np.array([x, y])


def _box(centre: np.ndarray, width: float, height: float) -> np.ndarray:
    """Left, lower, right and upper end of a box."""
    half = np.array([width, height]) / 2
    return np.concatenate([centre - half, centre + half])


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Area that two boxes have in common."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(np.prod(np.maximum(sides, 0)))


def _draw_experts(axes: Axes, rows: Rows, classes: dict[str, str]) -> None:
    """Draw the number of experts of each client: mean and range over modules."""
    means = np.array([row["experts_mean"] for row in rows])
    lowest = np.array([row["experts_lowest"] for row in rows])
    highest = np.array([row["experts_highest"] for row in rows])
    axes.grid(axis="y")
    axes.bar(
        [row["client"] for row in rows],
        means,
        0.75,
        yerr=[means - lowest, highest - means],
        color=[classes[row["class"]] for row in rows],
        alpha=0.85,
        edgecolor=EDGE,
        linewidth=0.4,
        error_kw={"ecolor": EDGE, "elinewidth": 0.7, "capsize": 0},
    )
    axes.set(xlabel="client", ylabel="domain experts held, per module")
    axes.set_xticks(some_ticks(len(rows)))
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("bar: mean over modules; line: fewest to most", size=6.5, color="#555555")


def _name_classes(figure: Figure, rows: Rows, classes: dict[str, str]) -> None:
    """Name the classes below the panels; those of each client, if there are too many colours."""
    if GREY in classes.values():
        _name_clients(figure, rows)
        return
    handles = [
        figure.axes[0].scatter([], [], 18, color=shade, edgecolor=EDGE, linewidths=0.4, alpha=0.85)
        for shade in classes.values()
    ]
    labels = [shorten(label, 28) for label in classes]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        title="most frequent class",
        title_fontsize=6.5,
    )


def _name_clients(figure: Figure, rows: Rows) -> None:
    """Write the most frequent class of each client below the panels, unless these are many."""
    if len(rows) > MOST_COLUMNS_WITH_NUMBERS:
        return
    handles = [figure.axes[0].plot([], [], linestyle="none")[0] for _ in rows]
    figure.legend(
        handles,
        [f"{row['client']}: {shorten(row['class'], 34)}" for row in rows],
        loc="outside lower center",
        ncols=3,
        handlelength=0,
        handletextpad=0,
        title="most frequent class of each client",
        title_fontsize=6.5,
    )
