"""Rows of a data set, wherever it comes from: hub, records, conversations, Natural Instructions."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedamole.datasets.files import (
    Row,
    decode,
    find_files,
    load_json,
    object_row,
    opened,
    record_rows,
)
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
    if source.hub:
        yield from _hub_rows(source)
    for path in find_files(source):
        if source.layout == "natural-instructions":
            yield from _task_rows(path, source.splits)
        elif source.layout == "conversations":
            yield from _conversation_rows(path)
        else:
            yield from record_rows(path)


def _hub_rows(source: SourceSettings) -> Iterator[Row]:
    """Read a data set of the Hugging Face hub."""
    # Seconds of import that only a hub data set needs.
    import datasets

    for split in source.splits:
        try:
            table = datasets.load_dataset(
                source.hub, source.subset, split=split, revision=source.revision
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FedamoleError(
                f"hub data set {source.hub!r}, split {split!r}, cannot be loaded ({reason}); "
                "without internet point files at a local copy"
            ) from error
        for number, values in enumerate(table, start=1):
            yield Row(values, f"{source.hub} ({split}): row {number}")


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
