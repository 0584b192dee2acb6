"""Many paths as a short text for bash: a script may have 128 KiB, and every path is long."""

import itertools
from collections.abc import Iterable, Sequence


def braced(paths: Iterable[str]) -> str:
    """Write paths as words with braces, which bash expands to the same paths in the same order.

    Neighbours in one folder share a word: ``run/round_001/metrics_00{0,1}.json``.
    """
    return " ".join(
        _word(folder, [path.removeprefix(folder) for path in group])
        for folder, group in itertools.groupby(paths, _folder)
    )


def _folder(path: str) -> str:
    """Give the folder of a path, with the slash at its end."""
    return path[: path.rfind("/") + 1]


def _word(folder: str, names: list[str]) -> str:
    """One word for the files of a folder."""
    if len(names) == 1:
        # Bash leaves braces around a single word as they are.
        return _quoted(folder + names[0])
    head = _common_start(names)
    # Behind the head, since the two must not overlap.
    rests = [name.removeprefix(head) for name in names]
    tail = _common_start([rest[::-1] for rest in rests])[::-1]
    middles = ",".join(_quoted(rest.removesuffix(tail)) for rest in rests)
    return f"{_quoted(folder + head)}{{{middles}}}{_quoted(tail)}"


def _common_start(words: Sequence[str]) -> str:
    """Letters that all words begin with."""
    columns = zip(*words, strict=False)
    return "".join(
        letters[0] for letters in itertools.takewhile(lambda each: len(set(each)) == 1, columns)
    )


def _quoted(text: str) -> str:
    """Quote for bash; unlike shlex.quote also a comma, which separates words in braces."""
    return text if text.isalnum() else "'" + text.replace("'", "'\\''") + "'"
