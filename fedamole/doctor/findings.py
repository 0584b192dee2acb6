"""What a check found: the thing, its value and, when it is not well, what to do, in one line."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fedamole.errors import FedamoleError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes
    ----------
    level
        ``ok``; ``warning``: works, or could not be looked at; ``error``: jobs would fail or hang.
    what
        The thing.
    value
        What it is.
    advice
        What to do; empty if nothing.
    """

    level: Level
    what: str
    value: str
    advice: str = ""

    def __str__(self) -> str:
        """Give the line for a person."""
        text = f"{self.level:<8} {self.what:<20} {self.value}"
        return " ".join(f"{text}; {self.advice}".split("\n")) if self.advice else text


def ok(what: str, value: str) -> Finding:
    """All is well."""
    return Finding("ok", what, value)


def warning(what: str, value: str, advice: str = "") -> Finding:
    """Works, or could not be looked at."""
    return Finding("warning", what, value, advice)


def error(what: str, value: str, advice: str) -> Finding:
    """Jobs would fail or hang."""
    return Finding("error", what, value, advice)


def attempt(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Run a check; one that cannot be made is a finding too.

    Parameters
    ----------
    what
        The thing it looks at.
    check
        Gives its findings.

    Yields
    ------
    Finding
        Those of the check.
    """
    try:
        yield from check()
    except FedamoleError as problem:
        yield warning(what, f"not checked ({problem})")
    except Exception as problem:
        # A defect of one check must not hide what the others would find.
        value = f"not checked: the check itself failed ({type(problem).__name__}: {problem})"
        yield warning(what, value, "please report this")
