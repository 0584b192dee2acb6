"""What each text format writes around the texts and numbers of a table."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Markup:
    """What a text format writes around texts and numbers.

    Attributes
    ----------
    best, second
        Patterns for the best and the second best number.
    plus_minus
        Sign between mean and standard deviation.
    percent
        Pattern of a gain, with its unit.
    minus
        Sign of a negative number.
    text
        Makes a text safe; a newline is a place where it may break.
    title
        The same for the title of a column of numbers.
    """

    best: str
    second: str
    plus_minus: str
    percent: str
    minus: str
    text: Callable[[str], str]
    title: Callable[[str], str]


def escape_latex(text: str) -> str:
    """Escape what LaTeX would read as commands."""
    special = {char: f"\\{char}" for char in "&%$#_{}"}
    special |= {char: f"${char}$" for char in "<>|"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, char) for char in text)


def _stacked(text: str, side: Literal["l", "r"]) -> str:
    """Text for LaTeX whose lines stand on top of each other; the kernel has all that it needs."""
    lines = r"\\".join(escape_latex(text).split("\n"))
    return rf"\shortstack[{side}]{{{lines}}}" if "\n" in text else lines


def _one_line(text: str) -> str:
    """Text for a Markdown table, which has no line breaks."""
    return text.replace("\n", " ").replace("|", r"\|")


def _broken(text: str) -> str:
    """Text for HTML."""
    return html.escape(text).replace("\n", "<br>")


# GitHub shows <ins> underlined, and drops <u>.
MARKDOWN = Markup("**{}**", "<ins>{}</ins>", " ± ", "{} %", "-", _one_line, _one_line)
HTML = Markup("<b>{}</b>", "<u>{}</u>", " &plusmn; ", "{} %", "-", _broken, _broken)
LATEX = Markup(
    best=r"\textbf{{{}}}",
    second=r"\underline{{{}}}",
    plus_minus=r" $\pm$ ",
    percent=r"${}$\,\%",
    minus="$-$",
    text=lambda text: _stacked(text, "l"),
    title=lambda text: _stacked(text, "r"),
)
