"""Sweeps: a scenario under several settings, each a column of its own (torch-free).

A sweep names settings by their paths, such as ``training.learning_rate``, and gives the values of
each. Every combination makes a point: the scenarios of the config under these values. Values of
``scenarios.*`` make other populations; all others leave the population, its split and its tokens
as they are, and the points share them.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from fedamole.errors import FedamoleError, did_you_mean
from fedamole.settings.section import SLUG

# What differs between the points of a sweep: a setting and its value.
Values = dict[str, Any]

SCENARIOS = "scenarios"
SECTIONS = (
    "adapter",
    "assignment",
    "aggregation",
    "training",
    "participation",
    "privacy",
    "prompt",
    "fdlora",
    "fedapen",
    "evaluation",
)
# How jobs look must not depend on the column.
_FIXED = (
    "training.ranks",
    "training.cpu_threads",
    "training.deepspeed",
    "training.pack_clients",
    "scenarios.name",
    "scenarios.dataset",
)
MOST_KEYS = 2


def points(sweep: Mapping[str, list[Any]]) -> list[Values]:
    """All combinations of the values of a sweep, the last setting varying fastest."""
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def check(sweep: Mapping[str, list[Any]]) -> None:
    """Refuse a sweep over what cannot vary.

    Raises
    ------
    FedamoleError
        Names the setting, and what is allowed.
    """
    if len(sweep) > MOST_KEYS:
        raise FedamoleError(
            f"sweep: {', '.join(sweep)}: {len(sweep)} settings vary; {MOST_KEYS} can be shown"
        )
    for key, values in sweep.items():
        section, _, name = key.partition(".")
        if section not in (*SECTIONS, SCENARIOS) or not name:
            known = section in (*SECTIONS, SCENARIOS)
            hint = "" if known else did_you_mean(section, (*SECTIONS, SCENARIOS))
            raise FedamoleError(
                f"sweep: {key}: is not a setting that can vary; {hint}allowed: a path such as "
                f"training.learning_rate into {', '.join((*SECTIONS, SCENARIOS))}"
            )
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in _FIXED):
            raise FedamoleError(f"sweep: {key}: must be the same in the whole study")
        if not values:
            raise FedamoleError(f"sweep: {key}: has no values")
        tags = [tag(key, value) for value in values]
        for value, text in zip(values, tags, strict=True):
            if not re.fullmatch(SLUG, text):
                raise FedamoleError(
                    f"sweep: {key}: {value!r} cannot stand in the name of a column, {text!r}, "
                    "which may have letters, digits, dots, hyphens and underscores"
                )
        if twice := [text for text in tags if tags.count(text) > 1]:
            raise FedamoleError(f"sweep: {key}: {twice[0]!r} stands twice")


def tag(key: str, value: Any) -> str:
    """Short text of a setting and its value, as it stands in the name of a scenario."""
    return f"{key.rpartition('.')[2]}{shown(value)}"


def shown(value: Any) -> str:
    """A value as text: ``0.0005``, ``1e07``, ``none``, ``1`` of ``{eta: 1}``."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "-".join(shown(inner) for inner in value.values())
    return f"{value:g}".replace("+", "") if isinstance(value, float) else str(value)


def changed(settings: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """Settings of a config with other values in them; a missing section is added.

    Parameters
    ----------
    settings
        Sections, as a mapping of mappings.
    values
        Path -> value.

    Raises
    ------
    FedamoleError
        If a path leads through something that is no section.
    """
    result = dict(settings)
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if not rest:
            result[head] = value
            continue
        inner = result.get(head)
        if inner is not None and not isinstance(inner, Mapping):
            raise FedamoleError(f"sweep: {key}: {head} is {inner!r}, not a section")
        result[head] = changed(inner or {}, {rest: value})
    return result


def split(values: Values) -> tuple[Values, Values]:
    """Cut the values of a point into those of its population and the others."""
    own = {key: value for key, value in values.items() if key.startswith(f"{SCENARIOS}.")}
    return own, {key: value for key, value in values.items() if key not in own}
