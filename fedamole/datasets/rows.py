"""A row of a data set: its columns, and what lies inside them, as text."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedamole.errors import FedamoleError


@dataclass(frozen=True)
class Row:
    """One record of a data set.

    Attributes
    ----------
    values
        Value by column name.
    where
        File and line, for errors.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str:
        """Give the value of a column as text; nothing (null) is the empty text.

        A column is a name, or a path into what it holds: names of a mapping, numbers of a list from
        0, and at the end ``*`` for all items, one per line. Inside nothing, and inside an empty
        list, there is nothing.

        Raises
        ------
        FedamoleError
            If there is no such column, or it holds a list or a mapping; with what there is.
        """
        if column in self.values:
            return self._text(self.values[column], column)
        name, *path = column.split(".")
        if name not in self.values or not path:
            close = difflib.get_close_matches(column, map(str, self.values), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise FedamoleError(
                f"{self.where}: has no field {column!r}; {hint}its fields are "
                f"{sorted(map(str, self.values))}"
            )
        value = self.values[name]
        for depth, step in enumerate(path, start=1):
            if value is None or value == []:
                return ""
            if step == "*" and depth == len(path) and isinstance(value, list):
                return "\n".join(self._text(item, column) for item in value)
            value = self._inside(value, step, ".".join([name, *path[: depth - 1]]))
        return self._text(value, column)

    def _text(self, value: Any, column: str) -> str:
        """Write a single value as text."""
        if isinstance(value, str):
            return value
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, int | float):
            return "" if math.isnan(value) else str(value)
        inner = next(iter(value), None) if isinstance(value, dict) else 0 if value else None
        is_path = inner is not None and not column.endswith("*")
        hint = f", such as that of '{column}.{inner}'" if is_path else ""
        raise FedamoleError(
            f"{self.where}: field {column!r} holds a {type(value).__name__}; a text or a number is "
            f"needed{hint}"
        )

    def _inside(self, value: Any, step: str, column: str) -> Any:
        """Give an entry of a mapping or an item of a list."""
        if isinstance(value, dict):
            if step in value:
                return value[step]
            found = f"no entry {step!r}; its entries are {sorted(map(str, value))}"
        elif isinstance(value, list):
            if step.isdecimal() and int(step) < len(value):
                return value[int(step)]
            found = f"no item {step!r}; it has {len(value)}, from 0 on"
        else:
            found = f"no {step!r}; it holds a {type(value).__name__}"
        raise FedamoleError(f"{self.where}: field {column!r} has {found}")
