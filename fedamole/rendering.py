"""Text of a table: the same numbers as Markdown, LaTeX and HTML, the same bytes every time."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

PERCENT = 100
STYLE = (
    "body{font-family:sans-serif;margin:2em}"
    "table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}"
    "th{border-bottom:1px solid}"
    "th,td{padding:.3em .8em;text-align:right}"
    "th:first-child,td:first-child{text-align:left}"
)


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Attributes
    ----------
    mean
        The value, or the mean over seeds; not a number prints ``n/a``.
    std
        Sample standard deviation over seeds; None for a single seed.
    """

    mean: float
    std: float | None = None


def over_seeds(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation; one value has no deviation, nor has what is no number."""
    mean = fmean(values)
    return Cell(mean, stdev(values) if len(values) > 1 and not math.isnan(mean) else None)


@dataclass(frozen=True)
class Column:
    """A column of a printed table.

    Attributes
    ----------
    title
        Text of the head.
    cells
        Method -> number, in the unit that is printed.
    best
        Which numbers are better; None ranks nothing.
    gain
        Gain of the reference method, as a fraction; None leaves the field empty, not a number
        prints ``n/a``.
    """

    title: str
    cells: dict[str, Cell]
    best: Literal["highest", "lowest"] | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Markup:
    """What a text format writes around numbers.

    Attributes
    ----------
    best, second
        Patterns for the best and the second best number.
    plus_minus
        Sign between mean and standard deviation.
    percent
        Pattern of a gain, with its unit.
    """

    best: str
    second: str
    plus_minus: str
    percent: str


MARKDOWN = Markup("**{}**", "{}", " ± ", "{} %")
HTML = Markup("<b>{}</b>", "<u>{}</u>", " &plusmn; ", "{} %")
LATEX = Markup(r"\textbf{{{}}}", r"\underline{{{}}}", r" $\pm$ ", r"${}$\,\%")


def markdown(
    columns: Sequence[Column], reference: str, decimals: int, notes: Sequence[str] = ()
) -> str:
    """GitHub table: best numbers bold, the gain of the reference in the last line; notes below."""
    head = ["method", *(column.title for column in columns)]
    rule = [":---", *("---:" for _ in columns)]
    lines = [
        head,
        rule,
        *_body(columns, decimals, MARKDOWN),
        *_gain(columns, reference, decimals, MARKDOWN),
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n{text}\n" for text in notes)


def latex(columns: Sequence[Column], reference: str, decimals: int) -> str:
    """``tabular`` for booktabs: best numbers bold, second best underlined, the gain at the end."""
    head = [_escape(text) for text in ["method", *(column.title for column in columns)]]
    body = [[_escape(line[0]), *line[1:]] for line in _body(columns, decimals, LATEX)]
    last = [[_escape(line[0]), *line[1:]] for line in _gain(columns, reference, decimals, LATEX)]
    blocks = [block for block in ([head], body, last) if block]
    rows = "\\midrule\n".join(
        "".join(" & ".join(line) + " \\\\\n" for line in block) for block in blocks
    )
    layout = "l" + "r" * len(columns)
    return f"\\begin{{tabular}}{{{layout}}}\n\\toprule\n{rows}\\bottomrule\n\\end{{tabular}}\n"


def latex_notes(notes: Sequence[str]) -> str:
    """Small lines below a ``tabular``."""
    return "".join(f"\\par{{\\footnotesize {_escape(text)}\\par}}\n" for text in notes)


def html_table(
    columns: Sequence[Column], reference: str, decimals: int, notes: Sequence[str] = ()
) -> str:
    """HTML ``table``: best bold, second best underlined, the gain in the last line; notes below."""
    head = [html.escape(text) for text in ["method", *(column.title for column in columns)]]
    lines = _body(columns, decimals, HTML) + _gain(columns, reference, decimals, HTML)
    rows = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
    for name, *texts in lines:
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{'</td><td>'.join(texts)}</td></tr>")
    below = "".join(f"<p>{html.escape(text)}</p>\n" for text in notes)
    return "<table>\n" + "\n".join(rows) + "\n</table>\n" + below


def html_page(title: str, tables: Mapping[str, str], style: str = STYLE) -> str:
    """Page that holds tables under their titles; it needs no other file."""
    parts = [f"<h2>{html.escape(name)}</h2>\n{table}" for name, table in tables.items()]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{style}</style></head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def _body(columns: Sequence[Column], decimals: int, markup: Markup) -> list[list[str]]:
    """One line of texts per method: its name, its numbers."""
    printed = [_print(column, decimals, markup) for column in columns]
    return [[method, *(texts[method] for texts in printed)] for method in columns[0].cells]


def _gain(
    columns: Sequence[Column], reference: str, decimals: int, markup: Markup
) -> list[list[str]]:
    """Give the line with the gains; no line if no column has one."""
    if all(column.gain is None for column in columns):
        return []
    gains = ["" if c.gain is None else _percent(c.gain, decimals, markup) for c in columns]
    return [[f"gain of {reference} over the best other", *gains]]


def _percent(value: float, decimals: int, markup: Markup) -> str:
    if math.isnan(value):
        return "n/a"
    return markup.percent.format(number(PERCENT * value, decimals, sign="+"))


def _print(column: Column, decimals: int, markup: Markup) -> dict[str, str]:
    """Map each method to its marked number in a column."""
    means = {method: number(cell.mean, decimals) for method, cell in column.cells.items()}
    # Ranked as printed: two numbers that a reader cannot tell apart are marked alike.
    known = {means[method] for method, cell in column.cells.items() if not math.isnan(cell.mean)}
    ranking = sorted(known, key=float, reverse=column.best == "highest")
    patterns = {}
    if column.best and len(means) > 1:
        patterns = dict(zip(ranking, (markup.best, markup.second), strict=False))
    texts = {}
    for method, cell in column.cells.items():
        spread = "" if cell.std is None else markup.plus_minus + number(cell.std, decimals)
        texts[method] = patterns.get(means[method], "{}").format(means[method]) + spread
    return texts


def number(value: float, decimals: int, sign: Literal["-", "+"] = "-") -> str:
    """Print a number with fixed decimals; zero never has a minus, and what is no number is n/a."""
    if math.isnan(value):
        return "n/a"
    # Adding 0.0 turns the -0.0 that rounding may leave into 0.0.
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


def _escape(text: str) -> str:
    """Escape what LaTeX would read as commands."""
    special = {char: f"\\{char}" for char in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, char) for char in text)
