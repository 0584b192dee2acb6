"""A data set, its examples and its split as text for a terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedamole.cli.pool import table
from fedamole.datasets.loading import Corpus
from fedamole.datasets.overview import (
    Lengths,
    as_seen,
    spread_examples,
    text_lengths,
    token_lengths,
)
from fedamole.datasets.splits import Partition
from fedamole.settings import DatasetSettings, ScenarioSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDTH = 98
MAX_CLASSES = 20
"""Classes that are listed one by one: the largest."""
MAX_LINES = 24
"""Printed lines of one text; of a longer one the middle is left out."""
MAX_NAME = 30
"""Characters of a class in the table of the split."""
REASONS = {
    "no_label": "without a label or category",
    "no_response": "without an answer",
    "duplicate": "that occurred before",
    "other_class": "of classes that the data set drops",
}
UNWANTED = {"drop_classes": "classes", "no_response": "answers"}
"""What the values of two settings are."""


def describe(
    corpus: Corpus,
    scenario: ScenarioSettings,
    tokenizer: "PreTrainedTokenizerBase | None",
    number: int,
) -> Iterator[list[str]]:
    """Say what a data set is, part by part: facts, examples, lengths.

    Parameters
    ----------
    corpus
        The examples.
    scenario
        Gives the data set and max_length.
    tokenizer
        Of the backbone; None counts words and shows no special tokens.
    number
        How many examples to show.
    """
    yield [*_facts(corpus, scenario.dataset), *_classes(corpus)]
    for example in spread_examples(corpus, number):
        prompt, answer = as_seen(example, tokenizer, scenario.max_length)
        name = corpus.classes[example.category]
        title = "An example" if len(corpus.classes) == 1 else f"An example of {_plain(name)}"
        yield [title, *_text("prompt", prompt), *_text("answer", answer)]
    if tokenizer is None:
        yield _lengths(text_lengths(corpus), corpus, scenario.max_length)
    else:
        counted = token_lengths(corpus, tokenizer, scenario.max_length)
        yield _lengths(counted, corpus, scenario.max_length)


def _facts(corpus: Corpus, dataset: DatasetSettings) -> list[str]:
    """Say where the examples come from, how many there are, and which rows were dropped."""
    source = dataset.source
    parts = [f"hub {source.hub}"] if source.hub else []
    parts += [f"{key} {getattr(source, key)}" for key in ("subset", "revision", "package")
              if getattr(source, key)]  # fmt: skip
    parts += [", ".join(source.files)] if source.files else []
    if not source.files or source.layout == "natural-instructions":
        parts += [f"splits {', '.join(source.splits)}"]
    gone = [f"{count:,} {REASONS[reason]}" for reason, count in corpus.dropped.items() if count]
    rows = [
        ("data set", f"{dataset.name}, {dataset.task}, metric {dataset.metric}"),
        ("source", "; ".join(parts)),
        ("examples", f"{len(corpus.examples):,}"),
        ("dropped", f"rows {', '.join(gone)}" if gone else "no rows"),
        *((f"- {key}", text) for key, text in _unwanted(corpus).items() if text),
    ]
    return [line for name, text in rows for line in _paragraph(name, text)]


def _unwanted(corpus: Corpus) -> dict[str, str]:
    """Say how many rows each value that shall be dropped has cost; 0 may be a misspelt one."""
    return {
        UNWANTED[key]: ", ".join(f"{value!r} {count:,}" for value, count in values.items())
        for key, values in corpus.unwanted.items()
    }


def _classes(corpus: Corpus) -> list[str]:
    """List the classes with their sizes, the largest first."""
    sizes = np.bincount(corpus.categories, minlength=len(corpus.classes))
    listed, rest = _by_size(sizes)
    texts = [f"{corpus.classes[c]} {sizes[c]:,}" for c in listed]
    texts += [f"{len(rest)} others {sizes[rest].sum():,}"] if len(rest) else []
    return _paragraph("classes", f"{len(corpus.classes)}: {', '.join(texts)}")


def _by_size(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort classes, the largest first, into those to list and the rest: none, or two and more."""
    order = np.argsort(-sizes, kind="stable")
    number = len(order) if len(order) <= MAX_CLASSES + 1 else MAX_CLASSES
    return order[:number], order[number:]


def _paragraph(name: str, text: str) -> list[str]:
    """Wrap a fact beside its name."""
    return textwrap.wrap(
        _plain(text), WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10
    )


def _text(name: str, text: str) -> list[str]:
    """Show a text with a bar before each of its lines, and none where it is only wrapped."""
    lines = []
    for line in text.split("\n"):
        pieces = textwrap.wrap(_plain(line), WIDTH - 12, break_on_hyphens=False) or [""]
        lines += [f"| {pieces[0]}", *(f"  {piece}" for piece in pieces[1:])]
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        left_out = f"... {len(lines) - 2 * half} lines ..."
        lines = [*lines[:half], left_out, *lines[-half:]]
    return [f"{name if not n else '':10}{line}".rstrip() for n, line in enumerate(lines)]


def _plain(text: str) -> str:
    """Write what a terminal would obey, such as an escape, as what it is."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _lengths(lengths: Lengths, corpus: Corpus, max_length: int) -> list[str]:
    """Tabulate lengths."""
    counted, total = len(lengths.prompt), len(corpus.examples)
    which = "of all examples" if counted == total else f"of {counted:,} of {total:,} examples"
    rows = [
        (name, *(f"{value:.0f}" for value in (np.median(of), np.percentile(of, 95), of.max())))
        for name, of in (("prompt", lengths.prompt), ("answer", lengths.answer))
    ]
    lines = [f"Lengths in {lengths.unit}, {which}"]
    lines += table(rows, (lengths.unit, "median", "95 %", "longest"))
    if lengths.unit == "tokens":
        lines += [
            f"{lengths.too_long:,} prompts have max_length {max_length:,} or more tokens and will "
            f"be dropped; {lengths.cut:,} answers will be cut."
        ]
    return lines


def split_table(division: Partition, scenario: ScenarioSettings, seed: int) -> list[str]:
    """Tabulate examples by class and client, and the sizes of every client's sets."""
    listed, rest = _by_size(division.counts.sum(axis=0))
    rows = [(division.classes[c], division.counts[:, c]) for c in np.sort(listed)]
    if len(rest):
        rows += [(f"{len(rest)} others", division.counts[:, rest].sum(axis=1))]
    rows += [("all classes", division.counts.sum(axis=1))]
    for name in division.clients[0].parts():
        held = np.array([len(client.parts()[name]) for client in division.clients])
        rows += [(f"- {name}", held)]
    title = (
        f"Split {scenario.partition.slug} over {scenario.clients} clients, seed {seed}: examples "
        "of each client"
    )
    return [title, *_by_client(rows)]


def _by_client(rows: Sequence[tuple[str, np.ndarray]]) -> list[str]:
    """Lay out a table with a column per client, in as many blocks as the width asks for."""
    names = [_shortened(name) for name, _ in rows]
    columns = [
        _column(str(client), [counts[client] for _, counts in rows])
        for client in range(len(rows[0][1]))
    ]
    columns += [_column("together", [counts.sum() for _, counts in rows])]
    room = WIDTH - max(map(len, [*names, "client"]))
    lines: list[str] = []
    while columns:
        widths = np.cumsum([len(column[0]) + 2 for column in columns])
        number = max(1, int((widths <= room).sum()))
        block, columns = columns[:number], columns[number:]
        heads, *cells = zip(*block, strict=True)
        body = [(name, *some) for name, some in zip(names, cells, strict=True)]
        lines += ["", *table(body, ("client", *heads))]
    return lines[1:]


def _column(head: str, counts: Sequence[int]) -> list[str]:
    """Write a column, aligned to the right; nothing is a dot."""
    cells = [head, *(str(count) if count else "." for count in counts)]
    return [cell.rjust(max(map(len, cells))) for cell in cells]


def _shortened(name: str) -> str:
    """Cut a long name of a class."""
    name = _plain(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."
