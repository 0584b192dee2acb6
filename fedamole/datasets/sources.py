"""Rows of a data set, wherever it comes from, and however its files are laid out."""

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedamole.datasets.files import (
    decode,
    find_files,
    hub_error,
    load_json,
    object_row,
    opened,
    record_rows,
)
from fedamole.datasets.rows import Row
from fedamole.errors import FedamoleError
from fedamole.settings import SourceSettings

MAX_TASKS = 100
"""Tasks of Natural Instructions that are used: the largest ones."""

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_rows(source: SourceSettings) -> Iterator[Row]:
    """Read all rows of a source in a fixed order.

    Raises
    ------
    FedamoleError
        If something is missing, unreadable or broken; with file and line.
    """
    if source.hub and not source.files:
        yield from _hub_rows(source.hub, source)
        return
    for path in find_files(source):
        if source.layout == "natural-instructions":
            yield from _task_rows(path, source.splits)
        elif source.layout == "conversations":
            yield from _conversation_rows(path)
        elif source.layout == "mcl-wic":
            yield from _tagged_rows(path)
        else:
            yield from record_rows(path)


def _hub_rows(hub: str, source: SourceSettings) -> Iterator[Row]:
    """Read the splits of a data set of the Hugging Face hub."""
    # Seconds of import that only a hub data set needs.
    import datasets

    if source.revision and Path(hub).is_dir():
        raise FedamoleError(f"hub data set {hub!r}: is a local folder, which has no revisions")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for split in source.splits:
        try:
            table = datasets.load_dataset(hub, source.subset, split=split, revision=source.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise hub_error(hub, source.revision, error) from error
        _check_revision(hub, source.revision, table.cache_files)
        for number, values in enumerate(table, start=1):
            yield Row(values, f"{hub} ({split}): row {number}")


def _check_revision(hub: str, revision: str | None, cached: list[dict[str, str]]) -> None:
    """Refuse a cached copy of another commit.

    Where the hub cannot be reached, the library takes the copy that it cached last, whatever
    revision was asked for. The folder of a copy has the name of its commit.
    """
    found = {Path(file["filename"]).parent.name for file in cached}
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and found - {revision}:
        raise FedamoleError(
            f"hub data set {hub!r}: revision {revision} cannot be fetched, and the cache has "
            f"{', '.join(sorted(found))}"
        )


def _conversation_rows(path: Path) -> Iterator[Row]:
    """Read conversations as in chatterbot-corpus: turns 0 and 1, 2 and 3, ... are the rows.

    A last turn that nothing follows gives a row with an empty response, so that it is counted. The
    category is the name of the file.
    """
    for conversation in _sequence(_conversations(_compose(path), path), path):
        # The real corpus has a question without its answer, and without its list, in trivia.yml.
        is_turn = isinstance(conversation, yaml.ScalarNode)
        turns = [conversation] if is_turn else _sequence(conversation, path)
        for question, answer in itertools.zip_longest(turns[::2], turns[1::2]):
            values = {
                "instruction": _turn(question, path),
                "response": _turn(answer, path) if answer else "",
                "category": path.stem,
            }
            yield Row(values, f"{path}:{question.start_mark.line + 1}")


def _compose(path: Path) -> yaml.Node | None:
    """Parse YAML into nodes: they know their lines, and the answer ``No`` stays a text."""
    with opened(path) as file:
        text = decode(file.read(), path)
    try:
        return yaml.compose(text, Loader=_YamlLoader)
    except yaml.reader.ReaderError as error:
        # A control character; it knows no line, and is allowed nowhere above.
        line = text.count("\n", 0, text.index(chr(error.character))) + 1
        raise FedamoleError(f"{path}:{line}: is not valid YAML ({error.reason})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise FedamoleError(f"{where}: is not valid YAML ({error.problem})") from error


def _conversations(root: yaml.Node | None, path: Path) -> yaml.Node:
    """Find the entry ``conversations`` of a file."""
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    keys = {key.value: value for key, value in entries}
    if "conversations" not in keys:
        raise FedamoleError(
            f"{path}: has no entry 'conversations'; its entries are {sorted(map(str, keys))}"
        )
    return keys["conversations"]


def _sequence(node: yaml.Node, path: Path) -> list[yaml.Node]:
    """Give the items of a list."""
    if not isinstance(node, yaml.SequenceNode):
        raise FedamoleError(f"{path}:{node.start_mark.line + 1}: is not a list of turns")
    return list(node.value)


def _turn(node: yaml.Node, path: Path) -> str:
    """Give the text of one turn."""
    if not isinstance(node, yaml.ScalarNode):
        raise FedamoleError(f"{path}:{node.start_mark.line + 1}: is not a text; a turn is needed")
    return str(node.value)


def _task_rows(folder: Path, splits: list[str]) -> Iterator[Row]:
    """Read Natural Instructions v2.8 (Wang et al. 2022, arXiv:2204.07705): the largest tasks.

    Of an instance the first output is used; the definition of the task is its instruction.
    """
    lists = [folder / "splits" / "default" / f"{split}_tasks.txt" for split in splits]
    names = list(dict.fromkeys(name for path in lists for name in _lines(path)))
    sizes = {name: len(_task(folder, name)["Instances"]) for name in names}
    for name in sorted(sorted(names, key=lambda name: (-sizes[name], name))[:MAX_TASKS]):
        task = _task(folder, name)
        definition = "\n".join(task["Definition"])
        for number, instance in enumerate(task["Instances"], start=1):
            where = f"{folder / 'tasks' / name}.json: instance {number}"
            values = dict(object_row(instance, where).values)
            outputs = values.pop("output", None)
            if not isinstance(outputs, list) or not outputs:
                raise FedamoleError(f"{where}: field 'output' must be a list with an answer")
            values |= {"instruction": definition, "response": outputs[0], "category": name}
            yield Row(values, where)


def _lines(path: Path) -> list[str]:
    """Read the non-blank lines of a text file."""
    with opened(path) as file:
        lines = decode(file.read(), path).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _task(folder: Path, name: str) -> dict[str, Any]:
    """Read the file of one task."""
    path = folder / "tasks" / f"{name}.json"
    with opened(path) as file:
        task = load_json(file.read(), path)
    for key in ("Definition", "Instances"):
        if not isinstance(task, dict) or not isinstance(task.get(key), list):
            raise FedamoleError(f"{path}: has no list {key!r}; a Natural Instructions task has")
    return task


def _tagged_rows(path: Path) -> Iterator[Row]:
    """Read MCL-WiC (Martelli et al. 2021): pairs of sentences, and their tags in a file beside."""
    if path.suffix != ".data":
        raise FedamoleError(f"{path}: has no suffix .data; a file of pairs in MCL-WiC has")
    gold = path.with_suffix(".gold")
    tags = {row.text("id"): row.text("tag") for row in record_rows(gold, ".json")}
    for row in record_rows(path, ".json"):
        if row.text("id") not in tags:
            raise FedamoleError(f"{row.where}: id {row.text('id')!r} has no tag in {gold}")
        yield Row({**row.values, "tag": tags[row.text("id")]}, row.where)
