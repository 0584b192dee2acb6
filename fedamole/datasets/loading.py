"""A data set as prompts, answers and classes, ready to be spread over clients."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedamole.datasets.rows import Row
from fedamole.datasets.sources import read_rows
from fedamole.datasets.templates import find_label, render_prompt, render_response
from fedamole.errors import FedamoleError, did_you_mean
from fedamole.settings import DatasetSettings

EVERYTHING = "all"
"""The class of all rows of a data set that names no classes."""
MOST_LISTED = 20
"""Categories that an error lists."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its answer.

    Attributes
    ----------
    prompt
        What the model reads.
    response
        What it should answer, without the end-of-sequence token.
    category
        Class for the partition, a position in ``Corpus.classes``.
    label
        Class of the answer, a position in ``DatasetSettings.answers``; -1 for generation.
    """

    prompt: str
    response: str
    category: int
    label: int


@dataclass(frozen=True)
class Corpus:
    """All usable examples of a data set; the position of an example is its id.

    Attributes
    ----------
    examples
        The N examples in the order of the source.
    classes
        Names of the C classes of the partition: answers in the order of the settings, or the
        categories in sorted order.
    dropped
        Rows that were left out, by reason: ``no_label``, ``no_response``, ``duplicate``, and where
        the settings drop classes ``other_class``.
    unwanted
        Rows that were left out for each value of ``drop_classes`` and ``no_response``, zeros too.
    """

    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    dropped: dict[str, int]
    unwanted: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def categories(self) -> np.ndarray:
        """Class of each example, (N,) int64."""
        return np.array([example.category for example in self.examples], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all examples: equal if and only if every id means the same example."""
        content = hashlib.sha256()
        for example in self.examples:
            fields = (example.prompt, example.response, example.category, example.label)
            content.update(repr(fields).encode())
        return content.hexdigest()


def load_corpus(settings: DatasetSettings) -> Corpus:
    """Read a data set and render its prompts and answers.

    Rows without a label, category or answer, and (if asked for) those of some classes and
    duplicates are dropped and counted.

    Raises
    ------
    FedamoleError
        If a file is missing or broken, a field is missing, a label is out of range, no row is left,
        or no row has a category that shall be dropped.
    """
    dropped = {"no_label": 0, "no_response": 0, "duplicate": 0}
    if settings.drop_classes:
        dropped["other_class"] = 0
    unwanted = {
        key: Counter(dict.fromkeys(getattr(settings, key), 0))
        for key in ("drop_classes", "no_response")
    }
    found = list(_usable(settings, dropped, unwanted))
    if not found:
        counts = [f"{reason} {count}" for reason, count in dropped.items() if count]
        why = f"dropped: {', '.join(counts)}" if counts else "its source has none"
        raise FedamoleError(f"data set {settings.name}: no row is left ({why})")
    _check_drop_classes(settings, unwanted["drop_classes"], {row[2] for row in found})
    has_names = bool(settings.category or not settings.label)
    if has_names:
        classes = sorted({category for _, _, category, _ in found})
    else:
        classes = list(settings.answers)
    position = {name: number for number, name in enumerate(classes)}
    examples = tuple(
        Example(prompt, response, position[category], label)
        for prompt, response, category, label in found
    )
    names = classes if has_names else list(settings.answers.values())
    return Corpus(examples, tuple(names), dropped, unwanted)


def _check_drop_classes(
    settings: DatasetSettings, dropped: Mapping[str, int], categories: set[str]
) -> None:
    """Refuse a category that no row has; of labels those that are not answers are known anyway."""
    for value, count in dropped.items():
        if settings.category and not count:
            raise FedamoleError(
                f"data set {settings.name}: drop_classes {value!r} is no {settings.category} of "
                f"any row; {did_you_mean(value, categories)}it has "
                f"{', '.join(map(repr, sorted(categories)[:MOST_LISTED]))}"
                + ", ..."
                * (len(categories) > MOST_LISTED)
            )


def _usable(
    settings: DatasetSettings, dropped: dict[str, int], unwanted: dict[str, Counter[str]]
) -> Iterator[tuple[str, str, str, int]]:
    """Give prompt, response, category name and label of the rows that stay; count the others."""
    seen: set[tuple[str, str]] = set()
    class_column = settings.category or settings.label
    for row in read_rows(settings.source):
        values = _class_values(row, settings)
        if reason := _unwanted(values, settings):
            dropped[reason] += 1
            unwanted["drop_classes"].update(values.intersection(settings.drop_classes))
            continue
        label = find_label(row, settings) if settings.label else None
        prompt, response = render_prompt(row, settings), render_response(row, label, settings)
        if response.strip() in ("", *settings.no_response):
            dropped["no_response"] += 1
            unwanted["no_response"].update({response.strip()}.intersection(settings.no_response))
        elif settings.drop_duplicates and (prompt, response) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add((prompt, response))
            category = row.text(class_column) if class_column else EVERYTHING
            yield prompt, response, category, -1 if label is None else label


def _class_values(row: Row, settings: DatasetSettings) -> set[str]:
    """Label and category of a row."""
    return {row.text(column) for column in (settings.label, settings.category) if column}


def _unwanted(values: set[str], settings: DatasetSettings) -> str | None:
    """Say why a row is dropped for its label or category; None if it is not."""
    if values.intersection(settings.drop_classes):
        return "other_class"
    return "no_label" if values.intersection(settings.no_label) else None
